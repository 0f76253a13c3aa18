"""The agents' desk: who may boot into the agent, whose hello counts, what agents are told, what their reports do.

Wire format and meaning: doc/agent-protocol.rst.  A token is spent by the first hello; after that an agent proves itself
with the nonce that came with it.
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nodepool.clock import SECOND, micros
from nodepool.door import Expected, Lines, Reply
from nodepool.errors import Code, Conflict
from nodepool.model import Boot, BootState, Machine, Operation, OperationState, Status
from nodepool.plan import Catalog
from nodepool.plan.board import Board
from nodepool.service import loading
from nodepool.service.moves import note
from nodepool.store import Store, Tx
from nodepool.store import tables as t

log = logging.getLogger("nodepool.agents")

VERSION = "1"
SEEN_EVERY = 60.0  # seconds between two marks that a waiting agent is still there
UNKNOWN = "unknown-machines"
_OPEN = frozenset({OperationState.PENDING, OperationState.RUNNING})


class Desk:
    """Answers agents (door.AgentDoor)."""

    def __init__(self, store: Store, catalog: Callable[[], Catalog]) -> None:
        self._store = store
        self._catalog = catalog
        self._feed = store.feed()
        self._board = Board()
        self._work: set[int] = set()
        self._lock = threading.Lock()
        self.refused: Counter[str] = Counter()

    def expected_boot(self, mac: str) -> Expected | None:
        """The boot that is expected of the machine with this MAC; a MAC that nobody knows is listed."""
        mac = mac.lower()
        spec = self._catalog().machine_at.get(mac)
        if spec is None:
            self._store.write(lambda tx: _list_unknown(tx, mac))
            return None
        self._refresh()
        with self._lock:
            machine = self._board.named(spec.name)
            boot = self._board.boots.get(machine.id) if machine else None
        if machine is None or boot is None or boot.id != machine.boot_id or boot.state is not BootState.EXPECTED:
            return None
        return Expected(spec.name, boot.token)

    def hello(self, lines: Lines, peer: str) -> Reply:
        """Spend the token of a boot; the same agent may say hello again."""
        if lines.get("version") != VERSION:
            return Reply(426, {"error": f"this daemon speaks version {VERSION} of the agent's protocol; reboot"})
        return self._answer(lambda tx: self._hello(tx, lines, peer))

    def poll(self, lines: Lines, peer: str) -> Reply:
        """Take a report in, give the next order out."""
        return self._answer(lambda tx: self._poll(tx, lines, peer))

    def may_fetch(self, path: str, peer: str) -> bool:
        """The agent's own files for all (they hold no secret), an image only for a machine that is told to write it."""
        if path.startswith("agent/"):
            return True
        self._refresh()
        with self._lock:
            told = [
                operation
                for operation in self._board.operations.values()
                if operation.kind == "write" and operation.by_agent and operation.state in _OPEN
            ]
            boots = {boot.id: boot for boot in self._board.boots.values()}
        return any(
            str(operation.params.get("url", "")).endswith(f"/files/{path}")
            and (boot := boots.get(operation.boot_id or 0)) is not None
            and boot.address == peer
            for operation in told
        )

    def changed(self) -> set[int]:
        """The boots for whose agents there may be work since the last call."""
        self._refresh()
        with self._lock:
            work, self._work = self._work, set()
        return work

    def _refresh(self) -> None:
        with self._lock:
            changes, whole = self._feed.drain()
            if not whole:
                changes = self._store.read(loading.board)
                self._board = Board()
            self._board.fold(changes)
            for record in changes:
                if isinstance(record, Operation) and record.by_agent and record.state is OperationState.PENDING:
                    self._work.add(record.boot_id or 0)

    def _answer(self, use_case: Callable[[Tx], Reply]) -> Reply:
        for _ in range(5):
            try:
                reply = self._store.write(use_case)
            except Conflict:
                continue  # the launcher wrote the same row; with its new version this will do
            if reply.status != 200:
                self._say_once(reply)
            return reply
        return Reply(503, {"error": "too busy to answer now", "wait": "2"})

    def _say_once(self, reply: Reply) -> None:
        error = reply.lines.get("error", "")
        self.refused[error] += 1
        if self.refused[error] == 1:
            log.warning("an agent was refused (%d): %s", reply.status, error)

    def _hello(self, tx: Tx, lines: Lines, peer: str) -> Reply:
        token, nonce = lines.get("token", ""), lines.get("nonce", "")
        found = tx.select(Boot, t.boots.c.token == token) if token else []
        if not found or not 16 <= len(nonce) <= 64:
            return Reply(403, {"error": f"the token of the agent at {peer} is not known here: foreign or long over"})
        boot = found[0]
        machine = tx.get(Machine, boot.machine_id)
        if boot.state is BootState.UP:
            if hmac.compare_digest(boot.nonce, nonce):
                return Reply(200, {"boot": str(boot.id)})
            error = f"a second machine ({peer}) used the boot token that {boot.address} had spent; nobody is trusted"
            tx.put(replace(boot, state=BootState.FAILED, error=error, ended_at=tx.now))
            note(tx, machine, "boot-contested", error, code=str(Code.BOOT_CONTESTED))
            return Reply(409, {"error": error})
        if boot.state is not BootState.EXPECTED or machine.boot_id != boot.id:
            return Reply(
                403, {"error": f"the boot {boot.id} of {machine.name} is over; its token was used again by {peer}"}
            )
        facts = _facts(lines)
        spec = self._catalog().machines.get(machine.name)
        macs = {interface.mac for interface in spec.interfaces} if spec else set()
        if macs and macs.isdisjoint(value.lower() for key, value in facts.items() if key.endswith(".mac")):
            error = f"the agent at {peer} has none of the network cards of {machine.name}"
            note(tx, machine, "boot-foreign", error, code=str(Code.BOOT_FOREIGN))
            return Reply(403, {"error": error})
        tx.put(
            replace(
                boot,
                state=BootState.UP,
                nonce=nonce,
                agent_boot_id=lines.get("agent_boot_id", "")[:64],
                address=peer,
                hello_at=tx.now,
                seen_at=tx.now,
            )
        )
        tx.put(replace(machine, facts=facts))
        return Reply(200, {"boot": str(boot.id)})

    def _poll(self, tx: Tx, lines: Lines, peer: str) -> Reply:
        boot = self._boot(tx, lines)
        if boot is None:
            return Reply(403, {"error": f"the agent at {peer} belongs to no boot that is up"})
        if tx.now - boot.seen_at > micros(SEEN_EVERY):
            boot = tx.put(replace(boot, seen_at=tx.now))
        current = self._operation(tx, boot)
        reported = lines.get("operation", "")
        if reported:
            known = current is not None and str(current.id) == reported
            if not known or (current is not None and current.state is OperationState.FAILED):
                if lines.get("state") == "running":
                    return Reply(200, {"cancel": "1"})
            elif current is not None and current.state in _OPEN:
                current = _report(tx, current, lines)
                if current.state is OperationState.RUNNING:
                    return Reply(200, {"continue": "1"})
        if current is not None and current.by_agent and current.state in _OPEN and current.boot_id == boot.id:
            return Reply(200, {"operation": str(current.id), "kind": current.kind, **_strings(current.params)})
        return Reply(200, {"wait": "0"})

    def _boot(self, tx: Tx, lines: Lines) -> Boot | None:
        number, nonce = lines.get("boot", ""), lines.get("nonce", "")
        boot = tx.find(Boot, int(number)) if number.isdecimal() and len(number) < 19 else None
        if boot is None or boot.state is not BootState.UP or not hmac.compare_digest(boot.nonce, nonce):
            return None
        return boot

    def _operation(self, tx: Tx, boot: Boot) -> Operation | None:
        """The newest operation of the boot's machine, the only one that an agent may work at."""
        c = t.operations.c
        found = tx.select(Operation, c.machine_id == boot.machine_id, order=c.id.desc(), limit=1)
        return found[0] if found and found[0].boot_id == boot.id else None


def _report(tx: Tx, operation: Operation, lines: Lines) -> Operation:
    """An agent's report on its operation; what does not fit is taken for a failure of the agent."""
    state = lines.get("state", "")
    if state == "running":
        return tx.put(
            replace(
                operation,
                state=OperationState.RUNNING,
                done=_number(lines.get("done", "")),
                total=_number(lines.get("total", "")),
                phase_now=lines.get("phase", "")[:40],
                changed_at=tx.now,
            )
        )
    if state == "done":
        result = {key[7:]: value for key, value in lines.items() if key.startswith("result.")}
        return tx.put(
            replace(operation, state=OperationState.DONE, result=result, changed_at=tx.now, finished_at=tx.now)
        )
    code = lines.get("code", "") if state == "failed" else ""
    return tx.put(
        replace(
            operation,
            state=OperationState.FAILED,
            error=lines.get("error", "the agent gave no reason")[:1000],
            code=code if code in set(Code) else str(Code.AGENT_ERROR),
            changed_at=tx.now,
            finished_at=tx.now,
        )
    )


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 19 else 0


def _strings(params: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in params.items()}


def _facts(lines: Lines) -> dict[str, str]:
    """The facts in a hello, bounded: at most 400 of them, each at most 256 characters."""
    kept = [(key, value[:256]) for key, value in lines.items() if key.startswith(("fact.", "nic.", "disk."))]
    return dict(kept[:400])


def _list_unknown(tx: Tx, mac: str) -> None:
    """Remember the latest 100 machines that asked for a boot script and are in no YAML."""
    row = tx.find(Status, UNKNOWN)
    seen = {**(row.data if row else {}), mac: tx.now}
    newest = dict(sorted(seen.items(), key=lambda item: item[1])[-100:])
    text = f"{len(newest)} machines that the YAML does not declare asked for a boot script"
    if row is None:
        tx.add(Status(UNKNOWN, text, tx.now, newest))
    elif mac not in row.data or tx.now - row.data[mac] > 60 * SECOND:
        tx.put(replace(row, text=text, at=tx.now, data=newest))

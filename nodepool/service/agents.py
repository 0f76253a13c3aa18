"""The agents' desk: who may boot into the agent, whose hello counts, what agents are told, what their reports do.

Wire format and meaning: doc/agent-protocol.rst.  A token is spent by the first hello; after that an agent proves itself
with the nonce that came with it.
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nodepool.clock import SECOND, micros
from nodepool.door import Call, Expected, Lines, Reply
from nodepool.errors import Code
from nodepool.model import Boot, BootState, Machine, Operation, OperationState, Record, Status
from nodepool.plan import Catalog
from nodepool.plan.board import Board
from nodepool.service import loading
from nodepool.service.moves import note
from nodepool.store import Store, Tx
from nodepool.store.engine import each

log = logging.getLogger("nodepool.agents")

VERSION = "1"
ATTEMPTS = 5  # at an answer that conflicts with what the launcher writes
SEEN_EVERY = 60.0  # seconds between two marks that a waiting agent is still there
REFUSALS = 1000  # different ones that are remembered, so that each is said once
UNKNOWN = "unknown-machines"
_OPEN = frozenset({OperationState.PENDING, OperationState.RUNNING})


class _Index:
    """The Board, and by token and id the newest boot of each machine: no other is known."""

    def __init__(self) -> None:
        self.board = Board()
        self.by_token: dict[str, Boot] = {}
        self.by_id: dict[int, Boot] = {}

    def fold(self, record: Record) -> None:
        """Take in a row that changed."""
        before = self.board.boots.get(record.machine_id) if isinstance(record, Boot) else None
        self.board.fold((record,))
        if isinstance(record, Boot):
            if before is not None and before.id != record.id:
                self.by_token.pop(before.token, None)
                self.by_id.pop(before.id, None)
            newest = self.board.boots[record.machine_id]
            self.by_token[newest.token] = self.by_id[newest.id] = newest


class Desk:
    """Answers agents (door.AgentDoor)."""

    def __init__(self, store: Store, catalog: Callable[[], Catalog]) -> None:
        self._store = store
        self._catalog = catalog
        self._feed = store.feed()
        self._index = _Index()
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
            board = self._index.board
            machine = board.named(spec.name)
            boot = board.boots.get(machine.id) if machine else None
        if board.frozen:
            return None  # its disk is safe, whoever uses the machine
        if machine is None or boot is None or boot.id != machine.boot_id or boot.state is not BootState.EXPECTED:
            return None
        return Expected(spec.name, boot.token)

    def hello(self, lines: Lines, peer: str) -> Reply:
        """Spend the token of a boot; the same agent may say hello again."""
        return self.together((Call("hello", lines, peer),))[0]

    def poll(self, lines: Lines, peer: str) -> Reply:
        """Take a report in, give the next order out."""
        return self.together((Call("poll", lines, peer),))[0]

    def together(self, calls: Sequence[Call]) -> list[Reply]:
        """Answer several agents in one transaction."""
        replies: dict[int, Reply] = {}
        for _ in range(ATTEMPTS):
            open_calls = [number for number in range(len(calls)) if number not in replies]
            if not open_calls:
                break
            self._refresh()
            answers = each(self._store, [self._use_case(calls[number]) for number in open_calls])
            # an answer that is a Conflict met the launcher on the same row: with the row's new version it will do
            replies |= {n: a for n, a in zip(open_calls, answers, strict=True) if isinstance(a, Reply)}
        for reply in replies.values():
            if reply.status != 200:
                self._say_once(reply)
        busy = Reply(503, {"error": "too busy to answer now", "wait": "2"})
        return [replies.get(number, busy) for number in range(len(calls))]

    def _use_case(self, call: Call) -> Callable[[Tx], Reply]:
        answer = self._hello if call.verb == "hello" else self._poll
        return lambda tx: answer(tx, call.lines, call.peer)

    def may_fetch(self, path: str, peer: str) -> bool:
        """The agent's own files for all (they hold no secret), an image only for a machine that is told to write it."""
        if path.startswith("agent/"):
            return True
        self._refresh()
        with self._lock:
            told = [
                operation
                for operation in self._index.board.operations.values()
                if operation.kind == "write" and operation.by_agent and operation.state in _OPEN
            ]
            boots = {boot.id: boot for boot in self._index.board.boots.values()}
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
            changes, whole = self._store.follow(self._feed, loading.board)
            index = self._index if whole else _Index()  # agents that are answered meanwhile see the whole old one
            frozen = bool(self._index.board.frozen)
            for record in changes:
                index.fold(record)
            thawed = frozen and not index.board.frozen
            self._index = index
            for record in index.board.operations.values() if thawed else changes:
                if isinstance(record, Operation) and record.by_agent and record.state is OperationState.PENDING:
                    self._work.add(record.boot_id or 0)

    def _say_once(self, reply: Reply) -> None:
        error = reply.lines.get("error", "")
        if len(self.refused) >= REFUSALS and error not in self.refused:
            self.refused.clear()  # they name addresses: whoever knocks could fill the memory
        self.refused[error] += 1
        if self.refused[error] == 1:
            log.warning("an agent was refused (%d): %s", reply.status, error)

    def _hello(self, tx: Tx, lines: Lines, peer: str) -> Reply:
        if lines.get("version") != VERSION:
            return Reply(426, {"error": f"this daemon speaks version {VERSION} of the agent's protocol; reboot"})
        token, nonce = lines.get("token", ""), lines.get("nonce", "")
        known = self._index.by_token.get(token)
        machine = self._index.board.machines.get(known.machine_id) if known is not None else None
        if known is None or machine is None or not 16 <= len(nonce) <= 64:
            return Reply(403, {"error": f"the token of the agent at {peer} is not known here: foreign or long over"})
        return self._spend(tx, tx.latest(known), tx.latest(machine), lines, peer)

    def _spend(self, tx: Tx, boot: Boot, machine: Machine, lines: Lines, peer: str) -> Reply:
        """The first hello spends the token; with another nonce it is somebody else's."""
        nonce = lines["nonce"]
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
        if self._index.board.frozen:
            return Reply(200, {"wait": "0"})
        if current is not None and current.by_agent and current.state in _OPEN and current.boot_id == boot.id:
            return Reply(200, {"operation": str(current.id), "kind": current.kind, **_strings(current.params)})
        return Reply(200, {"wait": "0"})

    def _boot(self, tx: Tx, lines: Lines) -> Boot | None:
        number, nonce = lines.get("boot", ""), lines.get("nonce", "")
        known = self._index.by_id.get(int(number)) if number.isdecimal() and len(number) < 19 else None
        boot = tx.latest(known) if known is not None else None
        if boot is None or boot.state is not BootState.UP or not hmac.compare_digest(boot.nonce, nonce):
            return None
        return boot

    def _operation(self, tx: Tx, boot: Boot) -> Operation | None:
        """The newest operation of the boot's machine, the only one that an agent may work at."""
        known = self._index.board.operations.get(boot.machine_id)
        return tx.latest(known) if known is not None and known.boot_id == boot.id else None


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

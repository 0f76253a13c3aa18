"""The agent of a simulated machine: doc/agent-protocol.rst from the machine's side, its work in seconds as told.

It fetches the whole image by Range requests and hashes it; what it erases, writes and configures is the machine's one
`System`, in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import uuid4

from nodepool.rack.simulated.login import System
from nodepool.rack.simulated.web import Web, WebError

if TYPE_CHECKING:
    from nodepool.rack.simulated.machine import SimulatedMachine

VERSION = "1"
REPORT_EVERY = 5.0  # seconds between reports on work that goes on
AGAIN = 2.0  # seconds until the agent tries again when there was no answer
UNKNOWN = 30.0  # seconds until an agent that is not known asks again
PATIENCE = 120.0  # seconds a broken transfer is tried anew before it has failed
TICKS = 20  # how often a phase moves its meter

Lines = dict[str, str]

_CODES = {"erase": "disk-erase", "write": "disk-write"}  # what a phase that is told to fail reports


class Failed(Exception):
    """An operation has failed: the code and the sentence that are reported."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(slots=True)
class _Work:
    """The operation that is carried out or whose last report was not heard yet."""

    id: str
    order: Mapping[str, str]
    done: int = 0
    total: int = 0
    task: asyncio.Task[Lines] | None = None

    def report(self) -> Lines:
        """What is said of it now."""
        if self.task is not None and self.task.done():
            return {"operation": self.id, **self.task.result()}
        counts = {"done": str(self.done), "total": str(self.total)}
        return {"operation": self.id, "state": "running", "phase": self.order["kind"], **counts}


@dataclass(slots=True)
class Agent:
    """One boot of the agent on `machine`; `run` it once."""

    machine: SimulatedMachine
    web: Web
    url: str
    token: str
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    results: dict[str, Lines] = field(default_factory=dict)  # the last report of each operation that has ended
    boot: str = ""

    async def run(self) -> str:
        """From hello until it leaves the machine to the system on the disk: by `reboot` or `kexec`."""
        if not await self._hello():
            return "reboot"
        work: _Work | None = None
        try:
            while True:
                said = work.report() if work else {}
                status, answer = await self.web.post(
                    f"{self.url}/agent/v1/poll", {"boot": self.boot, "nonce": self.nonce, **said}
                )
                if status == 403:
                    await self._silent(answer)
                if status != 200:
                    await asyncio.sleep(_seconds(answer, AGAIN))
                    continue
                if work and said.get("state") == "done" and work.order["kind"] == "start":
                    await self.machine.phase("start")
                    return work.order.get("method", "reboot")
                work = await self._obey(work, said, answer)
        finally:
            if work and work.task:
                work.task.cancel()
                await asyncio.wait([work.task])

    async def _hello(self) -> bool:
        """Say hello until it is heard; False when this version is not served any more."""
        lines = {"version": VERSION, "token": self.token, "nonce": self.nonce, "agent_boot_id": str(uuid4())}
        while True:
            status, answer = await self.web.post(f"{self.url}/agent/v1/hello", {**lines, **self.machine.spec.facts})
            if status == 200:
                self.boot = answer["boot"]
                self.machine.say(f"agent: known as boot {self.boot}")
                return True
            if status == 409:
                await self._silent(answer)
            if status == 426:
                return False
            self.machine.say(f"agent: hello was not heard: {status} {answer.get('error', '')}")
            await asyncio.sleep(UNKNOWN if status == 403 else _seconds(answer, AGAIN))

    async def _silent(self, answer: Lines) -> None:
        """This boot is over: nothing more until the power is taken away."""
        self.machine.say(f"agent: silent from now on: {answer.get('error', '')}")
        await asyncio.Event().wait()

    async def _obey(self, work: _Work | None, said: Lines, answer: Lines) -> _Work | None:
        """Do what an answer says, as far as it is done at once; the work that is to be reported on next."""
        if "cancel" in answer and work and work.task:
            work.task.cancel()
            await asyncio.wait([work.task])
            return None
        if work and said.get("state") in ("done", "failed"):
            self.results[work.id] = work.task.result() if work.task else {}
            work = None
        if "operation" in answer and (work is None or work.id != answer["operation"]):
            work = self._begin(answer)
        if work and work.task:
            await asyncio.wait([work.task], timeout=REPORT_EVERY)
        elif not work:
            await asyncio.sleep(_seconds(answer, 0.0))
        return work

    def _begin(self, answer: Lines) -> _Work:
        """Start on an order; one that was carried out before is only reported again."""
        work = _Work(answer["operation"], answer)
        known = self.results.get(work.id)
        work.task = asyncio.create_task(self._carry_out(work) if known is None else _at_once(known))
        return work

    async def _carry_out(self, work: _Work) -> Lines:
        """The last report on an order."""
        kind = work.order.get("kind", "")
        operations: dict[str, Callable[[_Work], Awaitable[Lines]]] = {
            "erase": self._erase,
            "write": self._write,
            "configure": self._configure,
            "start": self._start,
        }
        try:
            if kind not in operations:
                raise Failed("agent-error", f"this agent does not know the operation {kind}")
            self.machine.say(f"agent: {kind}")
            if kind in self.machine.faults.hang:
                await asyncio.Event().wait()
            if kind in self.machine.faults.fail:
                await self._meter(work, 1, self.machine.spec.seconds[kind] / 2)
                code = "kexec-failed" if work.order.get("method") == "kexec" else _CODES.get(kind, "agent-error")
                raise Failed(code, f"{kind} was told to fail on {self.machine.spec.name}")
            result = await operations[kind](work)
        except Failed as error:
            self.machine.say(f"agent: {kind} failed: {error}")
            return {"state": "failed", "code": error.code, "error": str(error)}
        return {"state": "done", **{f"result.{key}": value for key, value in result.items()}}

    async def _meter(self, work: _Work, total: int, seconds: float) -> None:
        """Let `seconds` pass while `done` goes from where it is to `total`."""
        work.total, before = total, work.done
        steps = TICKS if seconds > TICKS * 0.05 else 1
        for step in range(1, steps + 1):
            await asyncio.sleep(seconds / steps)
            work.done = before + (total - before) * step // steps

    async def _erase(self, work: _Work) -> Lines:
        level = work.order.get("level", "default")
        if level != "default":
            raise Failed("agent-error", f"this agent does not know the erase level {level}")
        await self._meter(work, 2 * self.machine.spec.disk, self.machine.spec.seconds["erase"])
        self.machine.disk = None
        return {"disks": "vda", "method.vda": "blkdiscard"}

    async def _write(self, work: _Work) -> Lines:
        order, disk = work.order, self.machine.spec.disk
        self._check_device(order)
        size = int(order["size"])
        if order.get("encoding", "raw") != "raw":
            raise Failed("agent-error", "a simulated machine takes raw images alone: formats: [raw]")
        if max(size, int(order.get("min_size") or 0)) > disk:
            raise Failed("disk-too-small", f"vda has {disk} bytes; the image needs {size}")
        began = time.monotonic()
        self.machine.disk = None
        found = await self._fetch(work, order["url"], size)
        if found != order["sha256"].lower():
            raise Failed(
                "image-altered", f"the image from the server has the sha256 {found}; {order['sha256']} was told"
            )
        left = self.machine.spec.seconds["write"] - (time.monotonic() - began)
        await self._meter(work, 2 * size, max(0.0, left))
        self.machine.disk = System()
        return {"sha256": found, "written": str(size)}

    async def _fetch(self, work: _Work, url: str, size: int) -> str:
        """Fetch all of the image; its sha256."""
        digest, until = hashlib.sha256(), time.monotonic() + PATIENCE
        work.total = 2 * size
        while work.done < size:
            try:
                async for piece in self.web.pieces(url, work.done, size):
                    digest.update(piece)
                    work.done, until = work.done + len(piece), time.monotonic() + PATIENCE
            except WebError as error:
                if error.status == 206:
                    raise Failed("image-altered", str(error)) from error
                if 200 <= error.status < 500 or time.monotonic() > until:
                    raise Failed("transfer", str(error)) from error
                await asyncio.sleep(AGAIN)
        return digest.hexdigest()

    async def _configure(self, work: _Work) -> Lines:
        order = work.order
        self._check_device(order)
        if self.machine.disk is None:
            raise Failed("image-unreadable", "no partition of vda holds a system (a file system with etc/passwd)")
        await self._meter(work, 1, self.machine.spec.seconds["configure"])
        system = System.configured(order["hostname"], order.get("user") or "root", order["authorized_keys"])
        self.machine.disk = system
        return {"host_key": system.host_key}

    async def _start(self, work: _Work) -> Lines:
        self._check_device(work.order)
        if work.order.get("method") not in ("reboot", "kexec"):
            raise Failed("agent-error", f"this agent does not know the start method {work.order.get('method')}")
        if self.machine.disk is None:
            raise Failed("image-unreadable", "there is no system on vda")
        return {}

    def _check_device(self, order: Mapping[str, str]) -> None:
        if order.get("device") != "vda":
            raise Failed("disk-missing", f"this machine has no disk {order.get('device')}; it has vda")


async def _at_once(report: Lines) -> Lines:
    return report


def _seconds(answer: Lines, default: float) -> float:
    """The answer's `wait`."""
    text = answer.get("wait", "")
    return float(text) if text.isdecimal() else default

"""A simulated machine: power, firmware that boots from the network or the disk, and what is on its disk.

It is what a BMC of `bmc.py` switches.  While it has power one task lives its life: self test, network boot as iPXE
does it, the agent, the system on the disk; taking the power away cancels that task, wherever it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import deque

from nodepool.rack.faults import NO_FAULTS, Faults
from nodepool.rack.simulated.agent import Agent
from nodepool.rack.simulated.login import System
from nodepool.rack.simulated.spec import SimulatedSpec
from nodepool.rack.simulated.web import Web, WebError

log = logging.getLogger("nodepool.rack")

AGAIN = 1.0  # seconds until firmware that found nothing to boot goes through its boot order anew
CONSOLE_LINES = 100

_CHAIN = re.compile(r"^chain (?:--replace )?(\S+)", re.MULTILINE)
_SLEEP = re.compile(r"^sleep (\d+)", re.MULTILINE)
_KERNEL = re.compile(r"^kernel (\S+) (.*?)(?: \|\|.*)?$", re.MULTILINE)
_INITRD = re.compile(r"^initrd (\S+)", re.MULTILINE)


class SimulatedMachine:
    """The rack's `Machine` for simulated hardware.  One loop owns it; `faults` may be changed at any time."""

    pid: int | None = None  # it is no process of its own

    def __init__(self, spec: SimulatedSpec) -> None:
        self.spec = spec
        self.faults: Faults = NO_FAULTS
        self.firmware_boots = 0  # power-ons, resets and reboots; a kexec is none
        self.disk: System | None = None  # the system that is installed
        self._started = 0.0
        self._life: asyncio.Task[None] | None = None
        self._console: deque[str] = deque(maxlen=CONSOLE_LINES)

    @property
    def uptime(self) -> float:
        """Seconds since the power went on; 0 while it is off."""
        return time.monotonic() - self._started if self.is_on() else 0.0

    def is_on(self) -> bool:
        """Whether there is power."""
        return self._life is not None

    async def power_on(self, boot: str | None, *, once: bool = True) -> None:
        """Start, from `boot` first."""
        if self._life is None:
            self.say(f"power on, boot {boot or 'by default order'}")
            self._started = time.monotonic()
            self._begin(boot, once)

    async def power_off(self) -> None:
        """Take the power away; what was installed stays on the disk."""
        if self._life is not None:
            await self._end()
            self._life = None
            self.say("power is off")

    async def reset(self, boot: str | None, *, once: bool = True) -> None:
        """Press the reset button."""
        await self._end()
        self.say(f"reset, boot {boot or 'by default order'}")
        self._begin(boot, once)

    async def press_button(self) -> None:
        """Shut down: nothing here takes longer for being asked."""
        await self.power_off()

    def console_tail(self, lines: int = 10) -> list[str]:
        """The last lines of the console."""
        return list(self._console)[-lines:]

    def say(self, sentence: str) -> None:
        """A line on the console."""
        self._console.append(f"{self.spec.name}: {sentence}")

    async def phase(self, name: str) -> None:
        """Let a phase pass that nobody can report on; where it is told to fail the machine hangs, as real ones do."""
        if name in self.faults.fail or name in self.faults.hang:
            self.say(f"{name}: halted")
            await asyncio.Event().wait()
        self.say(name)
        await asyncio.sleep(self.spec.seconds[name])

    def _begin(self, boot: str | None, once: bool) -> None:
        self._life = asyncio.create_task(self._live(boot, once), name=self.spec.name)
        self._life.add_done_callback(self._died)

    async def _end(self) -> None:
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])

    def _died(self, life: asyncio.Task[None]) -> None:
        if not life.cancelled() and (error := life.exception()):
            self.say(f"halted: {error!r}")
            log.error("%s halted", self.spec.name, exc_info=error)

    async def _live(self, first: str | None, once: bool) -> None:
        """From power-on until the power is taken away; `first` comes before the machine's own order."""
        while True:
            self.firmware_boots += 1
            await self.phase("firmware")
            how = await self._boot(first)
            first = None if once else first
            if how != "reboot" and self.disk is not None:
                await self.phase("system")
                self.say(f"{self.disk.hostname} is up, by {how}")
                await self.disk.run(self.spec.ip, self.spec.ssh_port)
            self.say("reboot")

    async def _boot(self, first: str | None) -> str:
        """Go through the boot order (disk, then network) until something starts: disk, or how an agent has ended."""
        while True:
            if first == "pxe" or self.disk is None:
                method = await self._from_network()
                if method is not None:
                    return method
            if self.disk is not None:
                return "disk"
            await asyncio.sleep(AGAIN)

    async def _from_network(self) -> str | None:
        """Boot from the network; how the agent left the machine (reboot | kexec), None when it is to boot its disk."""
        async with Web(self.spec.ip) as web:
            words = await self._chain(web)
            if words is None:
                return None
            await self.phase("ramdisk")
            return await Agent(self, web, words["nodepool.url"], words["nodepool.token"]).run()

    async def _chain(self, web: Web) -> dict[str, str] | None:
        """What iPXE does: the first script, the script of this machine, kernel and ramdisk; the kernel's words."""
        with contextlib.suppress(WebError):
            first = await web.get(f"{self.spec.url}/boot.ipxe")
            chain, pause = _CHAIN.search(first), _SLEEP.search(first)
            if chain is None:
                return None
            while True:
                with contextlib.suppress(WebError):
                    script = await web.get(chain[1].replace("${netX/mac}", self.spec.mac))
                    kernel, initrd = _KERNEL.search(script), _INITRD.search(script)
                    if kernel is None or initrd is None:
                        self.say("nobody expects a network boot: booting from disk")
                        return None
                    await web.get(kernel[1])
                    await web.get(initrd[1])
                    return dict(word.partition("=")[::2] for word in kernel[2].split())
                self.say("no answer from the boot server: asking again")
                await asyncio.sleep(int(pause[1]) if pause else AGAIN)
        return None

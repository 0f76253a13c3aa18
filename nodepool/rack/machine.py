"""A QEMU machine behind a BMC: power, boot order, console.

The boot order is the machine's own (disk, then network) unless the BMC says otherwise; a one-shot device comes first
for this one boot and is put back before the guest can reboot, so that its own reboot comes up from the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from nodepool.clock import SystemClock, rfc3339
from nodepool.rack import RackError
from nodepool.rack.accel import Accelerator
from nodepool.rack.qmp import Qmp

GIB = 1 << 30
PATTERN = 0xAA  # what a disk that ignores discard is filled with: old data that must not survive an erase
START_SECONDS = 60.0  # a loaded host takes its time to start a QEMU
QUIT_SECONDS = 2.0
SETTLE_SECONDS = (
    1.0  # a restart may be several resets in a row: SeaBIOS resets again when it finds itself in used memory
)
OVMF = Path("/usr/share/OVMF")

_NET_FIRST, _DISK_FIRST = {"net0": 1, "disk0": 2}, {"disk0": 1, "net0": 2}
_ESCAPES = re.compile(rb"\x1b(\[[0-9;?=]*[A-Za-z]|[c78=>])|[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A disk: its size in bytes; one that ignores discard keeps its old bytes and starts full of them."""

    size: int = 4 * GIB
    ignores_discard: bool = False


@dataclass(frozen=True, slots=True)
class QemuSpec:
    """A machine's hardware.  `folder` holds disks and console; `tap` is a network interface that exists."""

    name: str
    uuid: UUID
    mac: str
    tap: str
    folder: Path
    memory: int = 512  # MiB
    firmware: str = "bios"  # or "uefi"
    disks: tuple[DiskSpec, ...] = (DiskSpec(),)

    @property
    def console(self) -> Path:
        """The log of the serial port, all power-ons one after the other."""
        return self.folder / "console.log"

    def disk_path(self, number: int) -> Path:
        """Where disk `number` (from 0) keeps its bytes."""
        return self.folder / f"disk{number}.raw"


class QemuMachine:
    """The rack's `Machine` for QEMU.  One loop owns it; QEMU ends with the process that started it."""

    def __init__(self, spec: QemuSpec, accelerator: Accelerator) -> None:
        self.spec = spec
        self.firmware_boots = 0  # power-ons and resets, the guest's own reboots included
        self.started = 0.0
        self._accelerator = accelerator
        self._process: asyncio.subprocess.Process | None = None
        self._monitor: Qmp | None = None
        self._ended: asyncio.Task[None] | None = None
        self._reset_seen = asyncio.Event()
        self._reset_at = 0.0
        self._settling: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """QEMU's process id while there is power."""
        return self._process.pid if self._process and self.is_on() else None

    @property
    def uptime(self) -> float:
        """Seconds since the power went on; 0 while it is off."""
        return time.monotonic() - self.started if self.is_on() else 0.0

    def is_on(self) -> bool:
        """Whether QEMU runs."""
        return self._process is not None and self._process.returncode is None

    async def power_on(self, boot: str | None, *, once: bool = True) -> None:
        """Start QEMU with `boot` first; RackError with QEMU's own words when it does not start."""
        if self.is_on():
            return
        await self._clean_up()
        self._mark(f"power on, boot {boot or 'by default order'}")
        ours, theirs = socket.socketpair()
        errors = self.spec.folder / "qemu.log"
        command = command_line(self.spec, self._accelerator, _order(boot), theirs.fileno())
        try:
            with theirs, errors.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *("setpriv", "--pdeathsig", "KILL", *command),
                    pass_fds=(theirs.fileno(),),
                    cwd=self.spec.folder,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            async with asyncio.timeout(START_SECONDS):
                self._monitor = await Qmp.open(ours, self._on_event)
                await self._set_order(_NET_FIRST if boot == "pxe" and not once else _DISK_FIRST)
                await self._monitor.execute("cont")
        except (RackError, TimeoutError, OSError) as error:
            ours.close()
            await self._kill()
            await self._clean_up()
            said = errors.read_text(errors="replace").strip().splitlines() if errors.exists() else []
            raise RackError(f"QEMU did not start: {said[-1] if said else error}") from error
        self.firmware_boots += 1
        self._reset_at = 0.0
        self.started = time.monotonic()
        self._ended = asyncio.create_task(self._watch(self._process, self._monitor))

    async def power_off(self) -> None:
        """Take the power away: QEMU quits, or is killed when it does not at once."""
        if self._monitor and self.is_on():
            with contextlib.suppress(RackError, TimeoutError, OSError):
                async with asyncio.timeout(QUIT_SECONDS):
                    await self._monitor.execute("quit")
                    await self._process_of().wait()
        await self._kill()
        await self._clean_up()

    async def reset(self, boot: str | None, *, once: bool = True) -> None:
        """Press the reset button."""
        monitor = self._monitor_of()
        await self._stop_settling()
        self._mark(f"reset, boot {boot or 'by default order'}")
        await self._set_order(_order(boot))
        self._reset_seen.clear()
        await monitor.execute("system_reset")
        async with asyncio.timeout(START_SECONDS):
            await self._reset_seen.wait()
        if boot == "pxe" and once:
            self._settling = asyncio.create_task(self._settle())

    async def press_button(self) -> None:
        """Ask the guest by ACPI to shut down; when it does, QEMU ends."""
        await self._monitor_of().execute("system_powerdown")

    def console_tail(self, lines: int = 10) -> list[str]:
        """The last lines of the console, without terminal control."""
        with contextlib.suppress(FileNotFoundError), self.spec.console.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 200 * lines))
            text = _ESCAPES.sub(b"", log.read()).decode(errors="replace")
            return [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()][-lines:]
        return []

    def _mark(self, what: str) -> None:
        """A line of our own in the console's log, so that one can tell the boots apart."""
        with self.spec.console.open("a") as log:
            log.write(f"\n--- rack: {self.spec.name} {what}, {rfc3339(SystemClock().now())} ---\n")

    def _on_event(self, name: str, _data: Mapping[str, Any]) -> None:
        if name == "RESET":
            self.firmware_boots += time.monotonic() - self._reset_at > SETTLE_SECONDS
            self._reset_at = time.monotonic()
            self._reset_seen.set()

    async def _settle(self) -> None:
        """Put the machine's own order back once the last of a row of resets has read the one-shot order."""
        with contextlib.suppress(TimeoutError):
            while True:
                self._reset_seen.clear()
                async with asyncio.timeout(SETTLE_SECONDS):
                    await self._reset_seen.wait()
        with contextlib.suppress(RackError):
            await self._set_order(_DISK_FIRST)

    async def _stop_settling(self) -> None:
        if self._settling:
            self._settling.cancel()
            await asyncio.wait([self._settling])
            self._settling = None

    async def _set_order(self, order: Mapping[str, int]) -> None:
        """Change the boot order; the firmware sees it at the next reset.  Two devices never share an index."""
        monitor = self._monitor_of()
        for index in (dict.fromkeys(order, -1), order):
            for device, place in index.items():
                await monitor.execute(
                    "qom-set", path=f"/machine/peripheral/{device}", property="bootindex", value=place
                )

    async def _watch(self, process: asyncio.subprocess.Process, monitor: Qmp) -> None:
        await process.wait()
        await monitor.close()
        self._mark("power is off")

    async def _kill(self) -> None:
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _clean_up(self) -> None:
        await self._stop_settling()
        if self._ended:
            await self._ended
        elif self._monitor:
            await self._monitor.close()
        self._ended = self._monitor = self._process = None

    def _monitor_of(self) -> Qmp:
        if self._monitor is None:
            raise RackError(f"{self.spec.name} is off")
        return self._monitor

    def _process_of(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process


def _order(boot: str | None) -> Mapping[str, int]:
    return _NET_FIRST if boot == "pxe" else _DISK_FIRST


def command_line(spec: QemuSpec, accelerator: Accelerator, order: Mapping[str, int], monitor: int) -> list[str]:
    """QEMU's command line: stopped before its first instruction, its monitor on descriptor `monitor`."""
    machine = "q35,smm=off" if spec.firmware == "uefi" else "pc,graphics=off,smm=off"
    command = ["qemu-system-x86_64", *accelerator.arguments, "-name", spec.name, "-uuid", str(spec.uuid)]
    command += ["-machine", machine, "-m", str(spec.memory), "-smp", "1", "-nodefaults", "-display", "none", "-S"]
    if spec.firmware == "uefi":
        command += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={OVMF}/OVMF_CODE_4M.fd"]
        command += ["-drive", "if=pflash,unit=1,format=raw,file=nvram.fd"]
    command += ["-netdev", f"tap,id=n0,ifname={spec.tap},script=no,downscript=no"]
    command += ["-device", f"virtio-net-pci,netdev=n0,mac={spec.mac},id=net0,bootindex={order['net0']}"]
    for number, disk in enumerate(spec.disks):
        discard = "discard=ignore,detect-zeroes=off" if disk.ignores_discard else "discard=unmap"
        command += ["-drive", f"file=disk{number}.raw,if=none,id=d{number},format=raw,cache=unsafe,{discard}"]
        index = f",bootindex={order['disk0']}" if number == 0 else ""
        serial = f"{spec.name}-disk{number}"
        command += ["-device", f"virtio-blk-pci,drive=d{number},id=disk{number},serial={serial}{index}"]
    command += ["-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=r0"]
    command += ["-chardev", "socket,id=ser0,path=console.sock,server=on,wait=off,logfile=console.log,logappend=on"]
    command += [
        "-serial",
        "chardev:ser0",
        "-chardev",
        f"socket,id=qmp,fd={monitor}",
        "-mon",
        "chardev=qmp,mode=control",
    ]
    return command


def make_folder(spec: QemuSpec, progress: Callable[[str], None]) -> None:
    """Make what the machine needs before its first power-on: folder, disks that are missing, UEFI's variables."""
    spec.folder.mkdir(parents=True, exist_ok=True)
    for number, disk in enumerate(spec.disks):
        path = spec.disk_path(number)
        if path.exists() and path.stat().st_size == disk.size:
            continue
        if disk.ignores_discard:
            progress(f"filling {path} with {PATTERN:#x}: {disk.size / GIB:.1f} GiB")
        _make_disk(path, disk)
    if spec.firmware == "uefi" and not (spec.folder / "nvram.fd").exists():
        shutil.copyfile(OVMF / "OVMF_VARS_4M.fd", spec.folder / "nvram.fd")


def _make_disk(path: Path, disk: DiskSpec) -> None:
    """Sparse, or full of `PATTERN`; under another name until it is whole."""
    part = path.with_suffix(".part")
    block = bytes((PATTERN,)) * (8 << 20)
    with part.open("wb") as file:
        if disk.ignores_discard:
            for start in range(0, disk.size, len(block)):
                file.write(block[: disk.size - start])
        file.truncate(disk.size)
    part.rename(path)

"""The rack from outside: bring it up, take it down, ask it, break it.

Each rack lives in a folder: `rack.json`, a folder per machine, the socket of its server.  `up` and `down` exclude one
another by a lock on that folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nodepool.rack import RackError, accel, inventory, network
from nodepool.rack.inventory import Wish
from nodepool.rack.machine import GIB, OVMF, QemuSpec, make_folder
from nodepool.rack.server import PID_FILE, SOCKET
from nodepool.rack.simulated import rack as simulated_rack

Progress = Callable[[str], None]

START_SECONDS, STOP_SECONDS, ANSWER_SECONDS = 30.0, 15.0, 10.0
OVERHEAD_MIB = 400  # what a QEMU under tcg needs beside its guest's memory
_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setsid": "util-linux",
    "setpriv": "util-linux",
}


def up(folder: Path, wish: Wish, progress: Progress, kernels: Iterable[Path] = ()) -> dict[str, Any]:
    """Make the rack that is wished for in `folder` and start it; what rack.json says.

    Does nothing when that rack is up.  `kernels` may be booted to see whether kvm works.  RackError with the remedy
    when something is missing; nothing is left behind then.
    """
    folder = folder.resolve()
    specs = wish.specs(folder)
    _require_root()
    _check_tools(wish)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        if _answers(folder):
            return _same_or_refuse(folder, specs)
        _clear(folder)
        _check_memory(wish)
        _check_space(folder, specs)
        accelerator = accel.choose(folder, kernels)
        progress(f"accelerator {accelerator.name}: {accelerator.reason}")
        for spec in specs:
            make_folder(spec, progress)
        rack = inventory.describe(folder, specs, accelerator)
        network.create(rack["namespace"], [spec.tap for spec in specs])
        try:
            inventory.write(folder, rack)
            _start_server(folder, rack["namespace"])
        except BaseException:
            _clear(folder)
            raise
        progress(f"{len(specs)} machine(s) in network namespace {rack['namespace']}, BMCs from 127.0.0.11 port 623 on")
        return rack


def up_simulated(folder: Path, rack: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Start simulated machines as `simulated.rack.describe` has them; what rack.json says.  Needs no root.

    Does nothing when that rack is up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        if _answers(folder):
            running = inventory.read(folder)
            if not simulated_rack.alike(running, rack):
                raise _another(folder)
            return running
        _clear(folder)
        inventory.write(folder, rack)
        try:
            _start_server(folder, "")
        except BaseException:
            _clear(folder)
            raise
        first = rack["machines"][0]["bmc"]
        progress(f"{len(rack['machines'])} simulated machine(s), BMCs from {first['host']} port {first['port']} on")
        return rack


def down(folder: Path, progress: Progress, *, keep_disks: bool = False) -> None:
    """Power all off, end the server, remove the namespace and, unless told to keep them, the disks.

    Works when the server hangs or was killed.  Logs, console logs and what the accelerator's probe said stay.
    """
    folder = folder.resolve()
    if not simulated_rack.is_simulated_in(folder):
        _require_root()
    if not folder.is_dir():
        raise RackError(f"there is no rack in {folder}")
    with _lock(folder):
        strangers = _clear(folder)
        if strangers:
            progress(f"still in the rack's network, which ends with them: processes {', '.join(map(str, strangers))}")
        if not keep_disks:
            for path in (*folder.glob("n*/disk*.raw"), *folder.glob("n*/disk*.part"), *folder.glob("n*/nvram.fd")):
                path.unlink()
        progress("the rack is down" + (", its disks are kept" if keep_disks else ""))


def status(folder: Path, lines: int = 1) -> list[dict[str, Any]]:
    """Each machine: name, power, boot, pid, uptime (s), firmware_boots, sessions, faults, last_error, console."""
    answer: list[dict[str, Any]] = ask(folder, {"do": "status", "lines": lines})
    return answer


def fault(folder: Path, machine: str, texts: Sequence[str], *, clear: bool = False) -> list[str]:
    """Set faults of a machine's BMC (`NAME[=VALUE]` each), after clearing all when `clear`; those now in force."""
    answer: list[str] = ask(folder, {"do": "fault", "machine": machine, "set": list(texts), "clear": clear})
    return answer


def ask(folder: Path, request: dict[str, Any]) -> Any:
    """One question to the rack's server; RackError when it does not answer or says no."""
    inventory.read(folder)
    try:
        with socket.socket(socket.AF_UNIX) as connection, _directory(folder) as descriptor:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(f"/proc/self/fd/{descriptor}/{SOCKET}")  # short, however long the folder's path is
            connection.sendall(json.dumps(request).encode() + b"\n")
            reply = json.loads(connection.makefile().readline())
    except (OSError, ValueError):
        raise RackError(f"the rack in {folder} is not up: `nodepool-rack up --dir {folder}`") from None
    if "error" in reply:
        raise RackError(reply["error"])
    return reply["ok"]


def _answers(folder: Path) -> bool:
    with contextlib.suppress(RackError):
        return bool(status(folder))
    return False


def _same_or_refuse(folder: Path, specs: list[QemuSpec]) -> dict[str, Any]:
    rack = inventory.read(folder)
    if [inventory.spec_of(folder, machine) for machine in rack["machines"]] != specs:
        raise _another(folder)
    return rack


def _another(folder: Path) -> RackError:
    return RackError(f"another rack is up in {folder}: `nodepool-rack down --dir {folder}`, or take another --dir")


def _start_server(folder: Path, namespace: str) -> None:
    """Start the server inside the namespace (none: here), detached from us, and wait for its word."""
    reader, writer = os.pipe()
    inside = ["nsenter", f"--net=/run/netns/{namespace}"] if namespace else []
    server = [sys.executable, "-m", "nodepool.rack.server", str(folder), str(writer)]
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        with (folder / "server.log").open("ab") as log:
            subprocess.run(
                ["setsid", "--fork", *inside, *server],
                pass_fds=(writer,),
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
            )
        os.close(writer)
        writer = -1
        readable, _, _ = select.select([reader], [], [], START_SECONDS)
        said = os.read(reader, 4096).decode().strip() if readable else "it did not answer in time"
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    if said != "up":
        raise RackError(f"the rack did not start: {said or 'it ended at once'} (see {folder / 'server.log'})")


def _clear(folder: Path) -> list[int]:
    """End what is left of a rack in `folder`, server and network; the processes in its network that are not ours.

    The server powers its machines off when asked to end, and they die with it when it has to be killed or was.
    """
    namespace = network.namespace_of(folder)
    with contextlib.suppress(OSError, ValueError):
        _end(int((folder / PID_FILE).read_text()), (b"nodepool.rack.server", os.fsencode(folder)), STOP_SECONDS)
    for pid in network.processes(namespace):
        _end(pid, (b"qemu-system-x86_64",), 0)
    strangers = network.processes(namespace)
    network.remove(namespace)
    for name in (inventory.FILE, SOCKET, PID_FILE):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("n*/console.sock"):
        path.unlink()
    return strangers


def _end(pid: int, words: tuple[bytes, ...], patience: float) -> None:
    """End a process by SIGTERM and, after `patience` seconds, SIGKILL; only when its command line has all `words`.

    Returns when it is gone.
    """
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if not all(word in command for word in words):
                return  # the number belongs to another process by now
            for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, STOP_SECONDS)):
                signal.pidfd_send_signal(handle, number)
                if select.select([handle], [], [], seconds)[0]:
                    return
        finally:
            os.close(handle)


def _check_tools(wish: Wish) -> None:
    missing = sorted({package for tool, package in _TOOLS.items() if not shutil.which(tool)})
    if "uefi" in wish.firmware and not (OVMF / "OVMF_CODE_4M.fd").exists():
        missing.append("ovmf")
    if missing:
        raise RackError(f"the rack needs more packages: apt-get install {' '.join(missing)}")
    if not Path("/dev/net/tun").exists():
        raise RackError("the rack needs tap interfaces and /dev/net/tun is missing: modprobe tun")
    if not 1 <= wish.machines <= inventory.MOST_MACHINES:
        raise RackError(f"a rack has 1 to {inventory.MOST_MACHINES} machines, not {wish.machines}")


def _check_memory(wish: Wish) -> None:
    needed = wish.machines * (wish.memory + OVERHEAD_MIB)
    available = _available_mib()
    if needed > available:
        raise RackError(
            f"{wish.machines} machine(s) of {wish.memory} MiB need {needed} MiB of memory and {available} are "
            "available: take fewer (--machines) or smaller ones (--memory)"
        )


def _check_space(folder: Path, specs: list[QemuSpec]) -> None:
    paths = {spec.disk_path(number): disk.size for spec in specs for number, disk in enumerate(spec.disks)}
    needed = sum(size - (path.stat().st_blocks * 512 if path.exists() else 0) for path, size in paths.items())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RackError(
            f"the disks of the rack need {needed / GIB:.1f} GiB in {folder} and {free / GIB:.1f} are free: "
            "free some, take --disk-size, or another --dir"
        )


def _available_mib() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) // 1024


def _require_root() -> None:
    if os.geteuid() != 0:
        raise RackError("the rack makes network namespaces and tap interfaces and needs root: run it with sudo")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with _directory(folder) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def _directory(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

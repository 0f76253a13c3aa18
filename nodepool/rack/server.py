"""The rack's one process: all BMCs, all machines, and a Unix socket through which `nodepool-rack` asks and tells.

Runs as `python -m nodepool.rack.server FOLDER DESCRIPTOR`, for QEMU machines inside the rack's network namespace; says
"up" or why not on DESCRIPTOR.  Its QEMUs die with it.  On the socket: one JSON object per line each way, {"do":
"status" | "fault", ...} answered by {"ok": ...} or {"error": sentence}.  SIGTERM ends it all.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodepool.rack import RackError, inventory
from nodepool.rack.accel import Accelerator
from nodepool.rack.bmc import Bmc, User, serve
from nodepool.rack.faults import NO_FAULTS
from nodepool.rack.machine import QemuMachine
from nodepool.rack.simulated import rack as simulated_rack

if TYPE_CHECKING:
    from nodepool.rack.simulated.machine import SimulatedMachine

SOCKET, PID_FILE = "rack.sock", "server.pid"  # relative: a Unix socket's path holds 107 bytes
_log = logging.getLogger("nodepool.rack")


class Rack:
    """The machines of one rack, each with its BMC."""

    def __init__(self, folder: Path) -> None:
        rack = inventory.read(folder)
        make = _maker(folder, rack)
        self.places: list[tuple[Bmc, str, int]] = []
        self.machines: dict[str, tuple[QemuMachine | SimulatedMachine, Bmc]] = {}
        for entry in rack["machines"]:
            machine = make(entry)
            place = entry["bmc"]
            bmc = Bmc(machine, {place["username"]: User(place["password"])}, machine.spec.uuid)
            self.places.append((bmc, place["host"], place["port"]))
            self.machines[entry["name"]] = (machine, bmc)
        self.done = asyncio.Event()

    def answer(self, request: Mapping[str, Any]) -> Any:
        """Do what the line asks; RackError says why not."""
        if request.get("do") == "status":
            return [self._status(name, int(request.get("lines", 1))) for name in self.machines]
        if request.get("do") == "fault":
            return self._fault(request)
        raise RackError(f"the rack does not understand {request.get('do')!r}")

    async def power_off(self) -> None:
        """Take the power away from all machines."""
        await asyncio.gather(*(machine.power_off() for machine, _ in self.machines.values()))

    def _status(self, name: str, lines: int) -> dict[str, Any]:
        machine, bmc = self.machines[name]
        return {
            "name": name,
            "power": "on" if machine.is_on() else "off",
            "boot": str(bmc.chassis.flags()),
            "pid": machine.pid,
            "uptime": round(machine.uptime, 1),
            "firmware_boots": machine.firmware_boots,
            "sessions": bmc.open_sessions,
            "faults": bmc.faults.described(),
            "last_error": bmc.chassis.last_error,
            "console": machine.console_tail(lines),
        }

    def _fault(self, request: Mapping[str, Any]) -> list[str]:
        name = str(request.get("machine"))
        if name not in self.machines:
            raise RackError(f"there is no machine {name!r}; the machines are {', '.join(self.machines)}")
        machine, bmc = self.machines[name]
        faults = NO_FAULTS if request.get("clear") else bmc.faults
        for text in request.get("set", []):
            faults = faults.with_fault(str(text))
        if not isinstance(machine, QemuMachine):
            machine.faults = faults
        elif faults.ails_machine:
            raise RackError("only simulated machines (nodepool-rack up --simulated N) can be told to fail or hang")
        bmc.faults = faults
        return faults.described()


def _maker(folder: Path, rack: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], QemuMachine | SimulatedMachine]:
    """What makes a machine out of its entry in rack.json."""
    if simulated_rack.is_simulated(rack):
        from nodepool.rack.simulated.machine import SimulatedMachine  # SSH and HTTP take memory: not for QEMU's sake

        return lambda entry: SimulatedMachine(simulated_rack.spec_of(rack, entry))
    accelerator = Accelerator(**rack["accelerator"])
    return lambda entry: QemuMachine(inventory.spec_of(folder, entry), accelerator)


def _allow_sockets() -> None:
    """A simulated machine needs some four descriptors; there may be a thousand."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _converse(rack: Rack, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            try:
                reply: dict[str, Any] = {"ok": rack.answer(json.loads(line))}
            except (RackError, ValueError, AttributeError) as error:
                reply = {"error": str(error)}
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
    except (OSError, ValueError):
        _log.info("a client of the control socket went away")
    finally:
        writer.close()


async def run(folder: Path, ready: int) -> None:
    """Be the rack in `folder` until told to stop; the file descriptor `ready` is told once it answers."""
    os.chdir(folder)
    _allow_sockets()
    rack = Rack(folder)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, rack.done.set)
    bmcs = await serve(rack.places)
    _tidy()
    control = await asyncio.start_unix_server(lambda r, w: _converse(rack, r, w), SOCKET)
    _log.info("up: %d machines", len(rack.machines))
    _say(ready, "up")
    try:
        await rack.done.wait()
    finally:
        control.close()
        await bmcs.close()
        await rack.power_off()
        _tidy()
        _log.info("down")


def _tidy() -> None:
    Path(SOCKET).unlink(missing_ok=True)


def _say(descriptor: int, sentence: str) -> None:
    os.write(descriptor, sentence.encode() + b"\n")
    os.close(descriptor)


def main(folder: str, descriptor: str) -> int:
    """The process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    Path(folder, PID_FILE).write_text(f"{os.getpid()}\n")
    try:
        asyncio.run(run(Path(folder), int(descriptor)))
    except RackError as error:
        _log.error("%s", error)
        _say(int(descriptor), str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))

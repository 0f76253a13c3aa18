"""The `fake` driver: the steps, transitions and rows of `metal`, over machines that exist in this process alone.

Only the far side of the ports is invented: power that is on or off, firmware that asks for its boot script, an agent
that says hello, takes orders and reports, a system that can be logged in to.  Everything takes as many seconds as it is
told, on whatever clock the world is given, and any phase of any machine can be told to fail.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import threading
import uuid
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nodepool.clock import Clock, micros
from nodepool.config.records import Config
from nodepool.door import AgentDoor, Call, Lines, Reply
from nodepool.drivers.metal import JOBS, entry
from nodepool.drivers.power import DEADLINE, Bmc, BootDevice
from nodepool.errors import Code, Permanent, StepError, StoreUnavailable, Temporary
from nodepool.model import Boot, BootState, Node
from nodepool.ssh import Target

__all__ = ["JOBS", "World", "entry"]

DISK_SIZE = 8 * 10**9
AGAIN = 2.0  # seconds until an agent that was not heard says it again
_FAILURES = {
    "erase": (Code.DISK_ERASE, "disk vda still gives old bytes after it was erased"),
    "write": (Code.DISK_WRITE, "disk vda: input/output error at byte 4194304"),
    "configure": (Code.AGENT_ERROR, "cannot mount the root file system"),
    "start": (Code.AGENT_ERROR, "reboot: command not found"),
    "write image-altered": (Code.IMAGE_ALTERED, "what came over the wire has another sha256 than the image"),
    "write disk-readback": (Code.DISK_READBACK, "disk vda gives back other bytes than were written"),
}


@dataclass
class FakeMachine:
    """One machine of thin air."""

    name: str
    mac: str = ""
    delay: float = 0.0
    uuid: str = ""
    failing: str = ""  # the phase that fails, for ever; of some also with which code: `write image-altered`
    on: bool = False
    boot_device: BootDevice = "disk"
    life: int = 0  # counts power cycles: what was scheduled in an earlier life does not happen any more
    boot_id: int = 0
    nonce: str = ""
    installed: str = ""  # the host key of the system on the disk
    running: str = ""  # the boot id of the system that answers logins
    authorized: set[str] = field(default_factory=set)
    firmware_boots: int = 0
    marker: str = ""  # what the last user left on the disk


Said = tuple[Call, "Hearing"]  # what a machine says at the door, and what it does with the answer
Happening = Callable[[FakeMachine], Said | None]
Hearing = Callable[[FakeMachine, Reply], Said | None]


class World:
    """The fake machines: behind the ports `Power` and `Shell` on this side, agents at the door on the other.

    `pass_once` lets happen what is due; it is a loop of the daemon like the others, and runs on the same clock.
    """

    def __init__(self, door: AgentDoor, clock: Clock) -> None:
        self.machines: dict[str, FakeMachine] = {}
        self.wake: Callable[[], None] = lambda: None
        self._door = door
        self._clock = clock
        self._events: list[tuple[int, int, int, str, Happening]] = []
        self._order = itertools.count()
        self._by_boot: dict[int, str] = {}
        self._lock = threading.RLock()

    def meet(self, door: AgentDoor) -> None:
        """Knock at another door from now on: that of a daemon that was started anew."""
        self._door = door

    def configure(self, config: Config) -> None:
        """Bring the machines in line with the YAML; those that live go on living."""
        with self._lock:
            for provider in config.providers.values():
                for spec in provider.machines if provider.driver == "fake" else ():
                    machine = self.machines.setdefault(spec.name, FakeMachine(spec.name))
                    machine.uuid = machine.uuid or str(uuid.uuid5(uuid.NAMESPACE_DNS, spec.name))
                    machine.mac = spec.interfaces[0].mac
                    machine.delay = provider.fake.delay
                    machine.failing = provider.fake.failures.get(spec.name, "")

    def remember(self, boots: Iterable[tuple[str, Boot]], nodes: Iterable[Node], on: Container[str]) -> None:
        """Real machines outlive the daemon; these are put back as the store last knew them, `on` those that read on."""
        for name, boot in boots:
            machine = self.machines.get(name)
            if machine is not None and boot.state is BootState.UP:
                machine.on, machine.boot_id, machine.nonce = True, boot.id, boot.nonce
                self._by_boot[boot.id] = name
                self._later(machine, self._ask, 0.0)
            elif machine is not None and boot.state is BootState.EXPECTED and name in on:
                machine.on = True
                self._later(machine, self._network_boot)
        for node in nodes:
            machine = self.machines.get(node.machine)
            if machine is None or not node.host_key:
                continue
            machine.on, machine.installed, machine.running = True, node.host_key, node.os_boot_id
            if not node.os_boot_id and not machine.boot_id:
                self._later(machine, self._disk_boot)

    # The port `Power`: the address is fake://NAME.

    def power(self, bmc: Bmc, *, deadline: float = DEADLINE) -> bool:  # noqa: ARG002
        """Whether the machine is on."""
        return self._machine(bmc.address.removeprefix("fake://")).on

    def set_power(self, bmc: Bmc, *, on: bool, deadline: float = DEADLINE) -> None:  # noqa: ARG002
        """Switch the machine; a machine whose `power` fails takes the command and does nothing."""
        with self._lock:
            machine = self._machine(bmc.address.removeprefix("fake://"))
            if machine.on == on or machine.failing == ("power-on" if on else "power-off"):
                return
            machine.on = on
            machine.life += 1
            self._by_boot.pop(machine.boot_id, None)
            machine.running, machine.nonce, machine.boot_id = "", "", 0
            if on:
                machine.firmware_boots += 1
                device, machine.boot_device = machine.boot_device, "disk"
                self._later(machine, self._network_boot if device == "pxe" else self._disk_boot)

    def set_boot(
        self,
        bmc: Bmc,
        device: BootDevice,
        *,
        uefi: bool,  # noqa: ARG002
        persistent: bool = False,  # noqa: ARG002
        deadline: float = DEADLINE,  # noqa: ARG002
    ) -> None:
        """Choose the device of the next boot."""
        self._machine(bmc.address.removeprefix("fake://")).boot_device = device

    def info(self, bmc: Bmc, *, deadline: float = DEADLINE) -> Mapping[str, str]:  # noqa: ARG002
        """What a BMC of thin air says about itself."""
        machine = self._machine(bmc.address.removeprefix("fake://"))
        return {"firmware": "1.00", "ipmi": "2.0", "device": machine.name, "guid": machine.uuid.replace("-", "")}

    def identify(self, bmc: Bmc, seconds: int = 15, *, deadline: float = DEADLINE) -> None:
        """Nobody sees the light."""

    def close(self) -> None:
        """Nothing to close."""

    # The port `Shell`: the address is the machine's reserved one, found by the host key of what runs there.

    def boot_id(self, target: Target) -> str:
        """The boot id of the system with the proven host key."""
        return self._system(target).running

    def authorize(self, target: Target, keys: tuple[str, ...]) -> None:
        """Put keys on."""
        machine = self._system(target)
        if machine.failing == "authorize":
            raise Permanent("the file system of the node is read-only", Code.LOGIN_AUTH)
        machine.authorized.update(keys)

    def _system(self, target: Target) -> FakeMachine:
        machine = self.machines.get(_name_in(target.host_key))
        if machine is None or not machine.running or machine.installed != target.host_key:
            raise Temporary(f"no SSH on {target.address or 'it'} yet", Code.LOGIN_SILENT)
        return machine

    # The far side: firmware, agent, system.

    def pass_once(self) -> int:
        """Let happen what is due; gives when the next thing will (microseconds UTC), 0 when only an order can."""
        for boot_id in self._door.changed():
            name = self._by_boot.get(boot_id)
            if name is not None:
                self._later(self.machines[name], self._ask, 0.0)
        while due := self._take_due():
            said = [(machine, found) for machine, happen in due if (found := happen(machine)) is not None]
            while said:
                said = self._say(said)
        with self._lock:
            return self._events[0][0] if self._events else 0

    def _say(self, said: Sequence[tuple[FakeMachine, Said]]) -> list[tuple[FakeMachine, Said]]:
        """Say it all at the door; gives what the answers make the machines say.  What is not heard is said again."""
        try:
            replies = self._door.together([call for _, (call, _) in said])
        except StoreUnavailable:
            replies = [Reply(503)] * len(said)
        following = []
        for (machine, spoken), reply in zip(said, replies, strict=True):
            if reply.status == 503:
                self._later(machine, lambda _, s=spoken: s, AGAIN)  # type: ignore[misc]
            elif (found := spoken[1](machine, reply)) is not None:
                following.append((machine, found))
        return following

    def _take_due(self) -> list[tuple[FakeMachine, Happening]]:
        due = []
        with self._lock:
            now = self._clock.now()
            while self._events and self._events[0][0] <= now:
                _, _, life, name, happen = heapq.heappop(self._events)
                machine = self.machines[name]
                if machine.life == life:
                    due.append((machine, happen))
        return due

    def _machine(self, name: str) -> FakeMachine:
        if name not in self.machines:
            raise StepError(f"there is no fake machine {name}", Code.CONFIG)
        return self.machines[name]

    def _later(self, machine: FakeMachine, happen: Happening, delay: float | None = None) -> None:
        when = self._clock.now() + micros(machine.delay if delay is None else delay)
        with self._lock:
            heapq.heappush(self._events, (when, next(self._order), machine.life, machine.name, happen))
        self.wake()

    def _network_boot(self, machine: FakeMachine) -> Said | None:
        expected = self._door.expected_boot(machine.mac)
        if expected is None:
            self._disk_boot(machine)
            return None
        if machine.failing == "agent":
            return None
        machine.nonce = hashlib.sha256(f"{machine.name} {machine.life}".encode()).hexdigest()[:32]
        hello = {
            "version": "1",
            "token": expected.token,
            "nonce": machine.nonce,
            "agent_boot_id": f"agent-{machine.name}-{machine.life}",
            "fact.cpus": "4",
            "fact.memory": str(8 * 2**30),
            "fact.firmware": "bios",
            "fact.uuid": str(uuid.uuid5(uuid.NAMESPACE_DNS, machine.name)),
            "nic.0.name": "eth0",
            "nic.0.mac": machine.mac,
            "disk.0.name": "vda",
            "disk.0.size": str(DISK_SIZE),
        }
        return Call("hello", hello, "127.0.0.1"), self._welcomed

    def _welcomed(self, machine: FakeMachine, reply: Reply) -> Said | None:
        if reply.status != 200:
            return None
        machine.boot_id = int(reply.lines["boot"])
        self._by_boot[machine.boot_id] = machine.name
        return self._ask(machine)

    def _disk_boot(self, machine: FakeMachine) -> None:
        if machine.installed and machine.failing != "login":
            machine.running = f"system-{machine.name}-{machine.life}"

    def _ask(self, machine: FakeMachine) -> Said | None:
        return self._poll(machine, {}), self._ordered

    def _ordered(self, machine: FakeMachine, reply: Reply) -> Said | None:
        """Carry out what is ordered; the report is made when the phase's time is over."""
        order = reply.lines
        if reply.status != 200 or "operation" not in order:
            return None
        if not machine.delay:
            return self._carried_out(machine, order)
        self._later(machine, lambda m: self._carried_out(m, order))
        return self._poll(machine, {"operation": order["operation"], "state": "running"}), _nothing_more

    def _carried_out(self, machine: FakeMachine, order: Lines) -> Said | None:
        kind, operation = order["kind"], order["operation"]
        report = {"operation": operation, "state": "done"}
        if machine.failing.partition(" ")[0] == kind:
            code, error = _FAILURES[machine.failing]
            report |= {"state": "failed", "code": str(code), "error": error}
        elif kind == "erase":
            machine.marker, machine.installed = "", ""
        elif kind == "configure":
            machine.installed = f"ssh-ed25519 AAAAfake{machine.name}.{operation}"
            machine.authorized = {order["authorized_keys"]}
            report["result.host_key"] = machine.installed
        if kind != "start" or report["state"] != "done":
            return self._poll(machine, report), self._ordered
        return self._poll(machine, report), self._kexecs if order["method"] == "kexec" else self._reboots

    def _reboots(self, machine: FakeMachine, _reply: Reply) -> None:
        """The agent is gone; the firmware starts what is on the disk."""
        with self._lock:
            machine.life += 1
            machine.firmware_boots += 1
            self._later(machine, self._disk_boot)

    def _kexecs(self, machine: FakeMachine, _reply: Reply) -> None:
        """The agent has jumped into the new kernel; on some hardware nothing is heard after that."""
        with self._lock:
            machine.life += 1
            if machine.failing != "kexec":
                self._later(machine, self._disk_boot)

    def _poll(self, machine: FakeMachine, report: Mapping[str, str]) -> Call:
        return Call("poll", {"boot": str(machine.boot_id), "nonce": machine.nonce, **report}, "127.0.0.1")


def _nothing_more(_machine: FakeMachine, _reply: Reply) -> None:
    """The answer to a report on work under way asks for nothing."""


def _name_in(host_key: str) -> str:
    """The machine that made a fake host key (`ssh-ed25519 AAAAfakeNAME.NUMBER`)."""
    return host_key.rpartition(" ")[2].removeprefix("AAAAfake").rpartition(".")[0]

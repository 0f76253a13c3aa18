"""What a driver is made of: steps.  A step looks, acts once and answers; it never loops and never sleeps.

The launcher writes a step down (as a row of `operations`) before it runs it, runs it again after each `Wait`, and goes
on to the next when it answers `Done`.  A step that raises Temporary is run again later; one that raises Permanent, or
makes no progress within its `timeout`, has failed this attempt at the job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from nodepool.config.records import MachineSpec, Network, PoolLabel, Provider
from nodepool.drivers.power import Bmc, Power
from nodepool.errors import Code
from nodepool.model import Boot, Build, Machine, Node, Operation
from nodepool.ssh import Target


@dataclass(frozen=True, slots=True)
class Done:
    """The step has reached its goal; what it learned is stored with it.

    `power` is what was read, `machine` and `node` are fields of their records that change, `mint` asks for a new boot
    (only after the machine was read off), `end_boot` says that the agent is on its way out.
    """

    power: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    node: Mapping[str, Any] = field(default_factory=dict)
    mint: bool = False
    end_boot: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Not yet: look again after `seconds`.  `mark` is anything that differs once there was progress."""

    seconds: float
    why: str
    power: str = ""
    mark: str = ""


Outcome = Done | Wait


class Shell(Protocol):
    """How nodes are logged in to; every call raises StepError when it did not come to pass."""

    def boot_id(self, target: Target) -> str:
        """Log in, prove the host key, read the kernel's boot id."""
        ...

    def authorize(self, target: Target, keys: tuple[str, ...]) -> None:
        """Add public keys to those that may log in; adding one again changes nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Ports:
    """What a step may act on; drivers differ by what stands behind these."""

    power: Power
    shell: Shell
    public_key: str  # nodepool's own, for the nodes it makes
    pace: float = 1.0  # seconds between two looks at a machine's power


@dataclass(frozen=True, slots=True)
class Context:
    """Everything a step may know: frozen facts, no store, no locks."""

    now: int
    machine: Machine
    spec: MachineSpec
    provider: Provider
    ports: Ports
    bmc: Bmc
    operation: Operation
    node: Node | None = None
    boot: Boot | None = None
    build: Build | None = None
    network: Network | None = None
    offer: PoolLabel | None = None
    keys: tuple[str, ...] = ()  # of the requestor, to be put on at hand-over


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a job.

    `order` gives the parameters when the step is an agent's work: they are part of the row that is written before the
    agent sees it.  `timeout` is seconds without progress, None the provider's boot-timeout; `code` names a time-out
    (`kexec_code` that of a node that was started by kexec).
    """

    name: str
    run: Callable[[Context], Outcome]
    timeout: float | None
    code: Code
    order: Callable[[Context], dict[str, str]] | None = None
    kexec_code: Code | None = None


Jobs = Mapping[str, tuple[Step, ...]]  # by the state that the job belongs to


def firmware_of(machine: Machine) -> str:
    """The kind of firmware that started the agent: bios or uefi."""
    return str(machine.facts.get("fact.firmware", ""))


def model_of(machine: Machine) -> str:
    """The hardware model, as the firmware tells it."""
    return f"{machine.facts.get('fact.vendor', '')} {machine.facts.get('fact.product', '')}".strip()

"""The nouns, as frozen records: what one row of the store says, and nothing about how it got there.

Times are microseconds UTC (0: never), ids integers that are never used twice.  `version` is the row's revision for
compare-and-set.  A record is changed by making another one: `dataclasses.replace`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Json = Mapping[str, Any]


class NodeState(StrEnum):
    """Those of Zuul's Nodepool; `deleted` is the row's history after the node is gone."""

    BUILDING = "building"
    READY = "ready"
    IN_USE = "in-use"
    USED = "used"
    HOLD = "hold"
    FAILED = "failed"
    DELETING = "deleting"
    DELETED = "deleted"


class MachineState(StrEnum):
    """What a piece of hardware is at; `inspected` waits for somebody to accept it."""

    ENROLLED = "enrolled"
    INSPECTING = "inspecting"
    INSPECTED = "inspected"
    CLEANING = "cleaning"
    AVAILABLE = "available"
    OCCUPIED = "occupied"
    BROKEN = "broken"


class RequestState(StrEnum):
    """A request; `pending` means that its nodes are chosen and are being handed over."""

    REQUESTED = "requested"
    PENDING = "pending"
    FULFILLED = "fulfilled"
    RELEASED = "released"
    EXPIRED = "expired"
    FAILED = "failed"
    CANCELLED = "cancelled"


class BuildState(StrEnum):
    """A build of an image."""

    REQUESTED = "requested"
    BUILDING = "building"
    TESTING = "testing"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DELETING = "deleting"
    DELETED = "deleted"


class BootState(StrEnum):
    """A boot is expected until its agent says hello, up until it has ended or failed."""

    EXPECTED = "expected"
    UP = "up"
    ENDED = "ended"
    FAILED = "failed"


class OperationState(StrEnum):
    """An intent and its result."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Work:
    """Where a row that is being worked on stands; an empty `step` means that nothing is being done.

    `deadline` is pushed by progress and counts only time in which a daemon attended; `next_at` is when to look again.
    """

    step: str = ""
    since: int = 0
    deadline: int = 0
    attempt: int = 1
    next_at: int = 0
    waiting: str = ""  # what the step waits for, as a sentence
    error: str = ""  # the last failure, as a sentence
    code: str = ""  # its errors.Code


IDLE = Work()


@dataclass(frozen=True, slots=True)
class Machine:
    """A piece of hardware that outlives its uses."""

    id: int
    name: str
    provider: str
    state: MachineState
    since: int
    enrolled_at: int
    work: Work = IDLE
    power_wanted: str = ""  # on, off or "" (no opinion)
    power_observed: str = ""
    power_seen_at: int = 0
    accepted: bool = False
    accepted_by: str = ""  # who accepted it by command; "": nobody, its acceptance is the YAML's
    accepted_at: int = 0
    maintenance: str = ""  # the reason; set: given to nobody
    maintenance_by: str = ""
    retired: bool = False
    origin: str = "file"
    declared: str = ""  # a digest of what the YAML says about it: another one means that somebody changed something
    strikes: int = 0
    node_id: int | None = None
    boot_id: int | None = None
    facts: Json = field(default_factory=dict)
    failure: str = ""  # why it is broken
    failure_code: str = ""
    failure_phase: str = ""
    version: int = 0


@dataclass(frozen=True, slots=True)
class Node:
    """One life of a machine: built for a label, given out, used, wiped."""

    id: int
    label: str
    provider: str
    pool: str
    machine_id: int
    machine: str
    image: str
    build_id: str
    config_generation: str
    state: NodeState
    since: int
    created_at: int
    work: Work = IDLE
    ready_at: int = 0
    failed_at: int = 0
    hostname: str = ""
    address: str = ""
    port: int = 22
    username: str = ""
    host_key: str = ""
    os_boot_id: str = ""
    started_by: str = ""  # how its system was started: reboot or kexec
    request_id: int | None = None
    comment: str = ""  # why it is held, as a sentence
    held_by: str = ""
    hold_until: int = 0  # when it is let go by itself; 0: when somebody says so
    failure: str = ""  # why it failed
    failure_code: str = ""
    failure_phase: str = ""
    version: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """So many nodes of a label."""

    label: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Request:
    """Some nodes of some labels, wanted together."""

    id: int
    client_token: str
    wanted: tuple[Wanted, ...]
    state: RequestState
    since: int
    created_at: int
    work: Work = IDLE
    tenant: str = ""
    requestor: str = ""
    priority: int = 100
    ssh_keys: tuple[str, ...] = ()
    version: int = 0

    @property
    def labels(self) -> tuple[str, ...]:
        """One label per node wanted, in the order in which they are given out."""
        return tuple(want.label for want in self.wanted for _ in range(want.count))


@dataclass(frozen=True, slots=True)
class RequestNode:
    """The node at one position of a request."""

    id: int
    request_id: int
    position: int
    label: str
    node_id: int
    version: int = 0


@dataclass(frozen=True, slots=True)
class Build:
    """One result of a recipe; its id is a UUID in hex."""

    id: str
    image: str
    state: BuildState
    since: int
    created_at: int
    work: Work = IDLE
    builder: str = ""
    requested_by: str = ""
    files: Json = field(default_factory=dict)  # format -> path
    size: int = 0  # bytes of the raw disk
    sha256: str = ""  # of the raw disk, holes read as zeros
    seconds: float = 0.0
    starts: Json = field(
        default_factory=dict
    )  # "proven": firmwares its loader has started a node by; "no_kexec": models
    log: str = ""
    finished_at: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """Where a build is published for a provider."""

    id: int
    build_id: str
    image: str
    provider: str
    state: str
    created_at: int
    name: str = ""  # the provider's name for it
    external_id: str = ""
    version: int = 0


@dataclass(frozen=True, slots=True)
class Boot:
    """One power intent: a machine that was read off is switched on into the agent; the first hello spends the token."""

    id: int
    machine_id: int
    token: str
    state: BootState
    minted_at: int
    node_id: int | None = None
    nonce: str = ""
    agent_boot_id: str = ""
    address: str = ""
    hello_at: int = 0
    seen_at: int = 0
    ended_at: int = 0
    error: str = ""
    version: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """An intent, written down before it is acted on, and its result: one step of a job, or one order to an agent."""

    id: int
    machine_id: int
    kind: str
    state: OperationState
    created_at: int
    node_id: int | None = None
    boot_id: int | None = None
    job: str = ""  # the lifecycle state that the step belongs to
    attempt: int = 1
    by_agent: bool = False
    phase_now: str = ""  # what the agent is at, in its own word
    params: Json = field(default_factory=dict)
    done: int = 0
    total: int = 0
    result: Json = field(default_factory=dict)
    error: str = ""
    code: str = ""
    changed_at: int = 0
    finished_at: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for people and for metrics."""

    id: int
    time: int
    type: str
    subject_kind: str
    subject_id: str
    message: str = ""
    code: str = ""
    machine_id: int | None = None
    node_id: int | None = None
    request_id: int | None = None
    operation_id: int | None = None
    actor: str = ""
    from_state: str = ""
    to_state: str = ""
    data: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds an office (the planner, a shard of machines), and for which term."""

    id: str  # the scope
    epoch: int
    holder: str
    lease_until: int
    version: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """The last sentence of a loop."""

    id: str  # the loop's name
    text: str
    at: int
    data: Json = field(default_factory=dict)
    version: int = 0


Record = Machine | Node | Request | RequestNode | Build | Copy | Boot | Operation | Owner | Status

"""What a plan may ask for.  Applying is dumb: each action is one use case, and a conflict drops it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Enroll:
    """Make the row of a machine that the YAML declares, or bring its flags in line with the YAML."""

    name: str
    provider: str
    accepted: bool
    declared: str


@dataclass(frozen=True, slots=True)
class Retire:
    """The YAML has this machine no more."""

    machine_id: int


@dataclass(frozen=True, slots=True)
class Inspect:
    """Look at a machine: newly enrolled, or broken and due for another try."""

    machine_id: int
    why: str


@dataclass(frozen=True, slots=True)
class Accept:
    """Begin to use an inspected machine that was accepted."""

    machine_id: int


@dataclass(frozen=True, slots=True)
class SwitchOff:
    """Switch an available machine off: its agent has waited long enough."""

    machine_id: int
    why: str


@dataclass(frozen=True, slots=True)
class CreateNode:
    """Build a node of a label on an available machine."""

    machine_id: int
    label: str
    provider: str
    pool: str
    image: str
    build_id: str


@dataclass(frozen=True, slots=True)
class DeleteNode:
    """Take a node down and give its machine back."""

    node_id: int
    why: str


@dataclass(frozen=True, slots=True)
class EndHold:
    """Let a node go that was held until now."""

    node_id: int
    why: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """End a node that nobody can take down any more."""

    node_id: int
    why: str


@dataclass(frozen=True, slots=True)
class Allocate:
    """Promise READY nodes to a request, all of them, in the order of its labels."""

    request_id: int
    node_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FailRequest:
    """No machine could ever serve this request."""

    request_id: int
    why: str


@dataclass(frozen=True, slots=True)
class RequestBuild:
    """Build an image."""

    image: str
    why: str


@dataclass(frozen=True, slots=True)
class DeleteBuild:
    """Remove a build that nothing needs any more."""

    build_id: str
    why: str


Action = (
    Enroll
    | Retire
    | Inspect
    | Accept
    | CreateNode
    | SwitchOff
    | DeleteNode
    | EndHold
    | Abandon
    | Allocate
    | FailRequest
    | RequestBuild
    | DeleteBuild
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, why nothing more, and when to think again even if nothing changes (0: never)."""

    actions: tuple[Action, ...] = ()
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # label -> sentences
    next_at: int = 0
    alarms: tuple[str, ...] = ()  # what is held back until somebody has looked

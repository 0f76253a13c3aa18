"""Lifecycles as data: which events there are, which states they lead from and to, and how long to wait between tries.

The tables below are the only place that knows the transitions; the pictures in doc/ are drawn from them. Every change
of a state goes through `advance`, which raises on an event that the table does not have and changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from nodepool.errors import IllegalTransition
from nodepool.model import (
    IDLE,
    Build,
    BuildState,
    Machine,
    MachineState,
    Node,
    NodeState,
    Request,
    RequestState,
)


class NodeEvent(StrEnum):
    """What happens to nodes."""

    PROVEN = "proven"
    FAIL = "fail"
    HAND_OUT = "hand-out"
    RELEASE = "release"
    HOLD = "hold"
    RESUME = "resume"
    DELETE = "delete"
    GONE = "gone"


class MachineEvent(StrEnum):
    """What happens to machines."""

    INSPECT = "inspect"
    INSPECTED = "inspected"
    ACCEPT = "accept"
    CLEANED = "cleaned"
    OCCUPY = "occupy"
    VACATE = "vacate"
    REPORTED = "reported"
    BREAK = "break"


class RequestEvent(StrEnum):
    """What happens to requests."""

    ALLOCATE = "allocate"
    RETURN = "return"
    FULFIL = "fulfil"
    RELEASE = "release"
    EXPIRE = "expire"
    FAIL = "fail"
    CANCEL = "cancel"


class BuildEvent(StrEnum):
    """What happens to builds."""

    START = "start"
    TEST = "test"
    PASS = "pass"  # noqa: S105 - a verdict, no secret
    FAIL = "fail"
    CANCEL = "cancel"
    DELETE = "delete"
    GONE = "gone"


N, M, R, B = NodeState, MachineState, RequestState, BuildState

NODE: Mapping[tuple[StrEnum, StrEnum], StrEnum] = {
    (N.BUILDING, NodeEvent.PROVEN): N.READY,
    (N.BUILDING, NodeEvent.FAIL): N.FAILED,
    (N.BUILDING, NodeEvent.DELETE): N.DELETING,
    (N.READY, NodeEvent.HAND_OUT): N.IN_USE,
    (N.READY, NodeEvent.HOLD): N.HOLD,
    (N.READY, NodeEvent.DELETE): N.DELETING,
    (N.IN_USE, NodeEvent.RELEASE): N.USED,
    (N.IN_USE, NodeEvent.HOLD): N.HOLD,
    (N.IN_USE, NodeEvent.DELETE): N.DELETING,
    (N.USED, NodeEvent.HOLD): N.HOLD,
    (N.USED, NodeEvent.DELETE): N.DELETING,
    (N.HOLD, NodeEvent.RESUME): N.IN_USE,
    (N.HOLD, NodeEvent.RELEASE): N.USED,
    (N.HOLD, NodeEvent.DELETE): N.DELETING,
    (N.FAILED, NodeEvent.HOLD): N.HOLD,
    (N.FAILED, NodeEvent.DELETE): N.DELETING,
    (N.DELETING, NodeEvent.GONE): N.DELETED,
}

MACHINE: Mapping[tuple[StrEnum, StrEnum], StrEnum] = {
    (M.ENROLLED, MachineEvent.INSPECT): M.INSPECTING,
    (M.INSPECTING, MachineEvent.INSPECTED): M.INSPECTED,
    (M.INSPECTING, MachineEvent.BREAK): M.BROKEN,
    (M.INSPECTED, MachineEvent.ACCEPT): M.CLEANING,
    (M.INSPECTED, MachineEvent.INSPECT): M.INSPECTING,
    (M.CLEANING, MachineEvent.CLEANED): M.AVAILABLE,
    (M.CLEANING, MachineEvent.BREAK): M.BROKEN,
    (M.AVAILABLE, MachineEvent.OCCUPY): M.OCCUPIED,
    (M.AVAILABLE, MachineEvent.BREAK): M.BROKEN,
    (M.OCCUPIED, MachineEvent.VACATE): M.CLEANING,
    (M.OCCUPIED, MachineEvent.REPORTED): M.INSPECTING,
    (M.OCCUPIED, MachineEvent.BREAK): M.BROKEN,
    (M.BROKEN, MachineEvent.INSPECT): M.INSPECTING,
}

REQUEST: Mapping[tuple[StrEnum, StrEnum], StrEnum] = {
    (R.REQUESTED, RequestEvent.ALLOCATE): R.PENDING,
    (R.REQUESTED, RequestEvent.FAIL): R.FAILED,
    (R.REQUESTED, RequestEvent.CANCEL): R.CANCELLED,
    (R.REQUESTED, RequestEvent.EXPIRE): R.EXPIRED,
    (R.PENDING, RequestEvent.RETURN): R.REQUESTED,
    (R.PENDING, RequestEvent.FULFIL): R.FULFILLED,
    (R.PENDING, RequestEvent.FAIL): R.FAILED,
    (R.PENDING, RequestEvent.CANCEL): R.CANCELLED,
    (R.PENDING, RequestEvent.EXPIRE): R.EXPIRED,
    (R.FULFILLED, RequestEvent.RELEASE): R.RELEASED,
    (R.FULFILLED, RequestEvent.EXPIRE): R.EXPIRED,
}

BUILD: Mapping[tuple[StrEnum, StrEnum], StrEnum] = {
    (B.REQUESTED, BuildEvent.START): B.BUILDING,
    (B.REQUESTED, BuildEvent.CANCEL): B.CANCELLED,
    (B.BUILDING, BuildEvent.TEST): B.TESTING,
    (B.BUILDING, BuildEvent.FAIL): B.FAILED,
    (B.BUILDING, BuildEvent.CANCEL): B.CANCELLED,
    (B.TESTING, BuildEvent.PASS): B.READY,
    (B.TESTING, BuildEvent.FAIL): B.FAILED,
    (B.TESTING, BuildEvent.CANCEL): B.CANCELLED,
    (B.READY, BuildEvent.DELETE): B.DELETING,
    (B.DELETING, BuildEvent.GONE): B.DELETED,
}

TABLES: Mapping[str, Mapping[tuple[StrEnum, StrEnum], StrEnum]] = {
    "node": NODE,
    "machine": MACHINE,
    "request": REQUEST,
    "build": BUILD,
}

# By kind: every working state, and the event that ends it when its time is up (attempts spent, no progress before the
# deadline).  Kinds are kept apart because states of different kinds share their words, and compare as words.
WAY_OUT: Mapping[str, Mapping[StrEnum, StrEnum]] = {
    # a node that cannot be deleted breaks its machine, and is gone as soon as an agent is up there again
    "node": {N.BUILDING: NodeEvent.FAIL, N.DELETING: MachineEvent.BREAK},
    "machine": {
        M.INSPECTING: MachineEvent.BREAK,
        M.CLEANING: MachineEvent.BREAK,
        M.BROKEN: MachineEvent.INSPECT,
    },
    "request": {R.PENDING: RequestEvent.RETURN},
    "build": {B.BUILDING: BuildEvent.FAIL, B.TESTING: BuildEvent.FAIL},
}

# States that end only by a decision of people or of the planner.
WAITING: Mapping[str, frozenset[StrEnum]] = {
    "node": frozenset({N.READY, N.IN_USE, N.USED, N.HOLD, N.FAILED}),
    "machine": frozenset({M.ENROLLED, M.INSPECTED, M.AVAILABLE, M.OCCUPIED}),
    "request": frozenset({R.REQUESTED, R.FULFILLED}),
    "build": frozenset({B.REQUESTED, B.READY, B.DELETING}),
}
FINAL: Mapping[str, frozenset[StrEnum]] = {
    "node": frozenset({N.DELETED}),
    "machine": frozenset(),
    "request": frozenset({R.RELEASED, R.EXPIRED, R.FAILED, R.CANCELLED}),
    "build": frozenset({B.FAILED, B.CANCELLED, B.DELETED}),
}

Living = TypeVar("Living", Node, Machine, Request, Build)

_KIND: Mapping[type, str] = {Node: "node", Machine: "machine", Request: "request", Build: "build"}


def advance(record: Living, event: StrEnum, now: int) -> Living:
    """The record after `event`, with its work ended; raises IllegalTransition (and nothing has changed) otherwise."""
    kind = _KIND[type(record)]
    state = TABLES[kind].get((record.state, event))
    if state is None:
        allowed = sorted(str(e) for (s, e) in TABLES[kind] if s == record.state)
        raise IllegalTransition(
            f"{kind} {record.id} is {record.state}: '{event}' cannot happen to it now"
            f" (what can: {', '.join(allowed) or 'nothing'})"
        )
    return replace(record, state=state, since=now, work=IDLE)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential waiting with jitter: `first` seconds, doubled per attempt up to `limit`, +-20 %."""

    first: float = 2.0
    limit: float = 300.0

    def seconds(self, attempt: int, rng: random.Random | None = None) -> float:
        """How long to wait after the `attempt`-th failure (1, 2, ...)."""
        base = min(self.limit, self.first * 2.0 ** min(attempt - 1, 30))
        return base * (rng.uniform(0.8, 1.2) if rng else 1.0)

"""Where the time of a node or of a machine's job went: phases with their seconds, pure over rows.

A phase is one operation (a step of a job) or a stretch in which nothing was being done: `queued` before a job was taken
up, `waiting` between two steps, otherwise the state that the node was in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nodepool.clock import SECOND, rfc3339, seconds_between
from nodepool.model import Event, Node, NodeState, Operation, OperationState

_OPEN = frozenset({OperationState.PENDING, OperationState.RUNNING})
_WORKING = frozenset({NodeState.BUILDING, NodeState.DELETING})
FORGOTTEN = "forgotten"  # the state in a time of which the events are kept no more (the YAML's event-retention)
_SHORTEST = 0.05  # seconds: a shorter gap between two steps is no phase


def of_node(node: Node, events: Iterable[Event], operations: Sequence[Operation], now: int) -> list[dict[str, Any]]:
    """The life of a node in phases, in order of time, until `now` or until it was gone.

    `events` are those of the node (others are passed over), `operations` those with its id, both in order of time.
    """
    moves = [event for event in events if event.subject_kind == "node" and event.from_state and event.to_state]
    changes = [(node.created_at, str(NodeState.BUILDING)), *((event.time, event.to_state) for event in moves)]
    if (moves[0].from_state if moves else str(node.state)) != NodeState.BUILDING:
        changes[0] = (node.created_at, FORGOTTEN)
        changes += [] if moves else [(node.since, str(node.state))]
    phases: list[dict[str, Any]] = []
    for number, (start, state) in enumerate(changes):
        last = number + 1 == len(changes)
        if state == NodeState.DELETED:
            break
        end = now if last else changes[number + 1][0]
        mine = [op for op in operations if op.job == state and start <= op.created_at <= end]
        phases += _stretch(state, (start, end), mine, open_end=last)
    return phases


def by_state(moves: Sequence[Event], now: int) -> dict[str, float]:
    """The seconds spent in each state, longest first, from what led from state to state (in order of time) until `now`.

    What was before the first of them is not counted.
    """
    spent: dict[str, int] = {}
    for move, following in zip(moves, [*(later.time for later in moves[1:]), now], strict=True):
        spent[move.to_state] = spent.get(move.to_state, 0) + max(0, following - move.time)
    return {state: round(spent[state] / SECOND, 3) for state in sorted(spent, key=lambda state: -spent[state])}


def of_job(operations: Sequence[Operation], now: int) -> list[dict[str, Any]]:
    """The newest job among a machine's `operations` (in order of time): its steps, one phase each."""
    if not operations:
        return []
    newest = operations[-1]
    job = []
    for operation in reversed(operations):
        if (operation.job, operation.node_id) != (newest.job, newest.node_id):
            break
        job.append(_step(operation, now))
    return job[::-1]


def _stretch(
    state: str, span: tuple[int, int], operations: Sequence[Operation], *, open_end: bool
) -> Iterator[dict[str, Any]]:
    """One state from start to end: its operations, and what lies between them."""
    start, end = span
    cursor = start
    for number, operation in enumerate(operations):
        name = state if state not in _WORKING else "waiting" if number else "queued"
        if seconds_between(cursor, operation.created_at) >= _SHORTEST:
            yield _pause(name, state, cursor, operation.created_at)
        yield _step(operation, end)
        cursor = operation.finished_at or end
    name = state if state not in _WORKING else "waiting" if operations else "queued"
    if seconds_between(cursor, end) >= _SHORTEST or (not operations and state not in _WORKING):
        yield _pause(name, state, cursor, end, lasts=open_end)


def _pause(phase: str, state: str, start: int, end: int, *, lasts: bool = False) -> dict[str, Any]:
    return _phase(phase, state, start, end) | {"result": "lasts" if lasts else ""}


def _step(operation: Operation, now: int) -> dict[str, Any]:
    phase = _phase(operation.kind, operation.job, operation.created_at, operation.finished_at or now)
    running = operation.state in _OPEN
    phase |= {
        "attempt": operation.attempt,
        "result": "running" if running else str(operation.state),
        "error": operation.error,
        "code": operation.code,
    }
    if running and (operation.total or operation.phase_now):
        phase["progress"] = {"done": operation.done, "total": operation.total, "phase": operation.phase_now}
    return phase


def _phase(phase: str, state: str, start: int, end: int) -> dict[str, Any]:
    return {
        "phase": phase,
        "state": state,
        "attempt": None,
        "started": rfc3339(start),
        "seconds": round(max(0.0, seconds_between(start, end)), 3),
        "result": "",
        "error": "",
        "code": "",
        "progress": None,
    }

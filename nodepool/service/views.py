"""What people and programs are shown of the rows: JSON-ready dicts, made within one transaction.

Times are RFC 3339 with Z (null: never), durations seconds, ids strings (null: none).  `at` is a sentence for people on
what is being done; `trouble` (null: none) says what failed in which phase, with the code, whose fault it is, and what
happens next.  Lists are pages: `items`, and in `next` the cursor of the following page (null: this was the last).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, func, select

from nodepool.clock import rfc3339, seconds_between
from nodepool.errors import Code
from nodepool.model import (
    Event,
    Machine,
    MachineState,
    Node,
    NodeState,
    Operation,
    OperationState,
    Request,
    RequestNode,
    RequestState,
    Work,
)
from nodepool.plan import Catalog
from nodepool.service import timeline
from nodepool.store import Tx
from nodepool.store import tables as t

View = dict[str, Any]
Where = Sequence[ColumnElement[bool]]
T = TypeVar("T")

EVENTS_SHOWN = 12  # newest events of a machine that its view has
LIFE_SHOWN = 100  # newest events of a node that its view has
_WORKING = [str(NodeState.BUILDING), str(NodeState.DELETING)]
_OPEN_REQUESTS = [str(RequestState.REQUESTED), str(RequestState.PENDING), str(RequestState.FULFILLED)]
_OPEN_OPERATIONS = frozenset({OperationState.PENDING, OperationState.RUNNING})


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is wanted: what follows `cursor` (0: from its beginning), at most `limit` items."""

    cursor: int = 0
    limit: int = 10_000


@dataclass(frozen=True, slots=True)
class NodeFilter:
    """Which nodes are wanted; "" is any, but of nodes that are gone only those are listed that are asked for."""

    label: str = ""
    state: str = ""
    provider: str = ""


def page(records: Sequence[T], limit: int, view: Callable[[T], View]) -> View:
    """A page of at most `limit` of the records; one more of them means that there is another page."""
    items = [view(record) for record in records[:limit]]
    return {"items": items, "next": items[-1]["id"] if len(records) > limit else None}


def when(time: int) -> str | None:
    """A point in time; null when it has not come."""
    return rfc3339(time) if time else None


def span(seconds: float) -> str:
    """A duration for people: `12 s`, `5 min`, `3 h`, `2 d`."""
    for limit, unit, name in ((120.0, 1, "s"), (7200.0, 60, "min"), (172800.0, 3600, "h")):
        if seconds < limit:
            return f"{max(0.0, seconds) / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def at(work: Work, operation: Operation | None = None) -> str:
    """What a row that is worked on is at: its step, how far it is, what it waits for."""
    if not work.step:
        return work.waiting
    doing, waiting = work.step, work.waiting
    if operation is not None and operation.kind == work.step and operation.state in _OPEN_OPERATIONS:
        if operation.state is OperationState.RUNNING:
            waiting = ""  # an agent is at it: that it is waited for says nothing more
        if operation.total:
            doing += f" {100 * operation.done // operation.total}%"
        if operation.phase_now and operation.phase_now != work.step:
            doing += f" ({operation.phase_now})"
    if doing == work.step and waiting:
        doing += f": {waiting}"
    return doing + (f" [attempt {work.attempt}]" if work.attempt > 1 else "")


def trouble(phase: str, reason: str, code: str, following: str) -> View:
    """A failure, plainly; `code` says whose fault it is."""
    fault = str(Code(code).fault) if code in set(Code) else ""
    return {"phase": phase, "reason": reason, "code": code, "fault": fault, "next": following}


def work_trouble(work: Work, operations: Sequence[Operation], tries: int, now: int) -> View | None:
    """What went wrong lately in a job that still goes on."""
    if not work.error:
        return None
    phase, reason = work.step, work.error
    last = next((op for op in reversed(operations) if op.state is OperationState.FAILED), None)
    if last is not None and last.error and work.error.endswith(last.error):
        phase, reason = last.kind, last.error
    ahead = seconds_between(now, work.next_at)
    following = f"attempt {work.attempt} of {tries} " + (
        f"goes on in {span(ahead)}" if ahead > 0 else f"is under way, at {work.step or 'its start'}"
    )
    return trouble(phase, reason, work.code, following)


def node(record: Node, now: int, doing: str | None = None, *, detail: bool = True) -> View:
    """A node, `doing` what its job is at; without `detail` what a list shows."""
    view = {
        "id": str(record.id),
        "label": record.label,
        "provider": record.provider,
        "pool": record.pool,
        "machine": record.machine,
        "address": record.address,
        "state": str(record.state),
        "since": when(record.since),
        "age": round(seconds_between(record.since, now), 3),
        "locked": record.state != NodeState.READY or record.request_id is not None,
        "at": at(record.work) if doing is None else doing,
        "failure": record.failure,
    }
    if detail:
        view |= {
            "image": record.image,
            "build_id": record.build_id,
            "config_generation": record.config_generation,
            "created_at": when(record.created_at),
            "ready_at": when(record.ready_at),
            "hostname": record.hostname,
            "port": record.port,
            "username": record.username,
            "host_key": record.host_key,
            "boot_id": record.os_boot_id,
            "request_id": as_id(record.request_id),
            "comment": record.comment,
            "held_by": record.held_by,
            "hold_until": when(record.hold_until),
        }
    return view


def as_id(number: int | None) -> str | None:
    """The id of another row; null when there is none."""
    return None if number is None else str(number)


def nodes(tx: Tx, wanted: NodeFilter, part: Page, *, detail: bool = False) -> View:
    """A page of nodes by id, those that are gone left out unless they are asked for."""
    c = t.nodes.c
    where: list[ColumnElement[bool]] = [c.id > part.cursor]
    where.append(c.state == wanted.state if wanted.state else c.state != str(NodeState.DELETED))
    if wanted.label:
        where.append(c.label == wanted.label)
    if wanted.provider:
        where.append(c.provider == wanted.provider)
    found = tx.select(Node, *where, limit=part.limit + 1)
    working = any(record.state in _WORKING for record in found)
    running = operations_of_nodes(tx) if working else {}
    broken = {m.id for m in tx.select(Machine, t.machines.c.state == str(MachineState.BROKEN))} if working else set()

    def view(record: Node) -> View:
        doing = _node_at(record, running.get(record.id), broken=record.machine_id in broken)
        return node(record, tx.now, doing, detail=detail)

    return page(found, part.limit, view)


def _node_at(record: Node, operation: Operation | None, *, broken: bool) -> str:
    if record.state is NodeState.DELETING and broken:
        return f"its machine is broken; nodepool show {record.machine} says why"
    if record.state is NodeState.HOLD:
        return held(record)
    return at(record.work, operation)


def operations_of_nodes(tx: Tx) -> dict[int, Operation]:
    """The newest operation of each node that is built or taken down, by node."""
    c = t.operations.c
    working = select(t.nodes.c.id).where(t.nodes.c.state.in_(_WORKING))
    newest = select(func.max(c.id)).where(c.node_id.in_(working)).group_by(c.node_id)
    return {op.node_id: op for op in tx.select(Operation, c.id.in_(newest)) if op.node_id is not None}


def node_in_full(tx: Tx, catalog: Catalog, record: Node) -> View:
    """A node with its trouble and its timeline."""
    operations = tx.select(Operation, t.operations.c.node_id == record.id)
    events = tx.select(Event, t.events.c.node_id == record.id, t.events.c.subject_kind == "node")
    gone = record.since if record.state is NodeState.DELETED else tx.now
    ready = seconds_between(record.created_at, record.ready_at) if record.ready_at else None
    under = tx.find(Machine, record.machine_id)
    stuck = under is not None and under.state is MachineState.BROKEN
    doing = _node_at(record, operations[-1] if operations else None, broken=stuck)
    provider = catalog.provider(record.provider)
    return node(record, tx.now, doing) | {
        "login_key": str(provider.ssh.key.absolute()) if provider else "",
        "trouble": _node_trouble(catalog, record, operations, doing, tx.now),
        "timeline": timeline.of_node(record, events, operations, tx.now),
        "ready_seconds": ready,
        "total_seconds": round(seconds_between(record.created_at, gone), 3),
        "events": [
            event(found) | {"seconds": round(seconds_between(record.created_at, found.time), 3)}
            for found in events[-LIFE_SHOWN:]
        ],
    }


def held(record: Node) -> str:
    """Who holds a node, until when, and why."""
    until = f" until {rfc3339(record.hold_until)}" if record.hold_until else ""
    return f"held by {record.held_by}{until}: {record.comment}"


def _node_trouble(catalog: Catalog, record: Node, operations: Sequence[Operation], doing: str, now: int) -> View | None:
    if record.failure:
        following = {
            NodeState.FAILED: "the node is taken down next, and another one is built where it is wanted",
            NodeState.HOLD: "nothing: it is held for somebody to look at",
            NodeState.DELETING: f"it is being taken down: {doing}",
        }.get(record.state, "nothing: the node is gone")
        return trouble(record.failure_phase, record.failure, record.failure_code, following)
    provider = catalog.provider(record.provider)
    return work_trouble(record.work, operations, provider.launch_retries if provider else 1, now)


def newest_events(tx: Tx, of: ColumnElement[bool]) -> list[View]:
    """What happened last, oldest first."""
    return [event(found) for found in tx.select(Event, of, order=t.events.c.id.desc(), limit=EVENTS_SHOWN)[::-1]]


def request(record: Request, given: Sequence[View], waiting_for: Sequence[str], now: int) -> View:
    """A request, the nodes promised or given to it, and why it has to wait."""
    return {
        "id": str(record.id),
        "state": str(record.state),
        "since": when(record.since),
        "age": round(seconds_between(record.since, now), 3),
        "created_at": when(record.created_at),
        "priority": record.priority,
        "requestor": record.requestor,
        "tenant": record.tenant,
        "client_token": record.client_token,
        "wanted": [{"label": want.label, "count": want.count} for want in record.wanted],
        "ssh_keys": len(record.ssh_keys),
        "nodes": list(given),
        "waiting_for": list(waiting_for),
        "error": record.work.error,
    }


def requests(tx: Tx, state: str, part: Page, why: Callable[[Request], Sequence[str]]) -> View:
    """A page of requests by id: those in `state`, or ("") those that are not over."""
    c = t.requests.c
    states = [state] if state else _OPEN_REQUESTS
    found = tx.select(Request, c.state.in_(states), c.id > part.cursor, limit=part.limit + 1)
    given: dict[int, list[View]] = {}
    inside = select(c.id).where(c.state.in_(states))
    r = t.request_nodes.c
    for row in tx.select(RequestNode, r.request_id.in_(inside), order=r.position):
        given.setdefault(row.request_id, []).append({"id": str(row.node_id), "label": row.label})
    return page(found, part.limit, lambda item: request(item, given.get(item.id, []), why(item), tx.now))


def request_in_full(tx: Tx, record: Request, given: Sequence[Node], waiting_for: Sequence[str]) -> View:
    """A request with its nodes as one logs in to them."""
    return request(record, [node(found, tx.now) for found in given], waiting_for, tx.now)


def event(record: Event) -> View:
    """Something that happened."""
    return {
        "id": str(record.id),
        "time": when(record.time),
        "type": record.type,
        "subject": f"{record.subject_kind}:{record.subject_id}",
        "message": record.message,
        "code": record.code,
        "actor": record.actor,
        "from": record.from_state,
        "to": record.to_state,
        "machine_id": as_id(record.machine_id),
        "node_id": as_id(record.node_id),
        "request_id": as_id(record.request_id),
        "data": dict(record.data),
    }


def events(tx: Tx, subject: tuple[str, str] | None, part: Page) -> View:
    """A page of events, newest first; `subject` is a kind (node, machine, request, build) and an id or a name."""
    c = t.events.c
    where: list[ColumnElement[bool]] = [c.id < part.cursor] if part.cursor else []
    if subject is not None:
        where += [c.subject_kind == subject[0], c.subject_id == subject[1]]
    return page(tx.select(Event, *where, order=c.id.desc(), limit=part.limit + 1), part.limit, event)

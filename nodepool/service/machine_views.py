"""What people and programs are shown of machines; the conventions are those of `views`."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select

from nodepool.clock import rfc3339, seconds_between
from nodepool.errors import NotFound
from nodepool.model import Event, Machine, MachineState, Node, NodeState, Operation
from nodepool.plan import Catalog
from nodepool.service import timeline
from nodepool.service.machines import facts_id
from nodepool.service.views import (
    View,
    as_id,
    at,
    newest_events,
    operations_of_nodes,
    span,
    trouble,
    when,
    work_trouble,
)
from nodepool.store import Tx
from nodepool.store import tables as t

LIVES_SHOWN = 20  # newest lives of a machine that its view has


def machine(catalog: Catalog, record: Machine, doing: str, now: int) -> View:
    """A machine as a list shows it; `doing` is what its job is at."""
    spec, pool = catalog.machines.get(record.name), catalog.pool_of.get(record.name)
    return {
        "id": str(record.id),
        "name": record.name,
        "provider": record.provider,
        "pool": pool.name if pool else "",
        "rack": spec.rack if spec else "",
        "state": str(record.state),
        "since": when(record.since),
        "age": round(seconds_between(record.since, now), 3),
        "power": record.power_observed,
        "power_wanted": record.power_wanted,
        "power_seen_at": when(record.power_seen_at),
        "accepted": record.accepted,
        "accepted_by": record.accepted_by,
        "accepted_at": when(record.accepted_at),
        "maintenance": record.maintenance,
        "maintenance_by": record.maintenance_by,
        "retired": record.retired,
        "strikes": record.strikes,
        "node_id": as_id(record.node_id),
        "at": doing,
        "trouble": _machine_trouble(catalog, record, (), now),
    }


def machines(tx: Tx, catalog: Catalog) -> View:
    """All machines, by name."""
    c = t.operations.c
    working = select(t.machines.c.id).where(t.machines.c.step != "")
    newest = select(func.max(c.id)).where(c.machine_id.in_(working)).group_by(c.machine_id)
    operations = {op.machine_id: op for op in tx.select(Operation, c.id.in_(newest))}
    living = {found.id: found for found in tx.select(Node, t.nodes.c.state != str(NodeState.DELETED))}
    of_nodes = operations_of_nodes(tx)
    items = []
    for record in tx.select(Machine, order=t.machines.c.name):
        life = living.get(record.node_id or 0)
        operation = of_nodes.get(life.id) if life else operations.get(record.id)
        items.append(machine(catalog, record, _machine_at(record, life, operation), tx.now))
    return {"items": items, "next": None}


def _machine_at(record: Machine, life: Node | None, operation: Operation | None) -> str:
    if record.maintenance:
        return f"in maintenance: {record.maintenance} ({record.maintenance_by or 'nobody'})"
    if record.state is MachineState.OCCUPIED and life is not None:
        doing = at(life.work, operation)
        return f"node {life.id} is {life.state}" + (f", at {doing}" if doing else "")
    if record.state is MachineState.INSPECTED and not record.accepted:
        how = f"nodepool machine-accept {record.name}, or accept: true in the YAML"
        return f"waits to be accepted ({how}); until then nothing is written to its disks"
    if record.retired and record.state is MachineState.AVAILABLE:
        return "retired: the YAML does not have it any more"
    return at(record.work, operation)


def _machine_trouble(catalog: Catalog, record: Machine, operations: Sequence[Operation], now: int) -> View | None:
    if record.state is MachineState.BROKEN:
        ahead = seconds_between(now, record.work.next_at)
        soon = f"in {span(ahead)} ({rfc3339(record.work.next_at)})" if ahead > 0 else "soon"
        following = f"it is inspected again {soon}; at once with: nodepool machine-inspect {record.name}"
        return trouble(record.failure_phase, record.failure, record.failure_code, following)
    provider = catalog.provider(record.provider)
    return work_trouble(record.work, operations, provider.launch_retries if provider else 1, now)


def machine_in_full(tx: Tx, catalog: Catalog, name: str) -> View:
    """A machine with its facts, its trouble, the steps of its current or last job, and its newest lives."""
    record = machine_named(tx, name)
    c = t.operations.c
    operations = tx.select(Operation, c.machine_id == record.id, order=c.id.desc(), limit=100)[::-1]
    lives = tx.select(Node, t.nodes.c.machine_id == record.id, order=t.nodes.c.id.desc(), limit=LIVES_SHOWN)
    life = next((found for found in lives if found.id == record.node_id), None)
    doing = _machine_at(record, life, operations[-1] if operations else None)
    spec = catalog.machines.get(name)
    return machine(catalog, record, doing, tx.now) | {
        "enrolled_at": when(record.enrolled_at),
        "origin": record.origin,
        "bmc": spec.bmc if spec else "",
        "interfaces": [{"mac": nic.mac, "ip": nic.ip} for nic in spec.interfaces] if spec else [],
        "facts": dict(record.facts),
        "facts_id": facts_id(record.facts),
        "trouble": _machine_trouble(catalog, record, operations, tx.now),
        "timeline": timeline.of_job(operations, tx.now),
        "spent": _spent(tx, record),
        "lives": [_life(found, tx.now) for found in lives],
        "events": newest_events(tx, t.events.c.machine_id == record.id),
    }


def machine_named(tx: Tx, name: str) -> Machine:
    """The machine of this name; raises NotFound."""
    found = tx.select(Machine, t.machines.c.name == name)
    if not found:
        raise NotFound(f"there is no machine {name}; nodepool machine-list shows them")
    return found[0]


def _life(record: Node, now: int) -> View:
    end = record.since if record.state is NodeState.DELETED else now
    ready = seconds_between(record.created_at, record.ready_at) if record.ready_at else None
    return {
        "id": str(record.id),
        "label": record.label,
        "state": str(record.state),
        "created_at": when(record.created_at),
        "ready_seconds": ready,
        "total_seconds": round(seconds_between(record.created_at, end), 3),
        "failure": record.failure,
    }


def _spent(tx: Tx, record: Machine) -> View:
    """The seconds that a machine was in each state, since it was enrolled or as far back as events are kept."""
    c = t.events.c
    moves = tx.select(Event, c.machine_id == record.id, c.subject_kind == "machine", c.to_state != "")
    return timeline.by_state(moves, tx.now)

"""Applying a plan: one use case per kind of action, each dropped when the rows have changed since the plan was made."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nodepool.errors import Conflict, IllegalTransition, NotFound
from nodepool.lifecycle import BuildEvent, MachineEvent, NodeEvent, RequestEvent
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
    Work,
)
from nodepool.plan import Action, Catalog
from nodepool.plan import actions as a
from nodepool.service import nodes, requests
from nodepool.service.moves import move, note, started
from nodepool.store import Tx
from nodepool.store.tables import machines


def apply(tx: Tx, catalog: Catalog, action: Action) -> None:
    """Carry out one action of a plan; raises Conflict when it does not fit the rows any more."""
    try:
        _APPLY[type(action)](tx, catalog, action)
    except (IllegalTransition, NotFound) as error:
        raise Conflict(str(error)) from error


def prepare(tx: Tx, actions: Sequence[Action]) -> None:
    """Read the rows that these actions will need in one go."""
    tx.load(Machine, [key for action in actions if (key := getattr(action, "machine_id", None))])
    tx.load(Node, [key for action in actions if (key := getattr(action, "node_id", None))])


def _current(tx: Tx, machine_id: int, *states: MachineState) -> Machine:
    machine = tx.get(Machine, machine_id)
    if machine.state not in states:
        raise Conflict(f"{machine.name} is {machine.state} by now")
    return machine


def _enroll(tx: Tx, _catalog: Catalog, action: a.Enroll) -> None:
    found = tx.select(Machine, machines.c.name == action.name)
    if found:
        machine = found[0]
        work = machine.work
        if machine.state is MachineState.BROKEN:  # what broke it may be mended by this
            work = replace(work, next_at=tx.now)
        accepted = action.accepted or bool(machine.accepted_by)
        changed = replace(machine, provider=action.provider, accepted=accepted, declared=action.declared)
        changed = tx.put(replace(changed, retired=False, work=work))
        note(tx, changed, "declared", "the YAML declares it with other settings now")
        return
    machine = tx.add(
        Machine(
            id=0,
            name=action.name,
            provider=action.provider,
            state=MachineState.ENROLLED,
            since=tx.now,
            enrolled_at=tx.now,
            accepted=action.accepted,
            declared=action.declared,
        )
    )
    note(tx, machine, "enrolled", "declared in the YAML", to_state=str(machine.state))


def _retire(tx: Tx, _catalog: Catalog, action: a.Retire) -> None:
    """When the name comes back it may stand for other hardware: who accepted it by command is asked again."""
    machine = replace(tx.get(Machine, action.machine_id), retired=True, accepted_by="", accepted_at=0)
    note(tx, tx.put(machine), "retired", "the YAML does not have it any more")


def _inspect(tx: Tx, _catalog: Catalog, action: a.Inspect) -> None:
    machine = _current(tx, action.machine_id, MachineState.ENROLLED, MachineState.BROKEN)
    move(tx, machine, MachineEvent.INSPECT, action.why, work=started(tx.now))


def _accept(tx: Tx, _catalog: Catalog, action: a.Accept) -> None:
    machine = _current(tx, action.machine_id, MachineState.INSPECTED)
    why = f"accepted by {machine.accepted_by}" if machine.accepted_by else "accepted in the YAML"
    move(tx, machine, MachineEvent.ACCEPT, why, work=started(tx.now))


def _switch_off(tx: Tx, _catalog: Catalog, action: a.SwitchOff) -> None:
    machine = _current(tx, action.machine_id, MachineState.AVAILABLE)
    if machine.work != IDLE:
        raise Conflict(f"{machine.name} is being switched off already")
    machine = tx.put(replace(machine, power_wanted="off", work=started(tx.now)))
    note(tx, machine, "switch-off", action.why)


def _create_node(tx: Tx, catalog: Catalog, action: a.CreateNode) -> None:
    machine = _current(tx, action.machine_id, MachineState.AVAILABLE)
    if (
        machine.work != IDLE
        or machine.node_id is not None
        or machine.maintenance
        or machine.retired
        or not machine.accepted
    ):
        raise Conflict(f"{machine.name} is not to be used now")
    spec = catalog.machines[machine.name]
    provider = catalog.config.providers[action.provider]
    recipe = catalog.config.diskimages[action.image]
    node = tx.add(
        Node(
            id=0,
            label=action.label,
            provider=action.provider,
            pool=action.pool,
            machine_id=machine.id,
            machine=machine.name,
            image=action.image,
            build_id=action.build_id,
            config_generation=catalog.config.generation,
            state=NodeState.BUILDING,
            since=tx.now,
            created_at=tx.now,
            work=started(tx.now),
            hostname=machine.name,
            address=spec.interfaces[0].ip if spec.interfaces else "",
            port=provider.ssh.port,
            username=recipe.username or provider.ssh.user,
        )
    )
    note(tx, node, "create", f"{action.label} on {machine.name}", to_state=str(node.state))
    move(tx, machine, MachineEvent.OCCUPY, f"node {node.id}", node_id=node.id)


def _delete_node(tx: Tx, _catalog: Catalog, action: a.DeleteNode) -> None:
    node = tx.get(Node, action.node_id)
    if node.state not in {NodeState.READY, NodeState.USED, NodeState.FAILED} or (
        node.state is NodeState.READY and node.request_id is not None
    ):
        raise Conflict(f"node {node.id} is {node.state} by now")
    move(tx, node, NodeEvent.DELETE, action.why, work=started(tx.now))


def _end_hold(tx: Tx, _catalog: Catalog, action: a.EndHold) -> None:
    node = tx.get(Node, action.node_id)
    if node.state is not NodeState.HOLD or not 0 < node.hold_until <= tx.now:
        raise Conflict(f"node {node.id} is not held any more, or for longer")
    nodes.end_hold(tx, node, action.why)


def _abandon(tx: Tx, _catalog: Catalog, action: a.Abandon) -> None:
    node = tx.get(Node, action.node_id)
    machine = _current(tx, node.machine_id, MachineState.BROKEN)
    if not machine.retired or node.state is not NodeState.DELETING:
        raise Conflict(f"{machine.name} is back by now")
    move(tx, node, NodeEvent.GONE, action.why)
    tx.put(replace(machine, node_id=None))


def _allocate(tx: Tx, _catalog: Catalog, action: a.Allocate) -> None:
    request = tx.get(Request, action.request_id)
    if request.state is not RequestState.REQUESTED:
        raise Conflict(f"request {request.id} is {request.state} by now")
    chosen = [tx.get(Node, node_id) for node_id in action.node_ids]
    if any(node.state is not NodeState.READY or node.request_id is not None for node in chosen):
        raise Conflict(f"a node chosen for request {request.id} is gone")
    requests.allocate(tx, request, chosen)


def _fail_request(tx: Tx, _catalog: Catalog, action: a.FailRequest) -> None:
    request = tx.get(Request, action.request_id)
    if request.state is not RequestState.REQUESTED:
        raise Conflict(f"request {request.id} is {request.state} by now")
    move(tx, request, RequestEvent.FAIL, action.why, work=Work(error=action.why))


def _request_build(tx: Tx, _catalog: Catalog, action: a.RequestBuild) -> None:
    request_build(tx, action.image, "nodepool", action.why)


def request_build(tx: Tx, image: str, who: str, why: str) -> Build:
    """Ask for a new build of an image."""
    build = Build(
        id=uuid.uuid4().hex,
        image=image,
        state=BuildState.REQUESTED,
        since=tx.now,
        created_at=tx.now,
        requested_by=who,
    )
    tx.add(build)
    note(tx, build, "create", why, who, to_state=str(build.state))
    return build


def _delete_build(tx: Tx, _catalog: Catalog, action: a.DeleteBuild) -> None:
    build = tx.get(Build, action.build_id)
    if build.state is not BuildState.READY:
        raise Conflict(f"build {build.id} is {build.state} by now")
    move(tx, build, BuildEvent.DELETE, action.why)


_APPLY: dict[type, Callable[[Tx, Catalog, Any], None]] = {
    a.Enroll: _enroll,
    a.Retire: _retire,
    a.Inspect: _inspect,
    a.Accept: _accept,
    a.CreateNode: _create_node,
    a.SwitchOff: _switch_off,
    a.DeleteNode: _delete_node,
    a.EndHold: _end_hold,
    a.Abandon: _abandon,
    a.Allocate: _allocate,
    a.FailRequest: _fail_request,
    a.RequestBuild: _request_build,
    a.DeleteBuild: _delete_build,
}

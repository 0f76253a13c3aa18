"""No mass action without looking: what the planner takes down on its own account, and the brake on it.

A label or machines that leave the YAML may be a slip of the pen: when that would cost more than a share of a pool's
nodes at once it is held back and told, until the YAML is mended or an operator lets it go on (thaw), which holds for
that generation of the YAML.  Nodes that are too old are exchanged some at a time: the pool is never empty for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nodepool.clock import micros
from nodepool.model import Machine, MachineState, Node, NodeState
from nodepool.plan.actions import Action, DeleteNode, Retire
from nodepool.plan.catalog import pool_limit

if TYPE_CHECKING:
    from nodepool.plan.planner import Draft
    from nodepool.plan.snapshot import PoolKey

FREEZE = "freeze"  # the status row that says whether anything may be given out or wiped, and what was let go on
SHARE = 0.5  # of a pool's READY nodes and nodes in use
LEAST = 5  # nodes: losing fewer at once is daily business
_LIVING = frozenset({NodeState.READY, NodeState.IN_USE})
_LEAVING = frozenset({NodeState.FAILED, NodeState.USED, NodeState.DELETING})


def retire(draft: Draft) -> None:
    """Machines that the YAML does not have any more are retired."""
    known, losses = draft.snapshot.machine_ids, []
    for name in sorted(known.keys() - draft.catalog.machines.keys()):
        machine = draft.snapshot.machines[known[name]]
        if machine.origin != "file" or machine.retired:
            continue
        node = draft.snapshot.nodes.get(machine.node_id or 0)
        if node is not None and node.state in _LIVING:
            losses.append((node, Retire(machine.id)))
        else:
            draft.actions.append(Retire(machine.id))
    _brake(draft, losses, "the YAML has their machines no more")


def free_nodes(draft: Draft, retired: set[int]) -> None:
    """READY nodes that nobody was promised are taken down when the YAML or their age says so."""
    snapshot, labels = draft.snapshot, draft.catalog.config.labels
    losses = []
    for name, free in snapshot.free.items():
        label = labels.get(name)
        age = label.max_ready_age if label else 0
        living = []
        for node_id in sorted(free) if label is None or age or label.min_ready < 0 or retired else ():
            node = snapshot.nodes[node_id]
            if node.machine_id in retired:
                draft.actions.append(DeleteNode(node_id, "the YAML has its machine no more"))
            elif label is None:
                losses.append((node, DeleteNode(node_id, f"the configuration has no label {name} any more")))
            elif label.min_ready < 0:
                draft.actions.append(DeleteNode(node_id, f"label {name} is switched off (min-ready: -1)"))
            elif age:
                living.append(node)
        _exchange(draft, living, age)
    _brake(draft, losses, "the YAML has their label no more")


def _exchange(draft: Draft, living: list[Node], age: float) -> None:
    """Nodes of one label that are too old go, the oldest first, at most a share of them at the same time."""
    expired = []
    for node in sorted(living, key=lambda node: (node.ready_at, node.id)):
        expires = node.ready_at + micros(age)
        if expires <= draft.now:
            expired.append(node)
        else:
            draft.again_at(expires)
    if not expired:
        return
    away = _on_the_way(draft, expired[0].label, len(living))
    room = max(LEAST - 1, int(SHARE * (len(living) + away))) - away
    why = f"it was ready for longer than max-ready-age ({age:.0f} s)"
    draft.actions += [DeleteNode(node.id, why) for node in expired[: max(0, room)]]


def _on_the_way(draft: Draft, label: str, free: int) -> int:
    """How many of the nodes that a label lacks are on their way; machines that are broken bring none."""
    snapshot, coming = draft.snapshot, draft.snapshot.building[label]
    for pool, _ in draft.catalog.offers.get(label, ()):
        key = (pool.provider, pool.name)
        for machine in map(snapshot.machine, pool.machines):
            node = snapshot.nodes.get(machine.node_id or 0) if machine is not None else None
            if machine is not None and machine.state is MachineState.OCCUPIED:
                coming += node is not None and node.state in _LEAVING
            elif machine is not None and not machine.retired and not machine.maintenance:
                coming += machine.state is MachineState.CLEANING
        coming += max(0, min(len(draft.available(key)), pool_limit(pool) - draft.servers(key)))
    lacking = max(0, draft.catalog.config.labels[label].min_ready - free)
    return min(lacking, coming)


def due(draft: Draft, machine: Machine) -> bool:
    """Whether a broken machine is to be tried again; a time further ahead than any is put was of a clock set back."""
    provider = draft.catalog.config.providers.get(machine.provider)
    longest = micros(provider.retry_broken) if provider is not None else 0
    return not draft.now < machine.work.next_at <= draft.now + longest


def _brake(draft: Draft, losses: Sequence[tuple[Node, Action]], why: str) -> None:
    """Let the planner lose nodes, or, where it would be too many of a pool at once, hold that back and say so."""
    by_pool: dict[PoolKey, list[tuple[Node, Action]]] = {}
    for node, action in losses:
        by_pool.setdefault((node.provider, node.pool), []).append((node, action))
    having: Counter[PoolKey] = Counter()
    for (provider, pool, _, state), count in draft.snapshot.counts.items():
        having[provider, pool] += count if state in _LIVING else 0
    for key, lost in sorted(by_pool.items()):
        few = len(lost) < LEAST or len(lost) <= SHARE * having[key]
        if few or draft.snapshot.let_go == draft.catalog.config.generation:
            draft.actions += [action for _, action in lost]
            continue
        alarm = (
            f"pool {'/'.join(key)} would lose {len(lost)} of its {having[key]} nodes at once, because {why}:"
            " held back; mend the YAML, or let it go on with: nodepool thaw"
        )
        draft.alarms.append(alarm)
        for label in {node.label for node, _ in lost}:
            draft.because(label, alarm)

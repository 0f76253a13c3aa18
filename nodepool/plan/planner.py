"""`plan`: from the configuration and what there is to what should be done now.  No I/O, no clock of its own.

Each part below looks at one concern and adds its actions and its reasons to a draft; the draft also keeps account of
what this plan has already spent (machines, slots of pools, READY nodes), so that no part gives the same thing twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from nodepool.clock import micros, seconds_between
from nodepool.config.records import Pool
from nodepool.lifecycle import Backoff
from nodepool.model import IDLE, Build, BuildState, MachineState, NodeState, RequestState
from nodepool.plan import guard, parking
from nodepool.plan.actions import (
    Abandon,
    Accept,
    Action,
    Allocate,
    CreateNode,
    DeleteBuild,
    DeleteNode,
    EndHold,
    Enroll,
    FailRequest,
    Inspect,
    Plan,
    RequestBuild,
)
from nodepool.plan.catalog import Catalog, pool_limit
from nodepool.plan.snapshot import PoolKey, Snapshot

_GOING = frozenset({NodeState.FAILED, NodeState.USED, NodeState.DELETING})
_ON_THE_WAY = frozenset({MachineState.ENROLLED, MachineState.INSPECTING, MachineState.INSPECTED, MachineState.CLEANING})
LABEL_BACKOFF = Backoff(first=15, limit=900)
BUILD_BACKOFF = Backoff(first=60, limit=3600)
_MAKING = frozenset({BuildState.REQUESTED, BuildState.BUILDING, BuildState.TESTING})
BUILDS_KEPT = 2  # newest ready ones per image, as upstream keeps them


@dataclass
class Draft:
    """A plan in the making."""

    catalog: Catalog
    snapshot: Snapshot
    now: int
    actions: list[Action] = field(default_factory=list)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    next_at: int = 0
    spent: Counter[PoolKey] = field(default_factory=Counter)  # slots given to new nodes
    _free: dict[str, list[int]] = field(default_factory=dict)
    _available: dict[PoolKey, list[int]] | None = None
    _stuck: Counter[PoolKey] | None = None
    _builds: dict[str, Build | None] = field(default_factory=dict)

    def because(self, label: str, reason: str) -> None:
        """Say why nothing more happens for `label`."""
        said = self.reasons.setdefault(label, [])
        if reason not in said:
            said.append(reason)

    def again_at(self, when: int) -> None:
        """Think again at `when` at the latest."""
        if when > self.now and (not self.next_at or when < self.next_at):
            self.next_at = when

    def free_nodes(self, label: str) -> list[int]:
        """READY nodes that nobody was promised, oldest first, less those that this plan has given or deletes.

        Nor those whose machine the YAML has no more: they may be held back (guard), and nobody could log in there.
        """
        if label not in self._free:
            nodes = self.snapshot.nodes
            going = {action.node_id for action in self.actions if isinstance(action, DeleteNode)}
            free = self.snapshot.free.get(label, ())
            ids = [i for i in free if i not in going and nodes[i].machine in self.catalog.machines]
            self._free[label] = sorted(ids, key=lambda i: (nodes[i].ready_at, i))
        return self._free[label]

    def available(self, key: PoolKey) -> list[int]:
        """Machines of a pool that can be used now, less those that this plan has given.

        The one that has waited longest comes first: one on which nodes fail is not tried again before all others.
        """
        if self._available is None:
            self._available = {}
            for machine_id in self.snapshot.machines_in[MachineState.AVAILABLE]:
                machine = self.snapshot.machines[machine_id]
                pool = self.catalog.pool_of.get(machine.name)
                free = machine.work == IDLE and not machine.retired and not machine.maintenance
                if pool is not None and machine.accepted and free:
                    self._available.setdefault((pool.provider, pool.name), []).append(machine_id)
            for ids in self._available.values():
                ids.sort(key=lambda i: (self.snapshot.machines[i].since, self.snapshot.machines[i].name))
        return self._available.setdefault(key, [])

    def servers(self, key: PoolKey) -> int:
        """How many slots of a pool are taken.  A node that is stuck on a broken machine takes none."""
        if self._stuck is None:
            self._stuck = Counter()
            for machine_id in self.snapshot.machines_in[MachineState.BROKEN]:
                node = self.snapshot.nodes.get(self.snapshot.machines[machine_id].node_id or 0)
                if node is not None:
                    self._stuck[(node.provider, node.pool)] += 1
        return self.snapshot.servers[key] + self.spent[key] - self._stuck[key]

    def newest_ready(self, image: str) -> Build | None:
        """The build that nodes of `image` are made from."""
        if image not in self._builds:
            self._builds[image] = self.snapshot.newest_ready(image)
        return self._builds[image]


def plan(catalog: Catalog, snapshot: Snapshot, now: int) -> Plan:
    """Decide what to do; a plan over the snapshot after its own actions were applied is empty."""
    draft = Draft(catalog, snapshot, now)
    _roster(draft)
    if snapshot.frozen:
        for label in catalog.config.labels:
            draft.because(label, f"nodepool is frozen: {snapshot.frozen}")
    else:
        _machines(draft)
        _nodes(draft)
        _images(draft)
        missing = _requests(draft)
        _capacity(draft, missing)
        parking.switch_off(draft, {action.machine_id for action in draft.actions if isinstance(action, CreateNode)})
    reasons = {label: tuple(said) for label, said in draft.reasons.items()}
    return Plan(tuple(draft.actions), reasons, draft.next_at, tuple(draft.alarms))


def _roster(draft: Draft) -> None:
    """The machines that the YAML declares are enrolled; those that it does not have any more are retired."""
    known = draft.snapshot.machine_ids
    for name, spec in draft.catalog.machines.items():
        machine = draft.snapshot.machine(name)
        accepted = spec.accept or (machine is not None and bool(machine.accepted_by))
        wanted = (spec.provider, accepted, draft.catalog.digests[name])
        if machine is None or machine.retired or (machine.provider, machine.accepted, machine.declared) != wanted:
            draft.actions.append(Enroll(name, *wanted))
    if len(known) > len(draft.catalog.machines) or known.keys() != draft.catalog.machines.keys():
        guard.retire(draft)


def _machines(draft: Draft) -> None:
    """Machines that wait for a decision get one."""
    snapshot = draft.snapshot
    for machine_id in sorted(snapshot.machines_in[MachineState.ENROLLED]):
        machine = snapshot.machines[machine_id]
        if not machine.retired and not machine.maintenance:
            draft.actions.append(Inspect(machine_id, "newly enrolled"))
    for machine_id in sorted(snapshot.machines_in[MachineState.INSPECTED]):
        machine = snapshot.machines[machine_id]
        if machine.accepted and not machine.retired and not machine.maintenance:
            draft.actions.append(Accept(machine_id))
    for machine_id in sorted(snapshot.machines_in[MachineState.BROKEN]):
        machine = snapshot.machines[machine_id]
        if machine.retired or machine.maintenance:
            continue
        if guard.due(draft, machine):
            draft.actions.append(Inspect(machine_id, "another try after it was broken"))
        else:
            draft.again_at(machine.work.next_at)


def _nodes(draft: Draft) -> None:
    """Nodes that are over, too old or unwanted are taken down."""
    snapshot = draft.snapshot
    for state, why in ((NodeState.FAILED, "its build failed"), (NodeState.USED, "it was used")):
        draft.actions += [DeleteNode(node_id, why) for node_id in sorted(snapshot.nodes_in[state])]
    for node_id in sorted(snapshot.nodes_in[NodeState.HOLD]):
        until = snapshot.nodes[node_id].hold_until
        if until and until <= draft.now:
            draft.actions.append(EndHold(node_id, "the time is over that it was held for"))
        draft.again_at(until)
    retired = {machine.id for machine in snapshot.machines.values() if machine.retired}
    for node_id in sorted(snapshot.nodes_in[NodeState.DELETING]) if retired else ():
        machine = snapshot.machines[snapshot.nodes[node_id].machine_id]
        if machine.retired and machine.state is MachineState.BROKEN:
            draft.actions.append(Abandon(node_id, "the YAML has its machine no more; its system may still run there"))
    guard.free_nodes(draft, retired)


def _images(draft: Draft) -> None:
    """Images that are missing or old are built; builds that nothing needs are removed."""
    config = draft.catalog.config
    in_use = {node.build_id for node in draft.snapshot.nodes.values()} if draft.snapshot.builds else set()
    for image in draft.catalog.images:
        recipe = config.diskimages[image]
        builds = draft.snapshot.builds_of(image)
        ready = [build for build in builds if build.state is BuildState.READY]
        for surplus in ready[BUILDS_KEPT:]:
            if surplus.id not in in_use:
                draft.actions.append(DeleteBuild(surplus.id, f"{BUILDS_KEPT} newer builds of {image} are ready"))
        if recipe.pause or any(build.state in _MAKING for build in builds):
            continue
        expires = ready[0].finished_at + micros(recipe.rebuild_age) if ready else 0
        if expires > draft.now:
            draft.again_at(expires)
            continue
        trouble = draft.snapshot.image_trouble.get(image)
        if trouble is not None and trouble.failures:
            retry_at = trouble.last_failure + micros(BUILD_BACKOFF.seconds(len(trouble.failures)))
            if trouble.last_failure <= draft.now < retry_at:
                draft.again_at(retry_at)
                continue
        draft.actions.append(RequestBuild(image, f"older than {recipe.rebuild_age:.0f} s" if ready else "missing"))
    for build in draft.snapshot.builds.values():
        if build.image not in draft.catalog.images and build.state is BuildState.READY and build.id not in in_use:
            draft.actions.append(DeleteBuild(build.id, f"no pool uses {build.image} any more"))


def _requests(draft: Draft) -> Counter[str]:
    """Whole requests get their nodes; gives how many nodes of each label the others still miss.

    Requests are served in order of priority and age.  What one that waits has found so far is not given to those behind
    it, so that small requests cannot starve a large one; nothing is held for it in the store.
    """
    snapshot = draft.snapshot
    missing: Counter[str] = Counter()
    waiting = [request for request in snapshot.requests.values() if request.state is RequestState.REQUESTED]
    for request in sorted(waiting, key=lambda r: (r.priority, r.created_at, r.id)):
        impossible = why_impossible(draft.catalog, request.labels)
        if impossible:
            draft.actions.append(FailRequest(request.id, impossible))
            continue
        chosen: list[int] = []
        lacks: Counter[str] = Counter()
        for label in request.labels:
            free = draft.free_nodes(label)
            if free:
                chosen.append(free.pop(0))
            else:
                lacks[label] += 1
        if not lacks:
            draft.actions.append(Allocate(request.id, tuple(chosen)))
        for label, count in lacks.items():
            missing[label] += count
            draft.because(label, f"request {request.id} waits for {count} more of {label}")
    return missing


def why_impossible(offered: Catalog, labels: tuple[str, ...]) -> str:
    """Why a request for these labels can never be filled; empty when it can."""
    wanted = Counter(labels)
    for label, count in wanted.items():
        if label not in offered.offers:
            known = ", ".join(sorted(offered.offers)) or "none"
            return f"no pool offers the label {label} (labels: {known})"
        if count > offered.capacity(label):
            return f"{count} nodes of {label} are more than its pools can ever have ({offered.capacity(label)})"
    if len(wanted) > 1 and not offered.fits(labels):
        together = " and ".join(f"{count} of {label}" for label, count in wanted.items())
        return f"{together} are more than their pools can ever have at the same time"
    return ""


def _capacity(draft: Draft, missing: Counter[str]) -> None:
    """Build what is missing: all that requests wait for first, then what min-ready wants."""
    for_requests: dict[str, int] = {}
    for_min_ready: dict[str, int] = {}
    for label in draft.catalog.config.labels.values():
        have = len(draft.free_nodes(label.name)) + draft.snapshot.building[label.name]
        asked = max(0, missing[label.name] - have)
        kept = max(0, max(0, label.min_ready) + missing[label.name] - have) - asked
        if (asked or kept) and not _in_trouble(draft, label.name):
            for_requests[label.name], for_min_ready[label.name] = asked, kept
    unplaced = _build(draft, for_requests)
    _build(draft, for_min_ready)
    _make_room(draft, unplaced)  # what min-ready wants is no reason to take others' nodes down


def _build(draft: Draft, deficits: dict[str, int]) -> dict[str, int]:
    """Place as many nodes as are missing, one per label in turn; gives what found no place."""
    left = {label: count for label, count in deficits.items() if count}
    unplaced: dict[str, int] = {}
    while left:
        for label in list(left):
            action = _place(draft, label)
            if action is None:
                unplaced[label] = left.pop(label)
                continue
            draft.actions.append(action)
            left[label] -= 1
            if not left[label]:
                del left[label]
    return unplaced


def _make_room(draft: Draft, lacks: Mapping[str, int]) -> None:
    """READY nodes that nobody was promised give way to requests for other labels that have no other place.

    As many as miss a place are taken down, less the machines that are on their way back already.
    """
    coming = _coming(draft) if any(count > 0 for count in lacks.values()) else Counter()
    going: set[int] = set()
    for label, count in lacks.items():
        left = count
        for pool, offer in draft.catalog.offers.get(label, ()):
            if left <= 0 or draft.newest_ready(offer.diskimage) is None:
                continue
            key = (pool.provider, pool.name)
            back = min(left, coming[key])
            coming[key] -= back
            left -= back
            for node_id in [i for i in _spare(draft, key, label) if i not in going][:left]:
                draft.actions.append(DeleteNode(node_id, f"a request waits for {label}, and there is no other room"))
                going.add(node_id)
                left -= 1


def _coming(draft: Draft) -> Counter[PoolKey]:
    """How many machines of each pool are on their way to be available."""
    coming: Counter[PoolKey] = Counter()
    over = {action.node_id for action in draft.actions if isinstance(action, DeleteNode)}
    for machine in draft.snapshot.machines.values():
        pool, node = draft.catalog.pool_of.get(machine.name), draft.snapshot.nodes.get(machine.node_id or 0)
        if pool is None or machine.retired or machine.maintenance or not machine.accepted:
            continue
        vacated = node is not None and (node.state in _GOING or node.id in over)
        if machine.state in _ON_THE_WAY or (machine.state is MachineState.OCCUPIED and vacated):
            coming[pool.provider, pool.name] += 1
    return coming


def _spare(draft: Draft, key: PoolKey, label: str) -> list[int]:
    """Free nodes of other labels in a pool: those kept beyond min-ready first, then the oldest."""
    found: list[tuple[bool, int, int]] = []
    for other in draft.snapshot.free:
        wanted = draft.catalog.config.labels.get(other)
        nodes = [draft.snapshot.nodes[i] for i in draft.free_nodes(other)] if other != label else []
        surplus = len(nodes) - max(0, wanted.min_ready if wanted else 0)
        for place, node in enumerate(nodes):
            pool = draft.catalog.pool_of.get(node.machine)
            if pool is not None and (pool.provider, pool.name) == key:
                found.append((place >= surplus, node.ready_at, node.id))
    return [node_id for _, _, node_id in sorted(found)]


def _in_trouble(draft: Draft, label: str) -> bool:
    """Whether nodes of `label` failed lately through no fault of a machine: then the next try waits."""
    trouble = draft.snapshot.label_trouble.get(label)
    if trouble is None or not trouble.failures:
        return False
    count = len(trouble.failures)
    retry_at = trouble.last_failure + micros(LABEL_BACKOFF.seconds(count))
    if not trouble.last_failure <= draft.now < retry_at:
        return False
    draft.again_at(retry_at)
    wait = seconds_between(draft.now, retry_at)
    draft.because(label, f"{count} launches in a row failed; the next try is in {wait:.0f} s")
    return True


def _place(draft: Draft, label: str) -> CreateNode | None:
    """Choose pool, machine and build for one more node, or say why there is none."""
    for pool, offer in draft.catalog.offers.get(label, ()):
        key = (pool.provider, pool.name)
        build = draft.newest_ready(offer.diskimage)
        if build is None:
            draft.because(label, f"image {offer.diskimage} is not built yet")
            continue
        limit, used = pool_limit(pool), draft.servers(key)
        if used >= limit:
            draft.because(label, f"pool {pool.provider}/{pool.name} has all of its {limit} servers in use")
            continue
        machines = draft.available(key)
        if not machines:
            draft.because(label, _no_machine(draft, pool))
            continue
        draft.spent[key] += 1
        return CreateNode(machines.pop(0), label, pool.provider, pool.name, offer.diskimage, build.id)
    if label not in draft.catalog.offers:
        draft.because(label, f"no pool offers {label}")
    return None


def _no_machine(draft: Draft, pool: Pool) -> str:
    """What the machines of a pool are at, when none of them is available."""
    states: Counter[str] = Counter()
    for name in pool.machines:
        machine = draft.snapshot.machine(name)
        if machine is None:
            states["not enrolled yet"] += 1
        elif machine.maintenance:
            states["in maintenance"] += 1
        elif machine.state in {MachineState.INSPECTED, MachineState.AVAILABLE} and not machine.accepted:
            states["waiting to be accepted"] += 1
        else:
            states[str(machine.state)] += 1
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()) if state != "available")
    return f"pool {pool.provider}/{pool.name} has no machine to spare: {told or 'all of them are about to be used'}"

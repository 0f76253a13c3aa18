"""Why there are as many nodes of a label as there are: counts, work under way, and what stands in the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from nodepool.clock import micros, rfc3339, seconds_between
from nodepool.errors import NotFound
from nodepool.lifecycle import Backoff
from nodepool.model import Build, MachineState, Node, NodeState, Operation, Request, RequestState
from nodepool.plan import Catalog, Snapshot
from nodepool.plan.catalog import pool_limit
from nodepool.plan.planner import BUILD_BACKOFF, LABEL_BACKOFF
from nodepool.plan.snapshot import Trouble
from nodepool.service import loading
from nodepool.service.image_views import OPEN, build
from nodepool.service.views import View, at, operations_of_nodes, span, trouble, when
from nodepool.store import Tx
from nodepool.store import tables as t

Reasons = Mapping[str, Sequence[str]]  # label -> the planner's sentences


def labels(tx: Tx, catalog: Catalog) -> View:
    """Every label of the YAML with what is wanted and what there is."""
    snapshot = Snapshot.of(loading.snapshot(tx))
    items = [_counts(catalog, snapshot, name) for name in sorted(catalog.config.labels)]
    return {"items": items, "next": None}


def label(tx: Tx, catalog: Catalog, reasons: Reasons, name: str) -> View:
    """Everything that bears on one label; raises NotFound when the YAML has no such label."""
    if name not in catalog.config.labels:
        known = ", ".join(sorted(catalog.config.labels)) or "none"
        raise NotFound(f"there is no label {name} (labels: {known})")
    snapshot = Snapshot.of(loading.snapshot(tx))
    operations = operations_of_nodes(tx)
    images = dict.fromkeys(offer.diskimage for _, offer in catalog.offers.get(name, ()))
    view = _counts(catalog, snapshot, name) | {
        "building": building(_building(snapshot, name), operations, tx.now),
        "held": _held(catalog, snapshot, name),
        "requests": [_waiting(request, tx.now) for request in _requests(snapshot, name)],
        "reasons": list(reasons.get(name, ())),
        "images": [_image(tx, catalog, snapshot, image) for image in images],
        "pools": _pools(catalog, snapshot, name),
        "trouble": _label_trouble(tx, snapshot, name),
    }
    return view | {"summary": _summary(view)}


def waiting_for(catalog: Catalog, reasons: Reasons, request: Request) -> list[str]:
    """Why a request waits, from the planner's sentences on its labels; those on other requests are left out."""
    if request.state is RequestState.PENDING:
        return ["its nodes are being handed over"]
    if request.state is not RequestState.REQUESTED:
        return []
    mine = f"request {request.id} "
    said = [
        reason
        for name in dict.fromkeys(request.labels)
        for reason in reasons.get(name, ())
        if reason.startswith(mine) or not reason.startswith("request ")
    ]
    paused = [
        f"image {offer.diskimage} is paused in the YAML (pause: true)"
        for name in dict.fromkeys(request.labels)
        for _, offer in catalog.offers.get(name, ())
        if catalog.config.diskimages[offer.diskimage].pause and any(offer.diskimage in reason for reason in said)
    ]
    return list(dict.fromkeys(said + paused)) or ["the planner has not looked at it yet"]


def under_way(tx: Tx, catalog: Catalog, request: Request) -> list[str]:
    """What is being made that the request may get: nodes of its labels, and the images for those."""
    if request.state is not RequestState.REQUESTED:
        return []
    wanted = set(request.labels)
    images = {offer.diskimage for name in wanted for _, offer in catalog.offers.get(name, ())}
    nodes = tx.select(Node, t.nodes.c.state == str(NodeState.BUILDING), t.nodes.c.label.in_(wanted))
    running = tx.select(Build, t.builds.c.image.in_(images), t.builds.c.state.in_([str(state) for state in OPEN]))
    making = building(nodes, operations_of_nodes(tx) if nodes else {}, tx.now)
    return [f"image {found.image}: {build(found, tx.now)['at'] or found.state}" for found in running] + [
        f"node {item['id']} on {item['machine']}: {item['at']}" for item in making
    ]


def building(nodes: Iterable[Node], operations: Mapping[int, Operation], now: int) -> list[View]:
    """Nodes that are being built, and what each is at."""
    return [
        {
            "id": str(node.id),
            "machine": node.machine,
            "at": at(node.work, operations.get(node.id)),
            "attempt": node.work.attempt,
            "seconds": round(seconds_between(node.created_at, now), 3),
            "error": node.work.error,
        }
        for node in nodes
    ]


def _building(snapshot: Snapshot, name: str) -> list[Node]:
    found = (snapshot.nodes[node_id] for node_id in sorted(snapshot.nodes_in[NodeState.BUILDING]))
    return [node for node in found if node.label == name]


def _held(catalog: Catalog, snapshot: Snapshot, name: str) -> list[View]:
    """Held nodes, of whatever label, that take places of the pools that offer `name`."""
    pools = {(pool.provider, pool.name) for pool, _ in catalog.offers.get(name, ())}
    found = (snapshot.nodes[node_id] for node_id in sorted(snapshot.nodes_in[NodeState.HOLD]))
    return [
        {
            "id": str(node.id),
            "label": node.label,
            "machine": node.machine,
            "by": node.held_by,
            "reason": node.comment,
            "since": when(node.since),
            "until": when(node.hold_until),
        }
        for node in found
        if (node.provider, node.pool) in pools
    ]


def _counts(catalog: Catalog, snapshot: Snapshot, name: str) -> View:
    settings = catalog.config.labels[name]
    have: Counter[str] = Counter()
    for (_, _, of, state), count in snapshot.counts.items():
        if of == name:
            have[str(state)] += count
    requested = sum(
        request.labels.count(name) for request in snapshot.requests.values() if request.state is RequestState.REQUESTED
    )
    return {
        "id": name,
        "label": name,
        "min_ready": settings.min_ready,
        "max_ready_age": settings.max_ready_age,
        "requested": requested,
        "wanted": max(0, settings.min_ready) + requested,
        "free": len(snapshot.free.get(name, ())),
        "have": {str(state): have[str(state)] for state in NodeState if have[str(state)]},
        "capacity": catalog.capacity(name),
    }


def _requests(snapshot: Snapshot, name: str) -> list[Request]:
    waiting = [r for r in snapshot.requests.values() if r.state is RequestState.REQUESTED and name in r.labels]
    return sorted(waiting, key=lambda r: (r.priority, r.created_at, r.id))


def _waiting(request: Request, now: int) -> View:
    return {
        "id": str(request.id),
        "requestor": request.requestor,
        "priority": request.priority,
        "wanted": [{"label": want.label, "count": want.count} for want in request.wanted],
        "seconds": round(seconds_between(request.created_at, now), 3),
    }


def _image(tx: Tx, catalog: Catalog, snapshot: Snapshot, image: str) -> View:
    recipe = catalog.config.diskimages[image]
    ready = snapshot.newest_ready(image)
    running = next((found for found in snapshot.builds_of(image) if found.state in OPEN), None)
    return {
        "image": image,
        "paused": recipe.pause,
        "ready": build(ready, tx.now) if ready else None,
        "rebuilt_at": when(ready.finished_at + micros(recipe.rebuild_age)) if ready else None,
        "running": build(running, tx.now) if running else None,
        "trouble": _image_trouble(tx, snapshot, image) if running is None else None,
    }


def _retry(found: Trouble, backoff: Backoff, now: int) -> str:
    count = len(found.failures)
    ahead = seconds_between(now, found.last_failure + micros(backoff.seconds(count)))
    times = "it failed once" if count == 1 else f"it failed {count} times in a row"
    return f"{times}; " + (f"the next try is in {span(ahead)}" if ahead > 0 else "the next try is due")


def _image_trouble(tx: Tx, snapshot: Snapshot, image: str) -> View | None:
    found = snapshot.image_trouble.get(image)
    if found is None or not found.failures:
        return None
    failed = tx.get(Build, max(found.failures, key=lambda key: found.failures[key]))
    return trouble("build", failed.work.error, failed.work.code, _retry(found, BUILD_BACKOFF, tx.now))


def _label_trouble(tx: Tx, snapshot: Snapshot, name: str) -> View | None:
    found = snapshot.label_trouble.get(name)
    if found is None or not found.failures:
        return None
    node = tx.get(Node, max(found.failures, key=lambda key: found.failures[key]))
    return trouble(node.failure_phase, node.failure, node.failure_code, _retry(found, LABEL_BACKOFF, tx.now)) | {
        "node": str(node.id),
        "machine": node.machine,
    }


def _pools(catalog: Catalog, snapshot: Snapshot, name: str) -> list[View]:
    pools = []
    for pool, offer in catalog.offers.get(name, ()):
        found = [(machine, snapshot.machine(machine)) for machine in pool.machines]
        states = Counter(str(record.state) if record else "not enrolled yet" for _, record in found)
        pools.append(
            {
                "pool": f"{pool.provider}/{pool.name}",
                "image": offer.diskimage,
                "limit": pool_limit(pool),
                "used": snapshot.servers[(pool.provider, pool.name)],
                "machines": dict(sorted(states.items())),
                "broken": [
                    {
                        "machine": machine,
                        "reason": record.failure,
                        "code": record.failure_code,
                        "phase": record.failure_phase,
                        "next_at": rfc3339(record.work.next_at),
                    }
                    for machine, record in found
                    if record is not None and record.state is MachineState.BROKEN
                ],
            }
        )
    return pools


def _summary(view: View) -> str:
    """One sentence: whether there is enough, what is coming, or the first reason why not."""
    name, free, missing = view["label"], view["free"], view["wanted"] - view["free"]
    if missing <= 0:
        return f"{name}: {free} of {view['wanted']} wanted are ready; nothing is missing"
    coming = len(view["building"])
    told = f"{name}: {free} of {view['wanted']} wanted are ready, {coming} being built"
    lacking = next((image for image in view["images"] if image["ready"] is None), None)
    if lacking and lacking["running"]:
        return f"{told}; image {lacking['image']} is being built: {lacking['running']['at'] or 'just begun'}"
    why = [reason for reason in view["reasons"] if not reason.startswith("request ")]
    return told + (f"; {why[0]}" if why and coming < missing else "")

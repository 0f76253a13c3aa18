"""Labels and why there are as many nodes as there are; events; the daemon's own status."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from nodepool.api.answers import answer
from nodepool.api.desk import Actor, Desk, Part
from nodepool.model import Status
from nodepool.plan import Snapshot
from nodepool.service import explain, freezing, loading, views
from nodepool.service.agents import UNKNOWN
from nodepool.store import Tx

EVENTS_SHOWN = 200
Subject = Annotated[
    str, Query(pattern="^((node|machine|request|build):.+)?$", description="node:12, machine:r1n1, ...")
]


def router(desk: Desk) -> APIRouter:
    """`/labels`, `/events` and `/status`."""
    routes = APIRouter()

    @routes.get("/labels", summary="Labels with what is wanted and what there is")
    def list_labels() -> Response:
        return answer(desk.read(lambda tx: explain.labels(tx, desk.catalog())))

    @routes.get("/labels/{name}/explain", summary="Everything that bears on a label: why there are no more nodes of it")
    def explain_label(name: str) -> Response:
        return answer(desk.read(lambda tx: explain.label(tx, desk.catalog(), desk.reasons(), name)))

    @routes.get("/events", summary="Events, newest first")
    def list_events(part: Part, subject: Subject = "") -> Response:
        kind, _, key = subject.partition(":")
        part = views.Page(part.cursor, min(part.limit, EVENTS_SHOWN))
        return answer(desk.read(lambda tx: views.events(tx, (kind, key) if subject else None, part)))

    @routes.get("/status", summary="How the daemon and its loops are, and how much there is of what")
    def show_status() -> Response:
        return answer({"frozen": desk.read(freezing.frozen)} | dict(desk.status()) | desk.read(_counts))

    @routes.post("/thaw", summary="Go on after a look: out of the freeze, and with what was held back")
    def thaw(actor: Actor) -> Response:
        return answer({"was": desk.write(lambda tx: freezing.thaw(tx, desk.catalog(), actor)), "frozen": ""})

    return routes


def _counts(tx: Tx) -> dict[str, Any]:
    snapshot = Snapshot.of(loading.snapshot(tx))
    nodes: Counter[str] = Counter()
    for (_, _, _, state), count in snapshot.counts.items():
        nodes[str(state)] += count
    unknown = tx.find(Status, UNKNOWN)
    seen = sorted((unknown.data if unknown else {}).items(), key=lambda item: -item[1])
    return {
        "nodes": dict(sorted(nodes.items())),
        "machines": {str(state): len(ids) for state, ids in snapshot.machines_in.items() if ids},
        "requests": dict(Counter(str(request.state) for request in snapshot.requests.values())),
        "builds": dict(Counter(str(build.state) for build in snapshot.builds.values())),
        "unknown_machines": [{"mac": mac, "seen_at": views.when(time)} for mac, time in seen],
    }

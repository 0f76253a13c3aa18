"""Requests: asked for, waited for, given back."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from nodepool.api.answers import answer
from nodepool.api.desk import Actor, Desk, Id, Part
from nodepool.api.keys import public_key
from nodepool.errors import Refused
from nodepool.model import Request, RequestState, Wanted
from nodepool.service import explain, requests, views
from nodepool.service.requests import Wish
from nodepool.store import Tx

LONGEST_WAIT = 60  # seconds
_UNSETTLED = frozenset({RequestState.REQUESTED, RequestState.PENDING})


class WantedNodes(BaseModel):
    """So many nodes of a label."""

    model_config = ConfigDict(extra="forbid")

    label: str = Field(min_length=1, max_length=255)
    count: int = Field(1, ge=1, le=10_000)


class NewRequest(BaseModel):
    """Some nodes of some labels, wanted together: all of them or none.

    The same `client_token` again is the same request; `requestor` is the user at the socket when not given.
    """

    model_config = ConfigDict(extra="forbid")

    nodes: list[WantedNodes] = Field(min_length=1, max_length=100)
    client_token: str = Field("", max_length=64, pattern="^[!-~]*$")
    requestor: str = Field("", max_length=255)
    tenant: str = Field("", max_length=255)
    priority: int = Field(100, ge=0, le=999, description="smaller is served first")
    ssh_keys: list[str] = Field([], max_length=100, description="public keys that are put on the nodes")

    @field_validator("ssh_keys")
    @classmethod
    def _check_keys(cls, keys: list[str]) -> list[str]:
        return [public_key(key) for key in keys]

    def wish(self, actor: str) -> Wish:
        """What the service is asked for."""
        return Wish(
            wanted=tuple(Wanted(want.label, want.count) for want in self.nodes),
            client_token=self.client_token,
            requestor=self.requestor or actor,
            tenant=self.tenant,
            priority=self.priority,
            ssh_keys=tuple(dict.fromkeys(self.ssh_keys)),
        )


def router(desk: Desk) -> APIRouter:
    """`/requests`."""
    routes = APIRouter(prefix="/requests")

    @routes.get("", summary="Requests that are not over; others with state=...")
    def list_requests(part: Part, state: RequestState | None = None) -> Response:
        catalog, reasons = desk.catalog(), desk.reasons()
        return answer(
            desk.read(
                lambda tx: views.requests(
                    tx, str(state or ""), part, lambda request: explain.waiting_for(catalog, reasons, request)
                )
            )
        )

    @routes.post("", summary="Ask for nodes: 201, or 200 when the client_token is known")
    def create_request(body: NewRequest, actor: Actor) -> Response:
        request, created = desk.write(lambda tx: _create(tx, desk, body.wish(actor)))
        view = _new(desk, request) if created else desk.read(lambda tx: _show(tx, desk, request.id))[1]
        location = f"/api/v1/requests/{request.id}"
        return answer(view, 201 if created else 200, version=request.version, location=location)

    @routes.get("/{request_id}", summary="A request; with wait=SECONDS, as soon as it is fulfilled or over")
    async def show_request(request_id: Id, wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 0) -> Response:
        until = asyncio.get_running_loop().time() + wait
        while True:
            with desk.changes.watch(request_id) as changed:
                request, view = await run_in_threadpool(desk.read, lambda tx: _show(tx, desk, request_id))
                left = until - asyncio.get_running_loop().time()
                if request.state not in _UNSETTLED or left <= 0 or desk.changes.closed:
                    return answer(view, version=request.version)
                with contextlib.suppress(TimeoutError):  # then one more look, and it is told as it is
                    await asyncio.wait_for(changed.wait(), left)

    @routes.delete("/{request_id}", summary="Cancel a request that waits, give back one that is fulfilled")
    def delete_request(request_id: Id, actor: Actor) -> Response:
        return _release(desk, request_id, actor)

    @routes.post("/{request_id}/release", summary="The same: give everything back")
    def release_request(request_id: Id, actor: Actor) -> Response:
        return _release(desk, request_id, actor)

    return routes


def _create(tx: Tx, desk: Desk, wish: Wish) -> tuple[Request, bool]:
    request = requests.create(tx, desk.catalog(), wish)
    if request.wanted != wish.wanted:
        raise Refused(
            f"the client_token was used before, for request {request.id} that wants something else; use another token"
        )
    return request, bool(tx.changes)


def _new(desk: Desk, request: Request) -> dict[str, Any]:
    """A request that was just queued: it has no nodes, and nobody has looked at it yet."""
    return views.request(request, [], explain.waiting_for(desk.catalog(), {}, request), desk.store.clock.now())


def _show(tx: Tx, desk: Desk, request_id: int) -> tuple[Request, dict[str, Any]]:
    request, catalog = tx.get(Request, request_id), desk.catalog()
    why = explain.waiting_for(catalog, desk.reasons(), request) + explain.under_way(tx, catalog, request)
    return request, views.request_in_full(tx, request, requests.nodes_of(tx, request.id), why)


def _release(desk: Desk, request_id: int, actor: str) -> Response:
    request = desk.write(lambda tx: requests.release(tx, request_id, actor))
    request, view = desk.read(lambda tx: _show(tx, desk, request_id))
    return answer(view, version=request.version)

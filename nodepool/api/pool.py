"""Nodes and machines."""

from __future__ import annotations

from datetime import datetime, timedelta

from fastapi import APIRouter
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from nodepool.api.answers import answer
from nodepool.api.desk import Actor, Desk, Id, Part
from nodepool.clock import micros
from nodepool.model import Node, NodeState
from nodepool.service import machine_views, machines, nodes, views
from nodepool.service.views import NodeFilter


class NewHold(BaseModel):
    """Why a node is held, and until when: a time, or seconds from now; neither: until somebody ends the hold."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(min_length=1, max_length=1000)
    until: AwareDatetime | None = None
    seconds: float | None = Field(None, gt=0, le=10 * 365 * 86400)

    @model_validator(mode="after")
    def _one_end(self) -> NewHold:
        if self.until is not None and self.seconds is not None:
            raise ValueError("give until or seconds, not both")
        return self

    def end(self, now: int) -> int:
        """When the hold ends by itself, in microseconds UTC; 0: never."""
        if self.until is not None:
            return max(1, (self.until - _EPOCH) // timedelta(microseconds=1))
        return now + micros(self.seconds) if self.seconds is not None else 0


class Acceptance(BaseModel):
    """Which facts were shown to whoever accepts: `facts_id` of the machine's view; "" when none were."""

    model_config = ConfigDict(extra="forbid")

    facts_id: str = Field("", max_length=64)


_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00Z")


def router(desk: Desk) -> APIRouter:
    """`/nodes` and `/machines`."""
    routes = APIRouter()
    _nodes(desk, routes)
    _machines(desk, routes)
    return routes


def _nodes(desk: Desk, routes: APIRouter) -> None:
    @routes.get("/nodes", summary="Nodes by id; those that are gone only with state=deleted")
    def list_nodes(
        part: Part, label: str = "", state: NodeState | None = None, provider: str = "", detail: bool = False
    ) -> Response:
        wanted = NodeFilter(label, str(state or ""), provider)
        return answer(desk.read(lambda tx: views.nodes(tx, wanted, part, detail=detail)))

    @routes.get("/nodes/{node_id}", summary="A node with its timeline and, when something failed, its trouble")
    def show_node(node_id: Id) -> Response:
        found = desk.read(lambda tx: (node := tx.get(Node, node_id), views.node_in_full(tx, desk.catalog(), node)))
        return answer(found[1], version=found[0].version)

    @routes.post("/nodes/{node_id}/release", summary="Give a node back: its machine is wiped and used again")
    def release_node(node_id: Id, actor: Actor) -> Response:
        return _changed(desk, desk.write(lambda tx: nodes.release(tx, node_id, actor)))

    @routes.post("/nodes/{node_id}/hold", summary="Keep a node as it is; again changes why and until when")
    def hold_node(node_id: Id, body: NewHold, actor: Actor) -> Response:
        return _changed(desk, desk.write(lambda tx: nodes.hold(tx, node_id, actor, body.reason, body.end(tx.now))), 200)

    @routes.delete("/nodes/{node_id}/hold", summary="Let a held node go: back to its request, or to be wiped")
    def unhold_node(node_id: Id, actor: Actor) -> Response:
        return _changed(desk, desk.write(lambda tx: nodes.unhold(tx, node_id, actor)))

    @routes.delete("/nodes/{node_id}", summary="Take a node down, whoever has it")
    def delete_node(node_id: Id, actor: Actor) -> Response:
        return _changed(desk, desk.write(lambda tx: nodes.delete(tx, node_id, actor)))


def _changed(desk: Desk, node: Node, status: int = 202) -> Response:
    """The node as it is now; what is left to do with it is under way (202)."""
    return answer(views.node(node, desk.store.clock.now()), status, version=node.version)


def _machines(desk: Desk, routes: APIRouter) -> None:
    @routes.get("/machines", summary="Machines by name")
    def list_machines() -> Response:
        return answer(desk.read(lambda tx: machine_views.machines(tx, desk.catalog())))

    @routes.get("/machines/{name}", summary="A machine with its facts, its job's timeline and its lives as nodes")
    def show_machine(name: str) -> Response:
        return _machine(desk, name)

    @routes.post("/machines/{name}/inspect", summary="Have a broken machine looked at again now")
    def inspect_machine(name: str, actor: Actor) -> Response:
        desk.write(lambda tx: machines.inspect(tx, machine_views.machine_named(tx, name), actor))
        return _machine(desk, name, 202)

    @routes.post("/machines/{name}/accept", summary="Let all disks of a machine be wiped, now and after each use")
    def accept_machine(name: str, actor: Actor, body: Acceptance | None = None) -> Response:
        seen = body.facts_id if body else ""
        desk.write(lambda tx: machines.accept(tx, machine_views.machine_named(tx, name), actor, seen))
        return _machine(desk, name, 202)

    @routes.delete("/machines/{name}/accept", summary="Take back an acceptance that was given by command")
    def withdraw_machine(name: str, actor: Actor) -> Response:
        desk.write(lambda tx: machines.withdraw(tx, machine_views.machine_named(tx, name), desk.catalog(), actor))
        return _machine(desk, name)


def _machine(desk: Desk, name: str, status: int = 200) -> Response:
    row, view = desk.read(
        lambda tx: (
            machine_views.machine_named(tx, name),
            machine_views.machine_in_full(tx, desk.catalog(), name),
        )
    )
    return answer(view, status, version=row.version)

"""Nodes and machines."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from nodepool.api.answers import answer
from nodepool.api.desk import Actor, Desk, Id, Part
from nodepool.model import Node, NodeState
from nodepool.service import machines, nodes, views
from nodepool.service.views import NodeFilter


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

    @routes.delete("/nodes/{node_id}", summary="Take a node down, whoever has it")
    def delete_node(node_id: Id, actor: Actor) -> Response:
        return _changed(desk, desk.write(lambda tx: nodes.delete(tx, node_id, actor)))


def _changed(desk: Desk, node: Node) -> Response:
    """What is left to do with the node is under way: 202."""
    return answer(views.node(node, desk.store.clock.now()), 202, version=node.version)


def _machines(desk: Desk, routes: APIRouter) -> None:
    @routes.get("/machines", summary="Machines by name")
    def list_machines() -> Response:
        return answer(desk.read(lambda tx: views.machines(tx, desk.catalog())))

    @routes.get("/machines/{name}", summary="A machine with its facts, its job's timeline and its lives as nodes")
    def show_machine(name: str) -> Response:
        return _machine(desk, name)

    @routes.post("/machines/{name}/inspect", summary="Have a broken machine looked at again now")
    def inspect_machine(name: str, actor: Actor) -> Response:
        desk.write(lambda tx: machines.inspect(tx, views.machine_named(tx, name), actor))
        return _machine(desk, name, 202)


def _machine(desk: Desk, name: str, status: int = 200) -> Response:
    row, view = desk.read(lambda tx: (views.machine_named(tx, name), views.machine_in_full(tx, desk.catalog(), name)))
    return answer(view, status, version=row.version)

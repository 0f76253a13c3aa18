"""Requests: made, allocated, handed over whole, released; and what happens to the nodes they hold."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nodepool.clock import micros
from nodepool.errors import Refused
from nodepool.lifecycle import NodeEvent, RequestEvent
from nodepool.model import IDLE, Node, NodeState, Request, RequestNode, RequestState, Wanted, Work
from nodepool.plan import Catalog, why_impossible
from nodepool.plan.board import AUTHORIZED
from nodepool.service.moves import move, note, started
from nodepool.store import Tx
from nodepool.store import tables as t

HAND_OVER_PATIENCE = 300.0  # seconds for putting the keys on all nodes of a request


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody asks for; the token makes a repeated call the same request."""

    wanted: tuple[Wanted, ...]
    client_token: str = ""
    requestor: str = ""
    tenant: str = ""
    priority: int = 100
    ssh_keys: tuple[str, ...] = ()


def create(tx: Tx, catalog: Catalog, wish: Wish) -> Request:
    """Queue a request; refused at once when no pool could ever fill it."""
    if wish.client_token:
        known = tx.select(Request, t.requests.c.client_token == wish.client_token)
        if known:
            return known[0]
    if not wish.wanted or any(want.count < 1 for want in wish.wanted):
        raise Refused("a request wants at least one node of at least one label")
    request = Request(
        id=0,
        client_token=wish.client_token or secrets.token_hex(16),
        wanted=wish.wanted,
        state=RequestState.REQUESTED,
        since=tx.now,
        created_at=tx.now,
        tenant=wish.tenant,
        requestor=wish.requestor,
        priority=wish.priority,
        ssh_keys=wish.ssh_keys,
    )
    impossible = why_impossible(catalog, request.labels)
    if impossible:
        raise Refused(impossible)
    request = tx.add(request)
    note(tx, request, "create", ", ".join(request.labels), wish.requestor, to_state=str(request.state))
    return request


def nodes_of(tx: Tx, request_id: int) -> list[Node]:
    """The nodes promised or given to a request, in the order of its labels."""
    rows = tx.select(RequestNode, t.request_nodes.c.request_id == request_id, order=t.request_nodes.c.position)
    found = {node.id: node for node in tx.select(Node, t.nodes.c.id.in_([row.node_id for row in rows]))}
    return [found[row.node_id] for row in rows]


def allocate(tx: Tx, request: Request, nodes: Sequence[Node]) -> None:
    """Promise nodes to a request; without keys to put on they are handed out in the same transaction."""
    work = Work(step="hand-over", since=tx.now, deadline=tx.now + micros(HAND_OVER_PATIENCE), next_at=tx.now)
    request = move(tx, request, RequestEvent.ALLOCATE, f"nodes {', '.join(str(n.id) for n in nodes)}", work=work)
    for position, node in enumerate(nodes):
        tx.add_later(RequestNode(0, request.id, position, node.label, node.id))
    promised = [tx.put(replace(node, request_id=request.id)) for node in nodes]
    if not request.ssh_keys:
        _fulfil(tx, request, promised)


def authorized(tx: Tx, node: Node) -> None:
    """The requestor's keys are on `node`; with the last one of the request all of them change hands."""
    node = tx.put(replace(node, work=Work(step=AUTHORIZED, since=tx.now)))
    assert node.request_id is not None
    request = tx.get(Request, node.request_id)
    nodes = nodes_of(tx, request.id)
    if all(other.work.step == AUTHORIZED for other in nodes):
        _fulfil(tx, request, nodes)


def _fulfil(tx: Tx, request: Request, nodes: Sequence[Node]) -> None:
    for node in nodes:
        move(tx, node, NodeEvent.HAND_OUT, f"request {request.id}", request.requestor)
    move(tx, request, RequestEvent.FULFIL, f"{len(nodes)} nodes")


def take_back(tx: Tx, request: Request, why: str) -> None:
    """Put a request that was being handed over back in the queue; nodes that may have its keys on are not reused."""
    _let_go(tx, request, why)
    move(tx, request, RequestEvent.RETURN, why, work=Work(error=why))


def _let_go(tx: Tx, request: Request, why: str) -> None:
    for node in nodes_of(tx, request.id):
        if node.state is not NodeState.READY:
            continue
        if node.work == IDLE:
            tx.put(replace(node, request_id=None))
        else:
            move(tx, node, NodeEvent.DELETE, why, work=started(tx.now))
    tx.remove(RequestNode, t.request_nodes.c.request_id == request.id)


def release(tx: Tx, request_id: int, actor: str) -> Request:
    """Give everything back: a fulfilled request is released, one that waits is cancelled; again changes nothing."""
    request = tx.get(Request, request_id)
    if request.state in {RequestState.RELEASED, RequestState.CANCELLED}:
        return request
    if request.state in {RequestState.REQUESTED, RequestState.PENDING}:
        if request.state is RequestState.PENDING:
            _let_go(tx, request, f"request {request.id} was cancelled")
        return move(tx, request, RequestEvent.CANCEL, "released before it was filled", actor)
    if request.state is not RequestState.FULFILLED:
        raise Refused(f"request {request.id} is {request.state}: there is nothing to release")
    for node in nodes_of(tx, request.id):
        if node.state is NodeState.HOLD and node.request_id is not None:
            given_back(tx, node, f"request {request.id} was released", actor)
        elif node.state is NodeState.IN_USE:
            move(tx, node, NodeEvent.RELEASE, f"request {request.id} was released", actor)
    return move(tx, request, RequestEvent.RELEASE, "", actor)


def given_back(tx: Tx, node: Node, why: str, actor: str) -> Node:
    """Whoever had a held node needs it no more: it stays held, and belongs to nobody."""
    note(tx, node, "given-back", f"{why}; it stays held", actor)
    return tx.put(replace(node, request_id=None))


def node_left(tx: Tx, node: Node, why: str) -> None:
    """A node that was promised or given to a request is on its way out: the request follows."""
    if node.request_id is None:
        return
    request = tx.find(Request, node.request_id)
    if request is None:
        return
    if request.state is RequestState.PENDING:
        take_back(tx, request, why)
    elif request.state is RequestState.FULFILLED:
        others = [other for other in nodes_of(tx, request.id) if other.id != node.id]
        if all(_left(other) for other in others):
            move(tx, request, RequestEvent.RELEASE, "its last node was given back")


def _left(node: Node) -> bool:
    """Whether a node that was given to a request is with it no more."""
    return node.state in {NodeState.USED, NodeState.DELETING, NodeState.DELETED} or (
        node.state is NodeState.HOLD and node.request_id is None
    )

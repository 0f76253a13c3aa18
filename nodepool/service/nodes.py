"""Nodes, as people act on them."""

from __future__ import annotations

from dataclasses import replace

from nodepool.clock import rfc3339
from nodepool.errors import Refused
from nodepool.lifecycle import NodeEvent
from nodepool.model import Node, NodeState, Request, RequestState
from nodepool.service import requests
from nodepool.service.moves import move, note, started
from nodepool.store import Tx

_HELD_FROM = frozenset({NodeState.READY, NodeState.IN_USE, NodeState.USED, NodeState.FAILED})
_GONE = frozenset({NodeState.DELETING, NodeState.DELETED})


def release(tx: Tx, node_id: int, actor: str) -> Node:
    """Give a node back; its machine is wiped and used again.  Releasing it twice changes nothing.

    One that is held stays held: its request is done with it, and it goes when the hold ends.
    """
    node = tx.get(Node, node_id)
    if node.state is NodeState.USED or node.state in _GONE:
        return node
    if node.state is NodeState.HOLD:
        if node.request_id is None:
            return node
        kept = requests.given_back(tx, node, "given back", actor)
        requests.node_left(tx, node, f"node {node.id} was released")
        return kept
    if node.state is not NodeState.IN_USE:
        raise Refused(
            f"node {node.id} is {node.state}: only a node in use can be released (nodepool delete removes any)"
        )
    node = move(tx, node, NodeEvent.RELEASE, "given back", actor)
    requests.node_left(tx, node, f"node {node.id} was released")
    return node


def delete(tx: Tx, node_id: int, actor: str) -> Node:
    """Take a node down, whoever has it or holds it.  Deleting it twice changes nothing."""
    node = tx.get(Node, node_id)
    if node.state in _GONE:
        return node
    node = move(tx, node, NodeEvent.DELETE, "deleted by hand", actor, work=started(tx.now))
    requests.node_left(tx, node, f"node {node.id} was deleted")
    return node


def hold(tx: Tx, node_id: int, actor: str, reason: str, until: int = 0) -> Node:
    """Keep a node as it is for somebody to look at, until a point in time (0: until the hold is ended).

    It stays with the request that it was given to; one that was only promised goes back to the queue.  Holding it
    again changes who, why and until when.  Raises Refused when there is nothing to keep, or `until` is over.
    """
    node = tx.get(Node, node_id)
    if until and until <= tx.now:
        raise Refused(f"{rfc3339(until)} is over already: give a time to come, or none")
    held = {"comment": reason, "held_by": actor or "nobody", "hold_until": until}
    why = f"{reason} (until {rfc3339(until)})" if until else reason
    if node.state is NodeState.HOLD:
        node = tx.put(replace(node, **held))  # type: ignore[arg-type]
        note(tx, node, "hold", why, actor)
        return node
    if node.state not in _HELD_FROM:
        raise Refused(f"node {node.id} is {node.state}: what can be held is {', '.join(sorted(_HELD_FROM))}")
    was = node.state
    node = move(tx, node, NodeEvent.HOLD, why, actor, **held)
    if was is NodeState.IN_USE or node.request_id is None:
        return node
    if was is NodeState.READY:
        requests.node_left(tx, node, f"node {node.id} was held")
    return tx.put(replace(node, request_id=None))


def unhold(tx: Tx, node_id: int, actor: str) -> Node:
    """End a hold; raises Refused when the node is not held."""
    node = tx.get(Node, node_id)
    if node.state is not NodeState.HOLD:
        raise Refused(f"node {node.id} is {node.state}: it is not held")
    return end_hold(tx, node, "the hold was ended", actor)


def end_hold(tx: Tx, node: Node, why: str, actor: str = "") -> Node:
    """Let a held node go: back to the request that still has it, else to be wiped, as anybody may have been on it."""
    owner = None if node.request_id is None else tx.find(Request, node.request_id)
    kept = owner is not None and owner.state is RequestState.FULFILLED
    event = NodeEvent.RESUME if kept else NodeEvent.RELEASE
    return move(tx, node, event, why, actor, comment="", held_by="", hold_until=0)

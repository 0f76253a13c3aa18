"""Nodes, as people act on them."""

from __future__ import annotations

from nodepool.errors import Refused
from nodepool.lifecycle import NodeEvent
from nodepool.model import Node, NodeState
from nodepool.service import requests
from nodepool.service.moves import move, started
from nodepool.store import Tx


def release(tx: Tx, node_id: int, actor: str) -> Node:
    """Give a node back; its machine is wiped and used again.  Releasing it twice changes nothing."""
    node = tx.get(Node, node_id)
    if node.state in {NodeState.USED, NodeState.DELETING, NodeState.DELETED}:
        return node
    if node.state not in {NodeState.IN_USE, NodeState.HOLD}:
        raise Refused(
            f"node {node.id} is {node.state}: only a node in use can be released (nodepool delete removes any)"
        )
    node = move(tx, node, NodeEvent.RELEASE, "given back", actor)
    requests.node_left(tx, node, f"node {node.id} was released")
    return node


def delete(tx: Tx, node_id: int, actor: str) -> Node:
    """Take a node down, whoever has it.  Deleting it twice changes nothing."""
    node = tx.get(Node, node_id)
    if node.state in {NodeState.DELETING, NodeState.DELETED}:
        return node
    node = move(tx, node, NodeEvent.DELETE, "deleted by hand", actor, work=started(tx.now))
    requests.node_left(tx, node, f"node {node.id} was deleted")
    return node

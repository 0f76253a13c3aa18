"""Reading whole indexes from the store: what a Snapshot or a Board is built anew from."""

from __future__ import annotations

from sqlalchemy import func, or_, select

from nodepool.clock import micros
from nodepool.model import (
    Boot,
    Build,
    BuildState,
    Machine,
    Node,
    NodeState,
    Operation,
    Record,
    Request,
    RequestState,
    Status,
)
from nodepool.plan.guard import FREEZE
from nodepool.store import Tx
from nodepool.store import tables as t

MEMORY = 6 * 3600.0  # seconds for which failures of labels and images are remembered

_OPEN_REQUESTS = [str(s) for s in (RequestState.REQUESTED, RequestState.PENDING, RequestState.FULFILLED)]
_OVER = [str(s) for s in (BuildState.FAILED, BuildState.CANCELLED, BuildState.DELETED)]


def snapshot(tx: Tx) -> list[Record]:
    """The rows that the planner's Snapshot is made of: what lives, and what failed or succeeded lately."""
    since = tx.now - micros(MEMORY)
    nodes = t.nodes.c
    lately = or_(nodes.state != str(NodeState.DELETED), nodes.failed_at > since, nodes.ready_at > since)
    builds = t.builds.c
    return [
        *tx.select(Machine),
        *tx.select(Node, lately),
        *tx.select(Request, t.requests.c.state.in_(_OPEN_REQUESTS)),
        *tx.select(Build, or_(builds.state.not_in(_OVER), builds.finished_at > since)),
        *tx.select(Status, t.status.c.id == FREEZE),
    ]


def board(tx: Tx) -> list[Record]:
    """The rows that the launcher's and the agents' Board is made of."""
    newest = select(func.max(t.operations.c.id)).group_by(t.operations.c.machine_id)
    newest_boots = select(func.max(t.boots.c.id)).group_by(t.boots.c.machine_id)
    return [
        *tx.select(Machine),
        *tx.select(Node, t.nodes.c.state != str(NodeState.DELETED)),
        *tx.select(Boot, t.boots.c.id.in_(newest_boots)),
        *tx.select(Operation, t.operations.c.id.in_(newest)),
        *tx.select(Request, t.requests.c.state == str(RequestState.PENDING)),
        *tx.select(Build, t.builds.c.state == str(BuildState.READY)),
        *tx.select(Status, t.status.c.id == FREEZE),
    ]

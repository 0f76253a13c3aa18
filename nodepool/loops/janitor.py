"""The janitor: forgets what is old, and mends what a crash may have left between two rows."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqlalchemy import select

from nodepool.clock import SECOND, micros
from nodepool.errors import StoreUnavailable
from nodepool.lifecycle import FINAL
from nodepool.model import Boot, BootState, Event, Node, NodeState, Operation, Request, RequestNode
from nodepool.plan import Catalog
from nodepool.service.loading import MEMORY
from nodepool.store import Office, Store, Tx
from nodepool.store import tables as t

log = logging.getLogger("nodepool.janitor")

EVERY = 3600.0


class Janitor:
    """One pass sweeps once."""

    def __init__(self, store: Store, catalog: Callable[[], Catalog]) -> None:
        self.office: Office | None = None
        self.sentence = "not run yet"
        self._store = store
        self._catalog = catalog
        self._again_at = 0

    def pass_once(self) -> int:
        """Sweep when it is time, not at every commit; gives when to sweep again (microseconds UTC)."""
        now = self._store.clock.now()
        if now < self._again_at:
            return self._again_at
        try:
            gone = self._store.write(self._sweep, self.office)
        except StoreUnavailable as error:
            log.warning("%s; sweeping later", error)
            self._again_at = now + 60 * SECOND
            return self._again_at
        self.sentence = f"{gone} old events, boots, operations, requests and nodes forgotten"
        self._again_at = now + micros(EVERY)
        return self._again_at

    def _sweep(self, tx: Tx) -> int:
        before = tx.now - micros(self._catalog().config.event_retention)
        newest = tx.select(Event, order=t.events.c.id.desc(), limit=1)
        kept = newest[0].id if newest else 0  # tells how far this database has come (loops.watermark)
        over = [str(BootState.ENDED), str(BootState.FAILED)]
        return (
            tx.remove(Event, t.events.c.time < before, t.events.c.id < kept)
            + tx.remove(Operation, t.operations.c.finished_at > 0, t.operations.c.finished_at < before)
            + tx.remove(Boot, t.boots.c.state.in_(over), t.boots.c.ended_at > 0, t.boots.c.ended_at < before)
            + _forget_lives(tx, before)
        )


def _forget_lives(tx: Tx, before: int) -> int:
    """Remove requests that are over, and nodes that are gone and that no request names which is still known."""
    requests, nodes, places = t.requests.c, t.nodes.c, t.request_nodes.c
    over = (requests.state.in_([str(state) for state in FINAL["request"]]), requests.since < before)
    tx.remove(RequestNode, places.request_id.in_(select(requests.id).where(*over)))
    remembered = min(before, tx.now - micros(MEMORY))  # the planner counts on failures of the last hours
    gone = (nodes.state == str(NodeState.DELETED), nodes.since < remembered)
    return tx.remove(Request, *over) + tx.remove(Node, *gone, nodes.id.not_in(select(places.node_id)))

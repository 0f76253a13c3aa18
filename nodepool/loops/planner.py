"""The planner: folds what changed, plans, applies; keeps the reasons why nothing more happens for people to read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from nodepool.clock import SECOND, micros
from nodepool.errors import Conflict, StoreUnavailable
from nodepool.metrics import Metrics
from nodepool.plan import Action, Catalog, Snapshot, plan
from nodepool.plan.catalog import pool_limit
from nodepool.service import loading, pool
from nodepool.store import Office, Store, Tx
from nodepool.store.engine import each

log = logging.getLogger("nodepool.planner")

RESYNC = 600.0  # seconds between two readings of everything: what folding may have missed is seen by then
ROUNDS = 10  # plans in a row that one pass makes before it lets others write


class Planner:
    """One pass folds, plans and applies."""

    def __init__(self, store: Store, catalog: Callable[[], Catalog], metrics: Metrics) -> None:
        self.office: Office | None = None
        self.reasons: Mapping[str, tuple[str, ...]] = {}
        self.alarms: tuple[str, ...] = ()
        self.sentence = "not run yet"
        self._store = store
        self._catalog = catalog
        self._metrics = metrics
        self._feed = store.feed()
        self._snapshot = Snapshot()
        self._planned: Catalog | None = None
        self._think_at = 0
        self._gauges_at = 0
        self._resync_at = 0

    @property
    def snapshot(self) -> Snapshot:
        """What the last pass has seen; only this loop changes it."""
        return self._snapshot

    def pass_once(self) -> int:
        """Do what can be done now; gives when to look again (microseconds UTC), 0 when only a change can bring more."""
        now = self._store.clock.now()
        if now >= self._resync_at:
            self._feed.lose()
            self._resync_at = now + micros(RESYNC)
        try:
            self._work(now)
        except StoreUnavailable as error:
            log.debug("%s", error)  # the store has said it
            self._feed.lose()
            return now + SECOND
        if self._metrics.gauges_every and now >= self._gauges_at:
            pools = [p for provider in self._catalog().config.providers.values() for p in provider.pools]
            limits = [(p.provider, pool_limit(p)) for p in pools]
            self._metrics.nodes(self._snapshot.counts, limits)
            self._gauges_at = now + micros(self._metrics.gauges_every)
        return min(when for when in (self._think_at, self._gauges_at, self._resync_at) if when)

    def _work(self, now: int) -> None:
        catalog = self._catalog()
        mattered = self._fold() or catalog is not self._planned or (self._think_at and now >= self._think_at)
        self._planned = catalog
        for _ in range(ROUNDS if mattered else 0):
            made = plan(catalog, self._snapshot, now)
            self.reasons, self._think_at = made.reasons, made.next_at
            self._alarm(made.alarms)
            if not made.actions:
                return
            if not self._apply(catalog, made.actions):
                self._feed.lose()  # what was planned on is outdated: read everything anew
            self._fold()
        if mattered:
            self._think_at = now + SECOND

    def _fold(self) -> bool:
        changes, whole = self._store.follow(self._feed, loading.snapshot)
        if whole:
            return self._snapshot.fold(changes)
        self._snapshot = Snapshot.of(changes)
        return True

    def _alarm(self, alarms: tuple[str, ...]) -> None:
        """Say once what is held back."""
        for alarm in alarms:
            if alarm not in self.alarms:
                log.error("%s", alarm)
        self.alarms = alarms

    def _apply(self, catalog: Catalog, actions: tuple[Action, ...]) -> bool:
        outcome = each(
            self._store,
            [_use_case(catalog, action) for action in actions],
            self.office,
            lambda tx: pool.prepare(tx, actions),
        )
        dropped = [conflict for conflict in outcome if isinstance(conflict, Conflict)]
        self.sentence = f"{len(actions) - len(dropped)} actions carried out" + (
            f", {len(dropped)} dropped: {dropped[0]}" if dropped else ""
        )
        log.debug("%s", self.sentence)
        return not dropped


def _use_case(catalog: Catalog, action: Action) -> Callable[[Tx], None]:
    return lambda tx: pool.apply(tx, catalog, action)

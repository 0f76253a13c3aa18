"""Putting a daemon together from its parts; scenario tests put it together from others."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nodepool.clock import SECOND
from nodepool.config.records import Config
from nodepool.drivers.fake import World
from nodepool.loops.builder import Builder, Make
from nodepool.loops.janitor import Janitor
from nodepool.loops.launcher import Executor, Kit, Launcher
from nodepool.loops.planner import Planner
from nodepool.loops.running import Loop
from nodepool.loops.watermark import Watermark
from nodepool.metrics import Metrics
from nodepool.model import Status
from nodepool.plan import Catalog, catalog
from nodepool.plan.board import Board
from nodepool.service import loading
from nodepool.store import Office, Store, Tx


class Current:
    """The configuration in force, indexed; called, it gives the catalog."""

    def __init__(self, config: Config) -> None:
        self._catalog = catalog(config)
        self._lock = threading.Lock()

    def __call__(self) -> Catalog:
        """The catalog in force."""
        return self._catalog

    def put(self, config: Config) -> None:
        """Bring another generation into force."""
        indexed = catalog(config)
        with self._lock:
            self._catalog = indexed


@dataclass(frozen=True)
class Parts:
    """What differs between a daemon on real machines, the quick start and a scenario."""

    kits: Mapping[str, Kit]
    make: Make
    steps: Executor
    builds: Executor
    metrics: Metrics


class Daemon:
    """The loops over one store."""

    def __init__(self, store: Store, current: Current, parts: Parts, others: Mapping[str, Loop]) -> None:
        self.store = store
        self.planner = Planner(store, current, parts.metrics)
        self.launcher = Launcher(store, current, parts.kits, parts.steps, parts.metrics)
        self.builder = Builder(store, current, parts.make, parts.builds, parts.metrics)
        self.janitor = Janitor(store, current)
        self.watermark = Watermark(store, current().config.images_dir)
        self.loops: dict[str, Loop] = {
            "planner": self.planner,
            "launcher": self.launcher,
            "builder": self.builder,
            "janitor": self.janitor,
            "watermark": self.watermark,
            **others,
        }
        self.loops["status"] = StatusBoard(store, self.loops)

    def take_office(self, office: Office) -> None:
        """What the loops write counts under this term of office; a database that is behind is frozen first."""
        self.watermark.check(office)
        for loop in (self.planner, self.launcher, self.builder, self.janitor):
            loop.office = office


class StatusBoard:
    """Keeps the last sentence of each loop as a row that can be shown."""

    EVERY = 5  # seconds between two writes

    def __init__(self, store: Store, loops: Mapping[str, Loop]) -> None:
        self._store = store
        self._loops = loops
        self._written: dict[str, str] = {}
        self._again_at = 0

    def pass_once(self) -> int:
        """Write the sentences that changed."""
        now = self._store.clock.now()
        told = {name: getattr(loop, "sentence", "") for name, loop in self._loops.items()}
        changed = {name: text for name, text in told.items() if text and text != self._written.get(name)}
        if not changed:
            return 0
        if now >= self._again_at:
            self._store.write(lambda tx: _write_status(tx, changed))
            self._written.update(changed)
            self._again_at = now + self.EVERY * SECOND
            return 0
        return self._again_at


def _write_status(tx: Tx, sentences: Mapping[str, str]) -> None:
    for name, text in sentences.items():
        row = tx.find(Status, name)
        if row is None:
            tx.add(Status(name, text, tx.now))
        else:
            tx.put(replace(row, text=text, at=tx.now))


def revive(store: Store, world: World) -> None:
    """Put the fake machines back as the store last knew them: real ones outlive the daemon too."""
    board = Board()
    board.fold(store.read(loading.board))
    machines = board.machines.values()
    boots = [(m.name, board.boots[m.id]) for m in machines if m.id in board.boots and board.boots[m.id].id == m.boot_id]
    nodes = [node for node in board.nodes.values() if board.machines[node.machine_id].node_id == node.id]
    world.remember(boots, nodes, on={m.name for m in machines if m.power_observed == "on"})

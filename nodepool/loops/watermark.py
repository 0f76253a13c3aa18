"""The watermark: keeps how far the database has come in a file away from it, so that an older copy is known for one.

A database restored from a copy has forgotten nodes that run: what looks free may be in use.  design.md's rule "no mass
action without looking": nodepool freezes until an operator has looked.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from sqlalchemy import URL

from nodepool.clock import SECOND
from nodepool.errors import StoreUnavailable
from nodepool.service import freezing
from nodepool.service.freezing import Mark
from nodepool.store import Office, Store

log = logging.getLogger("nodepool.watermark")

EVERY = SECOND  # between two writes


class Watermark:
    """One pass writes the file when the database has gone on."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._path = folder / f"database-{_name(store.engine.url)}.mark"
        self._written: Mark | None = None
        self._again_at = 0
        self._failed = False

    def check(self, office: Office) -> str:
        """Freeze when the database is behind the file; gives why, "" when all is well."""
        last = _parse(self._path)
        why = self._store.write(lambda tx: freezing.check(tx, last), office)
        if why:
            log.error("frozen: %s", why)
        return why

    def pass_once(self) -> int:
        """Write it when it has changed; gives when to look again (microseconds UTC), 0: after the next commit."""
        now = self._store.clock.now()
        if now < self._again_at:
            return self._again_at
        try:
            mark = self._store.read(freezing.mark)
        except StoreUnavailable:
            self._again_at = now + EVERY
            return self._again_at
        if mark == self._written:
            return 0
        self._again_at = now + EVERY
        try:
            self._write(mark)
        except OSError as error:
            if not self._failed:
                log.warning("%s: an older copy of the database would not be noticed", error)
            self._failed = True
            self._again_at = now + 60 * EVERY
            return self._again_at
        self._written, self._failed = mark, False
        return 0

    def _write(self, mark: Mark) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        beside.write_text(f"{mark.database} {mark.event}\n")
        beside.replace(self._path)


def _name(url: URL) -> str:
    """The same for the same database, whoever logs in to it; daemons of several databases may share a folder."""
    place = str(Path(url.database or "").resolve()) if url.get_backend_name() == "sqlite" else url.database
    where = url.set(username=None, password=None, database=place).render_as_string()
    return hashlib.sha256(where.encode()).hexdigest()[:12]


def _parse(path: Path) -> Mark | None:
    try:
        database, event = path.read_text().split()
        return Mark(database, int(event))
    except (OSError, ValueError):
        return None  # the first start here

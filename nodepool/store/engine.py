"""Opening the database, running transactions in it, and telling the loops what was committed."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from nodepool.clock import Clock, micros
from nodepool.errors import ConfigError, Conflict, StoreUnavailable
from nodepool.model import Event, Record
from nodepool.store.transaction import Office, Tx

log = logging.getLogger("nodepool.store")
events_log = logging.getLogger("nodepool.events")

T = TypeVar("T")
PATIENCE = 10.0  # seconds that a transaction waits for a locked database before it gives up
READ_PATIENCE = 60  # seconds until a server that says nothing is taken for gone; longer than it waits for a lock
QUIET = 10.0  # seconds without trouble after which it is over
_FULL = ("disk is full", "Disk full", "No space left")
_DEADLOCK = (1205, 1213)  # MariaDB: lock wait time-out, deadlock found; the whole transaction may be tried again


class Feed:
    """The records that were committed since the last look; a bounded memory that says when it has lost some."""

    def __init__(self, limit: int = 200_000) -> None:
        self._changes: deque[Record] = deque()
        self._limit = limit
        self._lost = True  # a new reader has everything to learn
        self._lock = threading.Lock()

    def push(self, changes: list[Record]) -> None:
        """Called by the store after a commit."""
        with self._lock:
            if self._lost:
                return  # its reader reads everything anyway; one that never looks costs nothing
            if len(self._changes) + len(changes) > self._limit:
                self._changes.clear()
                self._lost = True
            else:
                self._changes.extend(changes)

    def drain(self) -> tuple[list[Record], bool]:
        """What was committed, in order of commit, and whether it is everything; False: read the store anew."""
        with self._lock:
            changes, self._changes = list(self._changes), deque()
            whole, self._lost = not self._lost, False
            return changes, whole

    def lose(self) -> None:
        """Make the next reader read the store anew."""
        with self._lock:
            self._lost = True


class Store:
    """Runs transactions, one writer at a time in this process; after a commit the feeds have what was written."""

    def __init__(self, engine: Engine, clock: Clock, path: Path | None = None) -> None:
        self.engine = engine
        self.clock = clock
        self.wake: list[Callable[[], None]] = []  # called after each commit that changed something; they take no data
        self.path = path
        self.trouble = ""  # why nothing can be written; told once, and when it is over
        self._lamented = 0
        self._inode = _inode(path)
        self._closed = False
        self._lock = threading.RLock()
        self._feeds: list[Feed] = []

    def feed(self) -> Feed:
        """A new reader of what is committed."""
        feed = Feed()
        self._feeds.append(feed)
        return feed

    def follow(self, feed: Feed, everything: Callable[[Tx], list[Record]]) -> tuple[list[Record], bool]:
        """What was committed since the last look at `feed`, and True; or all that there is, and False: begin anew."""
        changes, whole = feed.drain()
        if whole:
            return changes, True
        try:
            return self.read(everything), False
        except BaseException:
            feed.lose()
            raise

    def write(self, use_case: Callable[[Tx], T], office: Office | None = None) -> T:
        """Run `use_case` in one transaction; all of it is committed or nothing.

        Raises what the use case raises, Conflict when a row changed meanwhile, OutOfOffice when `office` is not held
        any more, StoreUnavailable when the database stays locked for PATIENCE seconds or is gone.
        """
        with self._lock:
            try:
                tx, result = self._patiently(lambda: self._attempt(use_case, office))
            except StoreUnavailable as error:
                self._lament(str(error))
                raise
            self._lament("")
            if tx.changes:
                for feed in self._feeds:
                    feed.push(tx.changes)
        for told in tx.events:
            _tell(told)
        if tx.changes:
            for wake in self.wake:
                wake()
        return result

    def _lament(self, trouble: str) -> None:
        """Say once why nothing can be written, and that it can again: a full disk would otherwise fill the log.

        There may be room for a small change while there is none for a large one.
        """
        now = self.clock.now()
        if trouble:
            self._lamented = now
            if not self.trouble:
                log.error("%s; it is tried again, nothing is lost", trouble)
        elif not self.trouble or 0 <= now - self._lamented < micros(QUIET):
            return
        else:
            log.warning("the database can be written again")
        self.trouble = trouble

    def read(self, query: Callable[[Tx], T]) -> T:
        """Run `query` in one transaction that writes nothing."""

        def attempt() -> T:
            with self._connect(writing=False) as connection:
                return query(Tx(connection, self.clock.now()))

        return self._patiently(attempt)

    def close(self) -> None:
        """Give the connections back; who waits for a locked database waits no longer."""
        self._closed = True
        self.engine.dispose()

    def _attempt(self, use_case: Callable[[Tx], T], office: Office | None) -> tuple[Tx, T]:
        with self._connect(writing=True) as connection:
            tx = Tx(connection, self.clock.now())
            if office is not None:
                tx.check(office)
            result = use_case(tx)
            tx.flush()
            try:
                connection.commit()
            except DBAPIError:
                for feed in self._feeds:  # it may have been committed all the same: nobody can know by what was told
                    feed.lose()
                for wake in self.wake:
                    wake()
                raise
            return tx, result

    @contextmanager
    def _connect(self, *, writing: bool) -> Iterator[Connection]:
        if self.path is not None and _inode(self.path) != self._inode:
            raise StoreUnavailable(
                f"the database file {self.path} was removed or replaced while in use; put it back or restart"
            )
        with self.engine.connect() as connection:
            if self.path is not None:
                connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
            yield connection

    def _patiently(self, attempt: Callable[[], T]) -> T:
        until = time.monotonic() + PATIENCE
        said = False
        while True:
            try:
                return attempt()
            except PoolTimeout as error:
                raise StoreUnavailable("every connection to the database is in use; try again") from error
            except DBAPIError as error:
                wait = _worth_waiting(error)
                if wait is None:
                    raise StoreUnavailable(f"the database refused: {_plain(error)}") from error
                if self._closed or time.monotonic() > until:
                    raise StoreUnavailable(f"the database does not answer: {_plain(error)}") from error
                if not said and wait > 0.1:
                    log.warning("waiting for the database: %s", _plain(error))
                    said = True
                time.sleep(wait)


def _tell(told: Event) -> None:
    """What is committed as an event is what the log says, so that the two never disagree."""
    moved = f" {told.from_state} -> {told.to_state}" if told.to_state else f" {told.type}"
    level = logging.WARNING if told.code else logging.INFO
    events_log.log(level, "%s %s%s%s", told.subject_kind, told.subject_id, moved, told.message and f": {told.message}")


def _plain(error: DBAPIError) -> str:
    sentence = str(error.orig or error).splitlines()[0]
    return f"{sentence}; make room where the database is" if any(word in sentence for word in _FULL) else sentence


def _worth_waiting(error: DBAPIError) -> float | None:
    """Seconds to wait before the same transaction is tried again; None: it would not help."""
    original = error.orig
    if isinstance(original, sqlite3.OperationalError):
        return 0.2 if "locked" in str(original) or "busy" in str(original) else None
    if isinstance(error, OperationalError) and original is not None:
        return 0.05 if original.args and original.args[0] in _DEADLOCK else 0.5
    return None


def _inode(path: Path | None) -> tuple[int, int] | None:
    if path is None:
        return None
    try:
        found = os.stat(path)  # noqa: PTH116 - called before every transaction
    except OSError:
        return None
    return found.st_dev, found.st_ino


def open_store(url: str, clock: Clock, *, migrate: bool = True) -> Store:
    """Open the database at an SQLAlchemy `url`, make or upgrade its tables, and give the store.

    Raises ConfigError for an unusable address, StoreUnavailable when the database does not answer.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(
            (f"database: {url!r} is no database address; for example sqlite:///var/nodepool.db",)
        ) from error
    path = None
    if parsed.get_backend_name() == "sqlite":
        path = Path(parsed.database or "")
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigError(("database: SQLite needs a file, for example sqlite:///var/nodepool.db",))
        path.parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, connect_args={"timeout": 0.1, "check_same_thread": False})
        event.listen(engine, "connect", _prepare_sqlite)
    else:
        patience = {"connect_timeout": int(PATIENCE), "read_timeout": READ_PATIENCE, "write_timeout": READ_PATIENCE}
        engine = create_engine(
            parsed,
            isolation_level="READ COMMITTED",
            pool_pre_ping=True,
            pool_recycle=3600,
            connect_args=patience if parsed.get_driver_name() == "pymysql" else {},
        )
    try:
        if migrate:
            from nodepool.store.migrations import upgrade

            upgrade(engine)
    except DBAPIError as error:
        engine.dispose()
        raise StoreUnavailable(f"cannot open the database {parsed.render_as_string()}: {_plain(error)}") from error
    return Store(engine, clock, path)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # BEGIN IMMEDIATE is ours to say
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def each(
    store: Store,
    use_cases: Sequence[Callable[[Tx], T]],
    office: Office | None = None,
    before: Callable[[Tx], None] | None = None,
) -> list[T | Conflict]:
    """Run use cases in one transaction; where one conflicts, run them one by one so that it alone is dropped.

    Gives what each has given, or its Conflict.  `before` reads in one go what they will need.
    """

    def all_of_them(tx: Tx) -> list[T | Conflict]:
        if before is not None:
            before(tx)
        return [use_case(tx) for use_case in use_cases]

    try:
        return store.write(all_of_them, office)
    except Conflict as conflict:
        if len(use_cases) == 1:
            return [conflict]
    outcome: list[T | Conflict] = []
    for use_case in use_cases:
        try:
            outcome.append(store.write(use_case, office))
        except Conflict as conflict:
            outcome.append(conflict)
    return outcome

"""One transaction: reads, and writes that are gathered and sent in batches when it ends.

Updates compare and set on the row's `version`; a row that somebody else changed raises Conflict and nothing of the
transaction is kept.  An `Office` makes a transaction valid only while its holder is in office.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, bindparam, delete, insert, select, update
from sqlalchemy.sql.dml import Update

from nodepool.errors import Conflict, NotFound, OutOfOffice
from nodepool.model import (
    Boot,
    Build,
    Copy,
    Event,
    Machine,
    Node,
    Operation,
    Owner,
    Record,
    Request,
    RequestNode,
    Status,
)
from nodepool.store.rows import CODECS

Stored = TypeVar("Stored", bound=Record)
R = TypeVar("R", Machine, Node, Request, RequestNode, Build, Copy, Boot, Operation, Owner, Status, Event)


@dataclass(frozen=True, slots=True)
class Office:
    """A term of office: what its holder writes counts only while the owners row has this epoch."""

    scope: str
    epoch: int


_UPDATES: dict[type, Update] = {}


def _update(cls: type) -> Update:
    if cls not in _UPDATES:
        table = CODECS[cls].table
        _UPDATES[cls] = (
            update(table)
            .where(table.c.id == bindparam("b_id"), table.c.version == bindparam("b_version"))
            .values({c.name: bindparam(c.name) for c in table.columns if c.name != "id"})
        )
    return _UPDATES[cls]


class Tx:
    """What a use case sees of the store while its transaction is open."""

    def __init__(self, connection: Connection, now: int) -> None:
        self.now = now
        self.changes: list[Any] = []  # records, in the order in which they were written
        self.events: list[Event] = []  # told to the log once they are committed
        self._connection = connection
        self._updates: dict[tuple[type, int | str], Record] = {}
        self._known: dict[tuple[type, int | str], Record] = {}  # read or written in this transaction
        self._inserts: dict[type, list[Record | Event]] = {}

    def check(self, office: Office) -> None:
        """Raise OutOfOffice unless `office` is still held."""
        owner = self.find(Owner, office.scope)
        if owner is None or owner.epoch != office.epoch:
            raise OutOfOffice(f"no longer in office as {office.scope} (epoch {office.epoch})")

    def find(self, cls: type[R], key: int | str) -> R | None:
        """The record with this id, as this transaction sees it."""
        known = self._known.get((cls, key))
        if known is not None:
            return known  # type: ignore[return-value]
        found = self.select(cls, CODECS[cls].table.c.id == key)
        return found[0] if found else None

    def get(self, cls: type[R], key: int | str) -> R:
        """Like `find`, but raises NotFound."""
        found = self.find(cls, key)
        if found is None:
            raise NotFound(f"there is no {CODECS[cls].kind} {key}")
        return found

    def select(self, cls: type[R], *where: ColumnElement[bool], order: Any = None, limit: int | None = None) -> list[R]:
        """The records that fit every condition, by id when no other order is asked for."""
        self.flush()
        codec = CODECS[cls]
        query = select(codec.table).where(*where).order_by(codec.table.c.id if order is None else order)
        if limit is not None:
            query = query.limit(limit)
        found = [codec.decode(row) for row in self._connection.execute(query).mappings()]
        if cls is not Event:
            self._known.update(((cls, record.id), record) for record in found)
        return found

    def load(self, cls: type[R], keys: Iterable[int | str]) -> None:
        """Read rows in one go that will be asked for one by one."""
        wanted = list(keys)
        if wanted:
            self.select(cls, CODECS[cls].table.c.id.in_(wanted))

    def latest(self, record: Stored) -> Stored:
        """What this transaction has made of a record that was read elsewhere; the record itself when nothing."""
        return self._known.get((type(record), record.id), record)  # type: ignore[return-value]

    def add(self, record: R) -> R:
        """Insert now; the record comes back with its id."""
        codec = CODECS[type(record)]
        row = codec.encode(record)
        if codec.numbered:
            row.pop("id")
        result = self._connection.execute(insert(codec.table), row)
        if codec.numbered:
            assert result.inserted_primary_key is not None
            record = replace(record, id=result.inserted_primary_key[0])
        if not isinstance(record, Event):
            self.changes.append(record)
            self._known[(type(record), record.id)] = record
        return record

    def add_later(self, record: Record | Event) -> None:
        """Insert when the transaction ends, together with its like; for rows whose id nobody needs before."""
        self._inserts.setdefault(type(record), []).append(record)

    def put(self, record: Stored) -> Stored:
        """Update the row if it still has `record.version`; the record comes back with the version it will have.

        Putting the same row several times in one transaction writes it once, as it was put last.
        """
        assert not isinstance(record, Event)
        key = (type(record), record.id)
        pending = self._updates.get(key)
        if pending is not None:
            if record.version != pending.version:
                raise Conflict(f"{CODECS[type(record)].kind} {record.id} was changed within this transaction")
            self._updates[key] = self._known[key] = record
            return record
        stored = replace(record, version=record.version + 1)
        self._updates[key] = self._known[key] = stored
        return stored

    def remove(self, cls: type[R], *where: ColumnElement[bool]) -> int:
        """Delete rows that nobody follows any more; gives their number."""
        self.flush()
        self._known.clear()
        return self._connection.execute(delete(CODECS[cls].table).where(*where)).rowcount

    def flush(self) -> None:
        """Send what is gathered."""
        self._flush_inserts()
        self._flush_updates()

    def _flush_inserts(self) -> None:
        inserts, self._inserts = self._inserts, {}
        for cls, records in inserts.items():
            codec = CODECS[cls]
            rows = [codec.encode(record) for record in records]
            for row in rows:
                row.pop("id")
            if cls is Event:
                self.events += records  # type: ignore[arg-type]
                self._connection.execute(insert(codec.table), rows)
                continue
            ids = self._connection.execute(
                insert(codec.table).returning(codec.table.c.id, sort_by_parameter_order=True), rows
            ).scalars()
            self.changes.extend(replace(record, id=given) for record, given in zip(records, ids, strict=True))

    def _flush_updates(self) -> None:
        updates, self._updates = self._updates, {}
        by_class: dict[type, list[Record]] = {}
        for (cls, _), record in updates.items():
            by_class.setdefault(cls, []).append(record)
        for cls, records in by_class.items():
            self._write(cls, sorted(records, key=lambda record: record.id))
            self.changes.extend(records)

    def _write(self, cls: type, records: Sequence[Record]) -> None:
        codec = CODECS[cls]
        rows = []
        for record in records:
            row = codec.encode(record)
            row["b_id"] = row.pop("id")
            row["b_version"] = record.version - 1
            rows.append(row)
        written = self._connection.execute(_update(cls), rows).rowcount
        if written != len(records):
            names = ", ".join(str(record.id) for record in records[:5])
            raise Conflict(f"{codec.kind} {names} was changed by somebody else in the meantime")

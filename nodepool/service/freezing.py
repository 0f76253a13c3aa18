"""Freezing: nothing is given out or wiped until an operator has looked; and how far a database has come."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from nodepool.model import Event, Status
from nodepool.plan import Catalog
from nodepool.plan.guard import FREEZE
from nodepool.service.images import database_id
from nodepool.store import Tx
from nodepool.store import tables as t

REMEDY = (
    "its nodes may be other ones than run on the machines: see to it that no machine in use is wiped"
    " (accept: false, or take it out of the YAML), then: nodepool thaw"
)


class Mark(NamedTuple):
    """Which database it is and the id of its newest event: an older copy of it has a smaller one."""

    database: str
    event: int


def mark(tx: Tx) -> Mark:
    """How far this database has come."""
    newest = tx.select(Event, order=t.events.c.id.desc(), limit=1)
    return Mark(database_id(tx), newest[0].id if newest else 0)


def check(tx: Tx, last: Mark | None) -> str:
    """Freeze when this is not the database that was at `last`, or an older copy of it; gives why, "" when all is well.

    None: nobody knows of an earlier one.
    """
    here = mark(tx)
    if last is None:
        return ""
    if here.database != last.database:
        why = f"the database is another one than nodepool had here before (a new one?); {REMEDY}"
    elif here.event < last.event:
        lost = last.event - here.event
        why = f"the database is older than it was: restored from a copy, it lacks the last {lost} events; {REMEDY}"
    else:
        return ""
    freeze(tx, why)
    return why


def freeze(tx: Tx, why: str) -> None:
    """From here on no step is begun, no node given out; what agents are at already goes on."""
    _put(tx, why, {})
    _note(tx, "frozen", why)


def thaw(tx: Tx, catalog: Catalog, actor: str) -> str:
    """Go on; what was held back on account of this generation of the YAML is let go.  Gives why it was frozen."""
    why = frozen(tx)
    _put(tx, "", {"let_go": catalog.config.generation})
    _note(tx, "thawed", f"goes on with generation {catalog.config.generation} of the YAML", actor)
    return why


def frozen(tx: Tx) -> str:
    """Why nothing is given out or wiped; "" when that is not so."""
    row = tx.find(Status, FREEZE)
    return row.text if row is not None else ""


def _put(tx: Tx, text: str, data: dict[str, str]) -> None:
    row = tx.find(Status, FREEZE)
    if row is None:
        tx.add(Status(FREEZE, text, tx.now, data))
    else:
        tx.put(replace(row, text=text, at=tx.now, data=data))


def _note(tx: Tx, type_: str, message: str, actor: str = "") -> None:
    tx.add_later(Event(0, tx.now, type_, "daemon", "nodepool", message, actor=actor or "nodepool"))

"""Moving rows through their lifecycles: the state, the row and the event of it in one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any, TypeVar

from nodepool.lifecycle import advance
from nodepool.model import Build, Event, Machine, Node, Request, Work
from nodepool.store import Tx

Living = TypeVar("Living", Node, Machine, Request, Build)


def move(tx: Tx, record: Living, event: StrEnum, why: str = "", actor: str = "", **changes: Any) -> Living:
    """Advance `record` by `event`, with other fields changed at the same time; stores it and the event of it.

    Raises IllegalTransition when the lifecycle has no such transition; nothing is changed then.
    """
    moved = replace(advance(record, event, tx.now), **changes)
    stored = tx.put(moved)
    note(tx, stored, str(event), why, actor, from_state=str(record.state), to_state=str(stored.state))
    return stored


def note(
    tx: Tx,
    record: Machine | Node | Request | Build,
    type_: str,
    message: str = "",
    actor: str = "",
    **more: str | Mapping[str, Any],
) -> None:
    """Write an event about `record`; `more` are further columns of the event."""
    kind = type(record).__name__.lower()
    name = record.name if isinstance(record, Machine) else str(record.id)
    links: dict[str, Any] = {}
    if isinstance(record, Machine):
        links = {"machine_id": record.id, "node_id": record.node_id}
    elif isinstance(record, Node):
        links = {"machine_id": record.machine_id, "node_id": record.id, "request_id": record.request_id}
    elif isinstance(record, Request):
        links = {"request_id": record.id}
    tx.add_later(
        Event(
            id=0,
            time=tx.now,
            type=type_,
            subject_kind=kind,
            subject_id=name,
            message=message,
            actor=actor or "nodepool",
            **links,
            **more,  # type: ignore[arg-type]
        )
    )


def started(now: int) -> Work:
    """Work that the launcher is to begin at once."""
    return Work(since=now, next_at=now, deadline=now, waiting="to be taken up")

"""Records as rows and back: one codec per record, made from the record's own fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Generic, TypeVar

from sqlalchemy import String, Table

from nodepool import model
from nodepool.store import tables

R = TypeVar("R")
Row = Mapping[Any, Any]

_WORK_COLUMNS = {
    "step": "step",
    "since": "step_since",
    "deadline": "deadline",
    "attempt": "attempt",
    "next_at": "next_at",
    "waiting": "waiting",
    "error": "error",
    "code": "code",
}


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=dict)


def _wanted(text: str) -> tuple[model.Wanted, ...]:
    return tuple(model.Wanted(label, count) for label, count in json.loads(text))


# field -> (to the column, from the column); every other field is stored as it is
_SPECIAL: Mapping[tuple[type, str], tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    (model.Machine, "state"): (str, model.MachineState),
    (model.Machine, "accepted"): (int, bool),
    (model.Machine, "retired"): (int, bool),
    (model.Machine, "facts"): (_dump, json.loads),
    (model.Node, "state"): (str, model.NodeState),
    (model.Request, "state"): (str, model.RequestState),
    (model.Request, "wanted"): (lambda wanted: _dump([[w.label, w.count] for w in wanted]), _wanted),
    (model.Request, "ssh_keys"): (_dump, lambda text: tuple(json.loads(text))),
    (model.Build, "state"): (str, model.BuildState),
    (model.Build, "files"): (_dump, json.loads),
    (model.Build, "starts"): (_dump, json.loads),
    (model.Boot, "state"): (str, model.BootState),
    (model.Operation, "state"): (str, model.OperationState),
    (model.Operation, "by_agent"): (int, bool),
    (model.Operation, "params"): (_dump, json.loads),
    (model.Operation, "result"): (_dump, json.loads),
    (model.Event, "data"): (_dump, json.loads),
    (model.Status, "data"): (_dump, json.loads),
}


@dataclass(frozen=True)
class Codec(Generic[R]):
    """How one kind of record is stored: `encode` gives every column, `decode` takes a row's mapping."""

    kind: str
    table: Table
    encode: Callable[[R], dict[str, Any]]
    decode: Callable[[Row], R]
    numbered: bool  # ids are given by the database


def _codec(kind: str, cls: type[R], table: Table) -> Codec[R]:
    plain, work = [], False
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name == "work":
            work = True
        else:
            plain.append(item.name)
    columns = [*plain, *(_WORK_COLUMNS.values() if work else ())]
    attributes = [*plain, *(f"work.{name}" for name in _WORK_COLUMNS if work)]
    read = attrgetter(*attributes)
    special = [(name, *codec) for (owner, name), codec in _SPECIAL.items() if owner is cls]
    limits = [(c.name, c.type.length) for c in table.columns if isinstance(c.type, String) and c.type.length]
    clipped = [(name, length) for name, length in limits if length in (500, 1000)]  # sentences; names are checked

    def encode(record: R) -> dict[str, Any]:
        row = dict(zip(columns, read(record), strict=True))
        for name, to_column, _ in special:
            row[name] = to_column(row[name])
        for name, length in clipped:
            if len(row[name]) > length:
                row[name] = row[name][: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
        return row

    def decode(row: Row) -> R:
        values = {name: row[name] for name in plain}
        for name, _, from_column in special:
            values[name] = from_column(values[name])
        if work:
            values["work"] = model.Work(*(row[column] for column in _WORK_COLUMNS.values()))
        return cls(**values)

    return Codec(kind, table, encode, decode, table.c.id.autoincrement is True)


CODECS: Mapping[type, Codec[Any]] = {
    cls: _codec(kind, cls, table)
    for kind, cls, table in (
        ("machine", model.Machine, tables.machines),
        ("node", model.Node, tables.nodes),
        ("request", model.Request, tables.requests),
        ("request node", model.RequestNode, tables.request_nodes),
        ("build", model.Build, tables.builds),
        ("copy", model.Copy, tables.copies),
        ("boot", model.Boot, tables.boots),
        ("operation", model.Operation, tables.operations),
        ("event", model.Event, tables.events),
        ("owner", model.Owner, tables.owners),
        ("status", model.Status, tables.status),
    )
}

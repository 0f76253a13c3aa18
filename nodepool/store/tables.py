"""The tables.  What the planner filters on is a column; what only people and agents read may be JSON."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, String, Table, Text
from sqlalchemy.dialects.mysql import LONGTEXT

metadata = MetaData()

# AUTOINCREMENT exists in SQLite for INTEGER alone (64 bits there); ids are never used twice.
_Id = BigInteger().with_variant(Integer, "sqlite")
_Json = Text().with_variant(LONGTEXT(), "mysql", "mariadb")
_OPTIONS: dict[str, Any] = {"sqlite_autoincrement": True, "mysql_engine": "InnoDB", "mysql_charset": "utf8mb4"}


def _id() -> Column[int]:
    return Column("id", _Id, primary_key=True, autoincrement=True)


def _key(length: int) -> Column[str]:
    return Column("id", String(length), primary_key=True)


def _int(name: str, default: int = 0) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default=str(default))


def _ref(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=True)


def _text(name: str, length: int = 255) -> Column[str]:
    return Column(name, String(length), nullable=False, server_default="")


def _long(name: str, default: str | None = None) -> Column[str]:
    return Column(name, _Json, nullable=False, server_default=default)


def _work() -> list[Column[int] | Column[str]]:
    return [
        _text("step", 40),
        _int("step_since"),
        _int("deadline"),
        _int("attempt", 1),
        _int("next_at"),
        _text("waiting", 500),
        _text("error", 1000),
        _text("code", 40),
    ]


machines = Table(
    "machines",
    metadata,
    _id(),
    Column("name", String(255), nullable=False, unique=True),
    _text("provider"),
    _text("state", 20),
    _int("since"),
    _int("enrolled_at"),
    *_work(),
    _text("power_wanted", 8),
    _text("power_observed", 8),
    _int("power_seen_at"),
    _int("accepted"),
    _text("accepted_by"),
    _int("accepted_at"),
    _text("maintenance", 500),
    _text("maintenance_by"),
    _int("retired"),
    _text("origin", 20),
    _text("declared", 20),
    _int("strikes"),
    _ref("node_id"),
    _ref("boot_id"),
    _long("facts"),
    _text("failure", 1000),
    _text("failure_code", 40),
    _text("failure_phase", 40),
    _int("version"),
    **_OPTIONS,
)

nodes = Table(
    "nodes",
    metadata,
    _id(),
    _text("label"),
    _text("provider"),
    _text("pool"),
    _int("machine_id"),
    _text("machine"),
    _text("image"),
    _text("build_id", 40),
    _text("config_generation", 20),
    _text("state", 20),
    _int("since"),
    _int("created_at"),
    *_work(),
    _int("ready_at"),
    _int("failed_at"),
    _text("hostname"),
    _text("address", 64),
    _int("port", 22),
    _text("username", 64),
    _text("host_key", 1000),
    _text("os_boot_id", 64),
    _text("started_by", 20),
    _ref("request_id"),
    _text("comment", 1000),
    _text("held_by"),
    _int("hold_until"),
    _text("failure", 1000),
    _text("failure_code", 40),
    _text("failure_phase", 40),
    _int("version"),
    Index("nodes_state", "state"),
    Index("nodes_label_failed", "label", "failed_at"),
    Index("nodes_machine", "machine_id"),
    **_OPTIONS,
)

requests = Table(
    "requests",
    metadata,
    _id(),
    Column("client_token", String(64), nullable=False, unique=True),
    _long("wanted"),
    _text("state", 20),
    _int("since"),
    _int("created_at"),
    *_work(),
    _text("tenant"),
    _text("requestor"),
    _int("priority", 100),
    _long("ssh_keys"),
    _int("version"),
    Index("requests_state", "state"),
    **_OPTIONS,
)

request_nodes = Table(
    "request_nodes",
    metadata,
    _id(),
    _int("request_id"),
    _int("position"),
    _text("label"),
    _int("node_id"),
    _int("version"),
    Index("request_nodes_position", "request_id", "position", unique=True),
    Index("request_nodes_node", "node_id"),
    **_OPTIONS,
)

builds = Table(
    "builds",
    metadata,
    _key(40),
    _text("image"),
    _text("state", 20),
    _int("since"),
    _int("created_at"),
    *_work(),
    _text("builder"),
    _text("requested_by"),
    _long("files"),
    _int("size"),
    _text("sha256", 64),
    Column("seconds", Float, nullable=False, server_default="0"),
    _long("starts", "{}"),
    _text("log", 1000),
    _int("finished_at"),
    _int("version"),
    Index("builds_image_state", "image", "state"),
    **_OPTIONS,
)

copies = Table(
    "copies",
    metadata,
    _id(),
    _text("build_id", 40),
    _text("image"),
    _text("provider"),
    _text("state", 20),
    _int("created_at"),
    _text("name"),
    _text("external_id"),
    _int("version"),
    Index("copies_build", "build_id"),
    **_OPTIONS,
)

boots = Table(
    "boots",
    metadata,
    _id(),
    _int("machine_id"),
    Column("token", String(64), nullable=False, unique=True),
    _text("state", 20),
    _int("minted_at"),
    _ref("node_id"),
    _text("nonce", 64),
    _text("agent_boot_id", 64),
    _text("address", 64),
    _int("hello_at"),
    _int("seen_at"),
    _int("ended_at"),
    _text("error", 1000),
    _int("version"),
    Index("boots_machine", "machine_id"),
    **_OPTIONS,
)

operations = Table(
    "operations",
    metadata,
    _id(),
    _int("machine_id"),
    _text("kind", 40),
    _text("state", 20),
    _int("created_at"),
    _ref("node_id"),
    _ref("boot_id"),
    _text("job", 20),
    _int("attempt", 1),
    _int("by_agent"),
    _text("phase_now", 40),
    _long("params"),
    _int("done"),
    _int("total"),
    _long("result"),
    _text("error", 1000),
    _text("code", 40),
    _int("changed_at"),
    _int("finished_at"),
    _int("version"),
    Index("operations_machine", "machine_id", "state"),
    Index("operations_node", "node_id"),
    **_OPTIONS,
)

events = Table(
    "events",
    metadata,
    _id(),
    _int("time"),
    _text("type", 40),
    _text("subject_kind", 20),
    _text("subject_id", 64),
    _text("message", 1000),
    _text("code", 40),
    _ref("machine_id"),
    _ref("node_id"),
    _ref("request_id"),
    _ref("operation_id"),
    _text("actor"),
    _text("from_state", 20),
    _text("to_state", 20),
    _long("data"),
    Index("events_time", "time"),
    Index("events_subject", "subject_kind", "subject_id"),
    Index("events_machine", "machine_id"),
    Index("events_node", "node_id"),
    Index("events_request", "request_id"),
    **_OPTIONS,
)

owners = Table(
    "owners",
    metadata,
    _key(64),
    _int("epoch"),
    _text("holder"),
    _int("lease_until"),
    _int("version"),
    **_OPTIONS,
)

status = Table(
    "status",
    metadata,
    _key(64),
    _text("text", 1000),
    _int("at"),
    _long("data"),
    _int("version"),
    **_OPTIONS,
)

"""The listing commands: columns as upstream's Nodepool 11 has them, then what each thing is at."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from nodepool.clock import age
from nodepool.cmd.cli_output import output
from nodepool.cmd.client import Client
from nodepool.cmd.tables import table

Item = dict[str, Any]
Column = tuple[str, Callable[[Item], object]]

WIDEST = 72  # characters of a sentence in a table; `show` and JSON have all of it


def nodes(client: Client, args: argparse.Namespace) -> int:
    """`list`."""
    query = {"label": args.label, "state": args.state, "provider": args.provider}
    found = client.items("/nodes", **query, detail="true" if args.detail else "")
    columns = [*_NODE, *_NODE_DETAIL] if args.detail else _NODE
    return _print(args, found, [*columns, ("Doing", _doing)])


def machines(client: Client, args: argparse.Namespace) -> int:
    """`machine-list`."""
    return _print(args, client.items("/machines"), _MACHINE)


def images(client: Client, args: argparse.Namespace) -> int:
    """`image-list`."""
    return _print(args, client.items("/images"), _IMAGE)


def builds(client: Client, args: argparse.Namespace) -> int:
    """`dib-image-list`."""
    return _print(args, client.items("/builds"), _BUILD)


def requests(client: Client, args: argparse.Namespace) -> int:
    """`request-list`."""
    return _print(args, client.items("/requests", state=args.state), _REQUEST)


def _print(args: argparse.Namespace, items: Sequence[Item], columns: Sequence[Column]) -> int:
    def text() -> str:
        return table([name for name, _ in columns], [[value(item) for _, value in columns] for item in items])

    return output(args, items, text)


def short(text: str) -> str:
    """A sentence, cut to what a table can hold."""
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "\N{HORIZONTAL ELLIPSIS}"


def wanted(item: Item) -> str:
    """The labels of a request: `small=2,large`."""
    return ",".join(
        f"{want['label']}={want['count']}" if want["count"] > 1 else want["label"] for want in item["wanted"]
    )


def _doing(item: Item) -> str:
    trouble = item.get("trouble")
    failure = item.get("failure") or (f"{trouble['phase']}: {trouble['reason']}" if trouble else "")
    broken = item["state"] in {"failed", "broken"}
    return short(failure if broken and failure else item["at"])


def _get(key: str) -> Callable[[Item], object]:
    return lambda item: item[key]


def _none(_: Item) -> str:
    """A column of upstream's that has no counterpart here."""
    return ""


def _age(item: Item) -> str:
    return age(item["age"])


_NODE: tuple[Column, ...] = (
    ("ID", _get("id")),
    ("Provider", _get("provider")),
    ("Label", _get("label")),
    ("Server ID", _get("machine")),
    ("Public IPv4", lambda item: "" if ":" in item["address"] else item["address"]),
    ("IPv6", lambda item: item["address"] if ":" in item["address"] else ""),
    ("State", _get("state")),
    ("Age", _age),
    ("Locked", lambda item: "locked" if item["locked"] else "unlocked"),
)
_NODE_DETAIL: tuple[Column, ...] = (
    ("Pool", _get("pool")),
    ("Hostname", _get("hostname")),
    ("Private IPv4", _none),
    ("AZ", _none),
    ("Username", _get("username")),
    ("Port", _get("port")),
    ("Launcher", _none),
    ("Allocated To", _get("request_id")),
    ("Hold Job", _none),
    ("Comment", _get("comment")),
    ("User Data", _none),
    ("Driver Data", _get("build_id")),
    ("Held By", _get("held_by")),
    ("Hold Until", _get("hold_until")),
)
_MACHINE: tuple[Column, ...] = (
    ("Name", _get("name")),
    ("Provider", _get("provider")),
    ("Pool", _get("pool")),
    ("Rack", _get("rack")),
    ("State", _get("state")),
    ("Power", _get("power")),
    ("Node", _get("node_id")),
    ("Strikes", _get("strikes")),
    ("Age", _age),
    ("Doing", _doing),
)
_IMAGE: tuple[Column, ...] = (
    ("Build ID", _get("build_id")),
    ("Upload ID", _get("id")),
    ("Provider", _get("provider")),
    ("Image", _get("image")),
    ("Provider Image Name", _get("name")),
    ("Provider Image ID", _get("external_id")),
    ("State", _get("state")),
    ("Age", _age),
    ("Doing", lambda item: short(item["at"])),
)
_BUILD: tuple[Column, ...] = (
    ("ID", lambda item: f"{item['image']}-{item['id']}"),
    ("Image", _get("image")),
    ("Builder", _get("builder")),
    ("Formats", lambda item: ",".join(item["formats"])),
    ("State", _get("state")),
    ("Age", _age),
    ("Doing", _doing),
)
_REQUEST: tuple[Column, ...] = (
    ("Request ID", _get("id")),
    ("Priority", _get("priority")),
    ("State", _get("state")),
    ("Requestor", _get("requestor")),
    ("Node Types", wanted),
    ("Nodes", lambda item: ",".join(node["id"] for node in item["nodes"])),
    ("Declined By", _none),
    ("Event ID", _none),
    ("Age", _age),
    ("Waiting For", lambda item: short("; ".join(item["waiting_for"]) or item["error"])),
)

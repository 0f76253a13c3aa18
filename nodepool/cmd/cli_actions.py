"""The commands that change something: ask for nodes, give them back, have things built or looked at."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from nodepool.cmd.cli_output import output
from nodepool.cmd.cli_shows import request_nodes, request_text
from nodepool.cmd.client import DONE, FAILED, USAGE, Client, CommandError, part
from nodepool.cmd.tables import plain

Item = dict[str, Any]

LOOK_EVERY = 5.0  # seconds between two looks at the progress; the end is told at once
_UNSETTLED = ("requested", "pending")


def request(client: Client, args: argparse.Namespace) -> int:
    """`request`: queue it and, with --wait, stay until it is fulfilled."""
    body = {
        "nodes": [{"label": label, "count": count} for label, count in args.labels],
        "client_token": os.urandom(16).hex(),
        "requestor": args.requestor,
        "priority": args.priority,
        "ssh_keys": [key for path in args.ssh_key for key in _keys(path)],
    }
    made: Item = client.post("/requests", body)
    if args.wait is None:
        return _output(args, made, f"request {made['id']} is queued; nodepool request-show {made['id']} follows it")
    try:
        made = _wait(client, made, args.wait)
    except KeyboardInterrupt:
        print(f"\n{_stays(made)}", file=sys.stderr)
        return FAILED
    if made["state"] in _UNSETTLED:
        raise CommandError(f"not fulfilled within {args.wait:g} s: {_stays(made)}")
    text = "\n".join([f"request {made['id']} is {made['state']}", *request_nodes(made["nodes"])])
    if made["state"] == "fulfilled":
        return _output(args, made, text)
    _output(args, made, request_text(made))
    raise CommandError(f"request {made['id']} is {made['state']}" + (f": {made['error']}" if made["error"] else ""))


def _wait(client: Client, made: Item, seconds: float) -> Item:
    """Follow a request until it is settled or `seconds` are over, telling on stderr what it waits for."""
    until = time.monotonic() + seconds
    told = ""
    print(f"request {made['id']} is queued", file=sys.stderr)
    while made["state"] in _UNSETTLED and (left := until - time.monotonic()) > 0:
        wait = min(LOOK_EVERY if told else 1.0, left)
        made = client.get(f"/requests/{made['id']}", wait=f"{wait:.3f}")
        doing = "; ".join(made["waiting_for"])
        if doing and doing != told:
            print(f"request {made['id']}: {plain(doing)}", file=sys.stderr)
            told = doing
    return made


def _stays(made: Item) -> str:
    number = made["id"]
    return (
        f"request {number} stays queued. nodepool request-show {number} shows it,"
        f" nodepool release --request {number} cancels it"
    )


def _keys(path: str) -> list[str]:
    """The public keys in a file; a private key is refused before it leaves this process."""
    from nodepool.api.keys import public_keys

    try:
        return public_keys(Path(path).read_text())
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: this is no file of public SSH keys", USAGE) from error
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}; give the file of a public SSH key", USAGE) from error
    except ValueError as error:
        raise CommandError(f"{path}: {error}", USAGE) from error


def release(client: Client, args: argparse.Namespace) -> int:
    """`release NODE...` or `release --request ID`."""
    if args.request:
        if args.nodes:
            raise CommandError("give node ids or --request, not both", USAGE)
        item = client.delete(f"/requests/{part(args.request)}")
        return _output(args, item, f"request {item['id']} is {item['state']}")
    if not args.nodes:
        raise CommandError("give the ids of the nodes (nodepool list), or --request ID", USAGE)
    return _each(args, args.nodes, lambda node: client.post(f"/nodes/{part(node)}/release"))


def delete(client: Client, args: argparse.Namespace) -> int:
    """`delete NODE...`."""
    return _each(args, args.nodes, lambda node: client.delete(f"/nodes/{part(node)}"))


def hold(client: Client, args: argparse.Namespace) -> int:
    """`hold NODE... --reason TEXT [--until TIME|DURATION]`, `hold --off NODE...`."""
    if args.off:
        if args.reason or args.until:
            raise CommandError("--off ends a hold: it goes without --reason and --until", USAGE)
        return _each(args, args.nodes, lambda node: client.delete(f"/nodes/{part(node)}/hold"))
    if not args.reason:
        raise CommandError("say what it is held for: --reason TEXT (or end a hold: --off)", USAGE)
    body = {"reason": args.reason, **(args.until or {})}
    return _each(args, args.nodes, lambda node: client.post(f"/nodes/{part(node)}/hold", body))


def _each(args: argparse.Namespace, nodes: list[str], act: Any) -> int:
    """Act on every node, also when one of them fails; the first failure gives the exit status."""
    items, status = [], DONE
    for node in nodes:
        try:
            item = act(node)
        except CommandError as error:
            print(f"nodepool: {error}", file=sys.stderr)
            status = status or error.status
            continue
        items.append(item)
        if args.format == "table":
            held = f" (held by {item['held_by']}: {item['comment']})" if item["state"] == "hold" else ""
            print(plain(f"node {item['id']} is {item['state']}{held}"))
    if args.format != "table":
        output(args, items, str)
    return status


def image_build(client: Client, args: argparse.Namespace) -> int:
    """`image-build`."""
    item = client.post(f"/images/{part(args.image)}/builds")
    return _output(args, item, f"{item['image']}-{item['id']} is {item['state']}; nodepool dib-image-list follows it")


def dib_image_delete(client: Client, args: argparse.Namespace) -> int:
    """`dib-image-delete`: the id as dib-image-list shows it, or the build's alone."""
    item = client.delete(f"/builds/{part(args.build.rpartition('-')[2])}")
    return _output(args, item, f"{item['image']}-{item['id']} is {item['state']}")


def machine_inspect(client: Client, args: argparse.Namespace) -> int:
    """`machine-inspect`."""
    item = client.post(f"/machines/{part(args.machine)}/inspect")
    return _output(args, item, f"machine {item['name']} is {item['state']}")


def thaw(client: Client, args: argparse.Namespace) -> int:
    """`thaw`."""
    item = client.post("/thaw")
    return _output(args, item, "it goes on" + (f"; it was frozen: {item['was']}" if item["was"] else ""))


def _output(args: argparse.Namespace, item: Item, text: str) -> int:
    return output(args, item, lambda: text)

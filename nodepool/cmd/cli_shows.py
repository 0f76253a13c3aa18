"""The commands that show one thing whole: what it is at, what went wrong, where its time went."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nodepool.clock import age
from nodepool.cmd.cli_lists import short, wanted
from nodepool.cmd.cli_output import output
from nodepool.cmd.cli_ssh import ALIVE
from nodepool.cmd.client import NOT_FOUND, Client, CommandError, part
from nodepool.cmd.tables import pairs, plain, state, table

Item = dict[str, Any]
Pair = tuple[str, object]


def show(client: Client, args: argparse.Namespace) -> int:
    """`show`: digits are a node's id, anything else a machine's name (as are digits that are no node's)."""
    name = args.name
    if name.isdecimal():
        try:
            return _output(args, client.get(f"/nodes/{name}"), _node)
        except CommandError as error:
            if error.status != NOT_FOUND:
                raise
    try:
        return _output(args, client.get(f"/machines/{part(name)}"), _machine)
    except CommandError as error:
        if error.status != NOT_FOUND:
            raise
        what = "node or machine" if name.isdecimal() else "machine"
        hint = "nodepool list shows the nodes, nodepool machine-list the machines"
        raise CommandError(f"there is no {what} {plain(name)}; {hint}", NOT_FOUND) from error


def request(client: Client, args: argparse.Namespace) -> int:
    """`request-show`."""
    return _output(args, client.get(f"/requests/{part(args.request)}"), request_text)


def explain(client: Client, args: argparse.Namespace) -> int:
    """`explain`."""
    return _output(args, client.get(f"/labels/{part(args.label)}/explain"), _explain)


def status(client: Client, args: argparse.Namespace) -> int:
    """`status`."""
    return _output(args, client.get("/status"), lambda item: "\n".join(_tree(item)))


def _output(args: argparse.Namespace, item: Item, text: Any) -> int:
    return output(args, item, lambda: str(text(item)))


def _node(item: Item) -> str:
    ready = f"; ready after {item['ready_seconds']:.1f} s" if item["ready_seconds"] is not None else ""
    port = f" -p {item['port']}" if item["port"] != 22 else ""
    login = f"ssh{port} {item['username']}@{item['address']}, or: nodepool ssh {item['id']}"
    head = f"node {item['id']}: {state(item['state'])} for {age(item['age'])}"
    facts: list[Pair] = [
        ("label", f"{item['label']} (image {item['image']}, build {item['build_id']})"),
        ("machine", f"{item['machine']} (provider {item['provider']}, pool {item['pool']})"),
        ("login", login if item["state"] in ALIVE else ""),
        ("host key", item["host_key"]),
        ("request", item["request_id"]),
        ("comment", "" if item["state"] == "hold" else item["comment"]),
        ("created", f"{item['created_at']}{ready}; {item['total_seconds']:.1f} s in all"),
        ("now", item["at"]),
        *_trouble(item["trouble"]),
    ]
    return "\n".join([head, pairs(facts), *_timeline(item["timeline"]), *_history(item["events"])])


def _machine(item: Item) -> str:
    head = f"machine {item['name']}: {state(item['state'])} for {age(item['age'])}"
    power = item["power"] or "not read yet"
    if item["power_seen_at"]:
        power += f" since {item['power_seen_at']}"
    facts: list[Pair] = [
        ("provider", f"{item['provider']}, pool {item['pool'] or 'none'}"),
        ("rack", item["rack"]),
        ("bmc", item["bmc"]),
        ("interfaces", ", ".join(f"{nic['mac']} {nic['ip']}" for nic in item["interfaces"])),
        ("power", power),
        ("accepted", _accepted(item)),
        ("retired", "the YAML does not have it any more" if item["retired"] else ""),
        ("maintenance", item["maintenance"]),
        ("strikes", item["strikes"] or ""),
        ("node", item["node_id"]),
        ("hardware", _hardware(item["facts"])),
        ("spent", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in item["spent"].items())),
        ("now", item["at"]),
        *_trouble(item["trouble"]),
    ]
    return "\n".join(
        [head, pairs(facts), *_timeline(item["timeline"]), *_lives(item["lives"]), *_events(item["events"])]
    )


def _accepted(item: Item) -> str:
    if item["accepted_by"]:
        return f"by {item['accepted_by']} at {item['accepted_at']}"
    return "in the YAML" if item["accepted"] else "no"


def _hardware(facts: Mapping[str, str]) -> str:
    told = [f"{facts['fact.cpus']} CPUs"] if "fact.cpus" in facts else []
    if facts.get("fact.memory", "").isdecimal():
        told.append(f"{int(facts['fact.memory']) / 2**30:.1f} GiB")
    for key, name in facts.items():
        if key.startswith("disk.") and key.endswith(".name"):
            size = facts.get(key.removesuffix("name") + "size", "")
            told.append(f"disk {name}" + (f" {int(size) / 1e9:.1f} GB" if size.isdecimal() else ""))
    return ", ".join(told)


def _trouble(trouble: Item | None) -> list[Pair]:
    """What failed where, with the code, whose fault it is, and what happens next."""
    if trouble is None:
        return []
    blame = ", ".join(filter(None, (trouble["code"], trouble["fault"] and f"fault of the {trouble['fault']}")))
    phase = f"{trouble['phase']}: " if trouble["phase"] else ""
    return [
        ("failed", f"{phase}{trouble['reason']}" + (f" [{blame}]" if blame else "")),
        ("next", trouble["next"]),
    ]


def _timeline(phases: Sequence[Item]) -> list[str]:
    if not phases:
        return []
    rows = [
        (item["state"], item["phase"], item["attempt"], item["started"], f"{item['seconds']:.1f}", _result(item))
        for item in phases
    ]
    return ["", table(("State", "Phase", "Attempt", "Started", "Seconds", "Result"), rows)]


def _result(item: Item) -> str:
    progress = item["progress"]
    if item["result"] == "running" and progress:
        share = f" {100 * progress['done'] // progress['total']}%" if progress["total"] else ""
        return f"running{share}" + (f" ({progress['phase']})" if progress["phase"] else "")
    error = f": {short(item['error'])}" if item["error"] else ""
    return f"{item['result']}{error}"


def _lives(lives: Sequence[Item]) -> list[str]:
    if not lives:
        return []
    rows = [
        (
            item["id"],
            item["label"],
            item["state"],
            item["created_at"],
            "" if item["ready_seconds"] is None else f"{item['ready_seconds']:.1f}",
            f"{item['total_seconds']:.1f}",
            short(item["failure"]),
        )
        for item in lives
    ]
    return ["", table(("Node", "Label", "State", "Created", "Ready After", "Seconds", "Failure"), rows)]


def _history(events: Sequence[Item]) -> list[str]:
    """What happened to a node, how many seconds after it was begun, and who did it."""
    rows = [
        (
            item["time"],
            f"{item['seconds']:.1f}",
            f"{item['from']} -> {item['to']}" if item["from"] else item["to"] or item["type"],
            item["actor"],
            short(item["message"]),
        )
        for item in events
    ]
    return ["", table(("Time", "After", "Happened", "Who", "Why"), rows)] if rows else []


def _events(events: Sequence[Item]) -> list[str]:
    rows = [
        (
            item["time"],
            item["subject"],
            f"{item['from']} -> {item['to']}" if item["to"] else item["type"],
            item["message"],
        )
        for item in events
    ]
    return ["", table(("Time", "What", "Happened", "Why"), rows)] if rows else []


def request_text(item: Item) -> str:
    """A request, and how to log in to what it was given."""
    facts: list[Pair] = [
        ("wants", wanted(item)),
        ("requestor", item["requestor"]),
        ("tenant", item["tenant"]),
        ("priority", item["priority"]),
        ("ssh keys", item["ssh_keys"] or ""),
        ("created", item["created_at"]),
        ("failed", item["error"]),
        *(("waits for", reason) for reason in item["waiting_for"]),
    ]
    head = f"request {item['id']}: {state(item['state'])} for {age(item['age'])}"
    return "\n".join([head, pairs(facts), *request_nodes(item["nodes"])])


def request_nodes(nodes: Sequence[Item]) -> list[str]:
    """The nodes of a request: address, user and host key."""
    if not nodes:
        return []
    rows = [
        (n["id"], n["label"], n["machine"], n["address"], n["port"], n["username"], n["state"], n["host_key"])
        for n in nodes
    ]
    return ["", table(("Node", "Label", "Machine", "Address", "Port", "User", "State", "Host Key"), rows)]


def _explain(item: Item) -> str:
    have = ", ".join(f"{count} {state}" for state, count in item["have"].items()) or "none"
    wanted_now = f"{item['wanted']} (min-ready {item['min_ready']}, requested {item['requested']})"
    facts: list[Pair] = [
        ("wanted", wanted_now),
        ("have", f"{have}; {item['free']} of them free, {item['capacity']} at most"),
        *((f"building {n['id']}", f"on {n['machine']}, {n['seconds']:.0f} s: {n['at']}") for n in item["building"]),
        *((f"request {r['id']}", f"{wanted(r)} for {r['requestor']}, {r['seconds']:.0f} s") for r in item["requests"]),
        *((f"held {n['id']}", f"on {n['machine']}, {_hold(n)}") for n in item["held"]),
        *(("because", reason) for reason in item["reasons"]),
        *_image_pairs(item["images"]),
        *_pool_pairs(item["pools"]),
        *_trouble(item["trouble"]),
    ]
    return "\n".join([item["summary"], pairs(facts)])


def _hold(node: Item) -> str:
    until = f" until {node['until']}" if node["until"] else ""
    return f"by {node['by']} since {node['since']}{until}: {node['reason']}"


def _image_pairs(images: Iterable[Item]) -> list[Pair]:
    told: list[Pair] = []
    for image in images:
        ready, running = image["ready"], image["running"]
        state = f"ready since {ready['finished_at']} (build {ready['id']})" if ready else "not built yet"
        if running:
            state += f"; build {running['id']} is {running['state']} {running['at']}".rstrip()
        if image["paused"]:
            state += "; paused in the YAML"
        told += [(f"image {image['image']}", state), *_trouble(image["trouble"])]
    return told


def _pool_pairs(pools: Iterable[Item]) -> list[Pair]:
    told: list[Pair] = []
    for pool in pools:
        machines = ", ".join(f"{count} {state}" for state, count in pool["machines"].items()) or "none"
        told.append((f"pool {pool['pool']}", f"{pool['used']} of {pool['limit']} servers; machines: {machines}"))
        told += [
            (f"{broken['machine']} broken", f"{broken['phase']}: {broken['reason']} [{broken['code']}]")
            for broken in pool["broken"]
        ]
    return told


def _tree(value: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested names and values, for people."""
    lines = []
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            lines += [f"{indent}{plain(name)}:", *_tree(inner, indent + "  ")] if inner else []
        elif isinstance(inner, list):
            entries = [
                ", ".join(f"{v}" for v in entry.values()) if isinstance(entry, dict) else entry for entry in inner
            ]
            lines += [f"{indent}{plain(name)}:", *(f"{indent}  {plain(entry)}" for entry in entries)] if inner else []
        elif inner not in (None, ""):
            lines.append(f"{indent}{plain(name)}: {plain(inner)}")
    return lines

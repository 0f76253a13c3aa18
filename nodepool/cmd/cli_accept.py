"""`nodepool machine-accept`: what a machine is, and which disks go, before anybody says yes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from nodepool.cmd.cli_output import output
from nodepool.cmd.client import FAILED, REFUSED, USAGE, Client, CommandError, part
from nodepool.cmd.tables import pairs, plain, table

Item = dict[str, Any]


def machine_accept(client: Client, args: argparse.Namespace) -> int:
    """`machine-accept NAME`: shows the facts, asks, and accepts exactly what was shown."""
    path = f"/machines/{part(args.machine)}"
    if args.off:
        item = client.delete(f"{path}/accept")
        return output(args, item, lambda: f"machine {item['name']} is {_accepted(item)}")
    item = client.get(path)
    if item["accepted"]:
        return output(args, item, lambda: f"machine {item['name']} is {_accepted(item)} already")
    if not item["facts"]:
        raise CommandError(f"{item['name']} is {item['state']}: nodepool has not seen it yet, so wait", REFUSED)
    print(_shown(item), file=sys.stderr)
    if not args.yes and not _agreed(item["name"]):
        print("nothing was changed", file=sys.stderr)
        return FAILED
    item = client.post(f"{path}/accept", {"facts_id": item["facts_id"]})
    return output(args, item, lambda: f"machine {item['name']} is {_accepted(item)}")


def _agreed(name: str) -> bool:
    if not sys.stdin.isatty():
        raise CommandError("there is no terminal to ask at: say --yes when all disks may be wiped", USAGE)
    print(f"Wipe all disks of {plain(name)} now, and after each use? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _accepted(item: Item) -> str:
    if item["accepted_by"]:
        return f"accepted by {item['accepted_by']}"
    return "accepted (accept: true in the YAML)" if item["accepted"] else "not accepted"


def _shown(item: Item) -> str:
    facts = item["facts"]
    memory = facts.get("fact.memory", "")
    told = [
        ("provider", item["provider"]),
        ("bmc", item["bmc"]),
        ("hardware", " ".join(filter(None, (facts.get("fact.vendor", ""), facts.get("fact.product", ""))))),
        ("serial", facts.get("fact.serial", "")),
        ("uuid", facts.get("fact.uuid", "")),
        ("firmware", facts.get("fact.firmware", "")),
        ("cpus", facts.get("fact.cpus", "")),
        ("memory", f"{int(memory) / 2**30:.1f} GiB" if memory.isdecimal() else ""),
        *(("card", f"{nic.get('name', '')} {nic.get('mac', '')}") for nic in parts(facts, "nic")),
    ]
    disks = [
        (disk.get("name"), _gigabytes(disk.get("size", "")), disk.get("model"), disk.get("serial"), disk.get("wwn"))
        for disk in parts(facts, "disk")
    ]
    wiped = table(("Disk", "Size", "Model", "Serial", "WWN"), disks) if disks else "  none"
    return "\n".join([f"machine {item['name']}: {item['state']}", pairs(told), "", "disks that are wiped:", wiped, ""])


def parts(facts: Mapping[str, str], kind: str) -> list[dict[str, str]]:
    """The things of a kind (disk, nic) among an agent's facts (`disk.N.key=value`), by number."""
    found: dict[int, dict[str, str]] = {}
    for fact, value in facts.items():
        of, _, rest = fact.partition(".")
        number, _, key = rest.partition(".")
        if of == kind and number.isdecimal() and key:
            found.setdefault(int(number), {})[key] = value
    return [found[number] for number in sorted(found)]


def _gigabytes(size: str) -> str:
    return f"{int(size) / 1e9:.1f} GB" if size.isdecimal() else size

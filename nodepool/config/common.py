"""What all drivers' providers have in common: their keys, their pools, and how a pool finds its machines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nodepool.config import rules
from nodepool.config.problems import Item, Place
from nodepool.config.records import MachineSpec, Pool, PoolLabel, Provider, Ssh
from nodepool.config.rules import each, entries, one_of, record, table, whole
from nodepool.config.where import WhereError, facts, parse

SSH = table({}, {"user": rules.text, "key": rules.path, "port": rules.port})
PROPERTIES = entries(rules.property_name, rules.property_value)
FIRMWARE = one_of("bios", "uefi")
DEFAULT_FIRMWARE = MachineSpec("", "").firmware

POOL_LABEL = table(
    {"name": rules.name("label"), "diskimage": rules.name("diskimage")}, {"start": one_of("auto", "kexec", "reboot")}
)
POOL = table(
    {"name": rules.name("pool"), "labels": each(POOL_LABEL, least=1)},
    {"max-servers": whole(0, 1_000_000), "machines": each(rules.name("machine")), "where": rules.where},
)
REQUIRED = {"name": rules.name("provider"), "driver": rules.text, "pools": each(POOL)}
OPTIONAL = {
    "ssh": SSH,
    "boot-timeout": rules.some_duration,
    "launch-retries": whole(1, 100),
    "strikes": whole(1, 1000),
    "retry-broken": rules.some_duration,
    "park-for": rules.duration,
    "park-max": whole(0, 100_000),
}


@dataclass(frozen=True, slots=True)
class Declared:
    """A machine as far as it can be told while there are problems still."""

    name: str
    place: Place
    facts: Mapping[str, str]


def declared(provider: Item) -> Iterator[Declared]:
    """The machines under the provider's `machines`."""
    for item in provider.items("machines"):
        if item.text("name"):
            given = item.data.get("properties")
            properties = {k: v for k, v in given.items() if isinstance(v, str)} if isinstance(given, dict) else {}
            own = {
                "name": item.text("name"),
                "rack": item.text("rack"),
                "firmware": item.text("firmware") or DEFAULT_FIRMWARE,
            }
            yield Declared(item.text("name"), item.at("name"), {**properties, **own})


def chosen(pool: Mapping[str, Any], machines: Iterable[tuple[str, Mapping[str, str]]]) -> tuple[str, ...]:
    """The names of a pool's machines among the provider's (names and facts): the named, those that match, or all."""
    if isinstance(pool.get("machines"), list | tuple):
        wanted = {entry for entry in pool["machines"] if isinstance(entry, str)}
        return tuple(name for name, _ in machines if name in wanted)
    try:
        where = parse(pool["where"]) if isinstance(pool.get("where"), str) else None
    except WhereError:
        return ()
    return tuple(name for name, given in machines if where is None or where.matches(given))


def provider(values: Mapping[str, Any], machines: tuple[MachineSpec, ...], **more: Any) -> Provider:
    """The record from checked values: the common keys' and those given beside."""
    known = [(machine.name, facts(machine)) for machine in machines]
    pools = tuple(_pool(entry, values["name"], chosen(entry, known)) for entry in values["pools"])
    common = {key: values[key] for key in ("name", "driver", *OPTIONAL) if key in values and key != "ssh"}
    ssh: Ssh = record(Ssh, values.get("ssh", {}))
    result: Provider = record(Provider, common, ssh=ssh, machines=machines, pools=pools, **more)
    return result


def _pool(entry: Mapping[str, Any], of: str, machines: tuple[str, ...]) -> Pool:
    labels = tuple(record(PoolLabel, label) for label in entry["labels"])
    return Pool(entry["name"], of, max_servers=entry.get("max-servers"), machines=machines, labels=labels)

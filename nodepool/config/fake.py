"""The `fake` driver's part of the YAML: machines of thin air for the quick start, scenarios and benches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any

from nodepool.config import common, rules
from nodepool.config.problems import Item
from nodepool.config.records import FakeSettings, Interface, MachineSpec, Provider
from nodepool.config.rules import each, entries, record, table, whole

MACHINE = table(
    {"name": rules.name("machine")},
    {
        "rack": rules.text,
        "firmware": common.FIRMWARE,
        "accept": rules.boolean,
        "properties": common.PROPERTIES,
    },
)
COUNT = whole(0, 100_000)
SCHEMA = table(
    common.REQUIRED,
    {
        **common.OPTIONAL,
        "network": rules.name("network"),
        "count": COUNT,
        "machines": each(MACHINE),
        "delay": rules.duration,
        "failures": entries(rules.name("machine"), rules.text),
    },
    what="a provider with driver fake",
)


def declared(provider: Item) -> Iterator[common.Declared]:
    """The machines that the provider declares, problems or not."""
    yield from common.declared(provider)
    for name in _counted(provider.text("name"), COUNT.quietly(provider.data.get("count")) or 0):
        facts = {"name": name, "rack": "", "firmware": common.DEFAULT_FIRMWARE}
        yield common.Declared(name, provider.at("count"), facts)


def build(values: Mapping[str, Any]) -> Provider:
    """The record from what the schema has passed.  Nothing is lost when a fake machine is wiped: they are accepted."""
    of = values["name"]
    given = [*values.get("machines", ()), *({"name": name} for name in _counted(of, values.get("count", 0)))]
    machines = tuple(
        record(MachineSpec, {"accept": True, **entry}, provider=of, interfaces=(_interface(entry["name"], number),))
        for number, entry in enumerate(given)
    )
    settings = record(FakeSettings, {key: values[key] for key in ("delay", "failures") if key in values})
    return common.provider(values, machines, network=values.get("network", ""), fake=settings)


def _interface(name: str, number: int) -> Interface:
    """A locally administered MAC from the name, an address of the range for benchmarks (RFC 2544, 198.18.0.0/15)."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    mac = "02:" + ":".join(digest[i : i + 2] for i in range(0, 10, 2))
    return Interface(mac, str(ip_address("198.18.0.1") + number))


def _counted(provider: str, count: int) -> Iterator[str]:
    """`provider-01` and on, wide enough that they sort."""
    width = max(2, len(str(count)))
    return (f"{provider}-{number:0{width}d}" for number in range(1, count + 1))

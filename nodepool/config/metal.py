"""The `metal` driver's part of the YAML: bare machines behind BMCs, on a network that we serve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nodepool.config import common, rules
from nodepool.config.problems import Item
from nodepool.config.records import Interface, MachineSpec, Provider, RootDevice
from nodepool.config.rules import each, record, table

INTERFACE = table({"mac": rules.mac, "ip": rules.ip}, {})
ROOT_DEVICE = table({}, {"min-size": rules.size, "serial": rules.text, "wwn": rules.text, "name": rules.text})
MACHINE = table(
    {
        "name": rules.name("machine"),
        "bmc": rules.bmc,
        "credentials": rules.name("credentials"),
        "interfaces": each(INTERFACE, least=1),
    },
    {
        "rack": rules.text,
        "firmware": common.FIRMWARE,
        "root-device": ROOT_DEVICE,
        "accept": rules.boolean,
        "identity": rules.one_of("checked", "unchecked"),
        "properties": common.PROPERTIES,
    },
)
SCHEMA = table(
    {**common.REQUIRED, "network": rules.name("network"), "machines": each(MACHINE)},
    common.OPTIONAL,
    what="a provider with driver metal",
)


def declared(provider: Item) -> Iterator[common.Declared]:
    """The machines that the provider declares, problems or not."""
    return common.declared(provider)


def build(values: Mapping[str, Any]) -> Provider:
    """The record from what the schema has passed."""
    machines = tuple(_machine(entry, values["name"]) for entry in values["machines"])
    return common.provider(values, machines, network=values["network"])


def _machine(entry: Mapping[str, Any], of: str) -> MachineSpec:
    plain = {key: value for key, value in entry.items() if key not in ("interfaces", "root-device")}
    interfaces = tuple(record(Interface, card) for card in entry["interfaces"])
    root = record(RootDevice, entry.get("root-device", {}))
    machine: MachineSpec = record(MachineSpec, plain, provider=of, interfaces=interfaces, root_device=root)
    return machine

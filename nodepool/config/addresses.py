"""Addresses must fit together: networks apart, no MAC, IP or BMC given twice, each IP one of its network."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from itertools import combinations
from typing import Any

from nodepool.config import rules
from nodepool.config.problems import Document, Item, Place, top


def check_networks(doc: Document, networks: list[Item]) -> None:
    """Gateway and own address lie in each network, and the networks are apart."""
    cidrs = [(network, _cidr(network)) for network in networks]
    for network, cidr in cidrs:
        for key in ("gateway", "address"):
            ip = rules.ip.quietly(network.data.get(key))
            if cidr and ip and (reason := _unfit(IPv4Address(ip), cidr)):
                doc.problem(network.at(key), f"found {doc.found(ip)}, {reason}", f"an address of {cidr}")
    for (one, here), (other, there) in combinations(cidrs, 2):
        if here and there and here.overlaps(there):
            allowed = f"networks that are apart (network {one.text('name')} on line {doc.line(one.at('cidr'))})"
            doc.problem(other.at("cidr"), f"found {doc.found(str(there))}, which overlaps with {here}", allowed)
        if one.text("interface") and one.text("interface") == other.text("interface"):
            allowed = f"an interface of its own (network {one.text('name')} has this one)"
            doc.problem(other.at("interface"), f"found {doc.found(one.text('interface'))} again", allowed)


def check_machines(doc: Document, networks: dict[str, Item]) -> None:
    """No two machines share an address, and reserved addresses can be given out on the provider's network."""
    macs: dict[str, Place] = {}
    ips: dict[str, Place] = {}
    bmcs: dict[str, Place] = {}
    for provider in top(doc).items("providers"):
        network = networks.get(provider.text("network"))
        for machine in provider.items("machines"):
            _once(doc, machine.at("bmc"), rules.bmc.quietly(machine.data.get("bmc")), bmcs)
            for card in machine.items("interfaces"):
                _once(doc, card.at("mac"), rules.mac.quietly(card.data.get("mac")), macs)
                ip = rules.ip.quietly(card.data.get("ip"))
                _once(doc, card.at("ip"), ip, ips)
                if ip and network:
                    _in_network(doc, card.at("ip"), IPv4Address(ip), network)


def _once(doc: Document, place: Place, value: Any, seen: dict[str, Place]) -> None:
    if not value:
        return
    if value in seen:
        first = seen[value]
        allowed = f"each address once (it is on line {doc.line(first)}, {doc.path(first)})"
        doc.problem(place, f"found {doc.found(value)} again", allowed)
    seen.setdefault(value, place)


def _in_network(doc: Document, place: Place, ip: IPv4Address, network: Item) -> None:
    cidr = _cidr(network)
    if cidr is None:
        return
    reason = _unfit(ip, cidr)
    for key, owner in _ours(network):
        if ip == owner:
            reason = f"which is the network's {key}"
    if reason:
        doc.problem(place, f"found {doc.found(str(ip))}, {reason}", f"a free address of {cidr}")


def _ours(network: Item) -> Iterator[tuple[str, IPv4Address]]:
    for key in ("gateway", "address"):
        ip = rules.ip.quietly(network.data.get(key))
        if ip:
            yield key, IPv4Address(ip)


def _cidr(network: Item) -> IPv4Network | None:
    text = rules.cidr.quietly(network.data.get("cidr"))
    return IPv4Network(text) if text else None


def _unfit(ip: IPv4Address, cidr: IPv4Network) -> str:
    """Why no host can have this address there; empty when one can."""
    if ip not in cidr:
        return f"which is outside of {cidr}"
    if ip == cidr.network_address:
        return "which is the network's own address"
    if ip == cidr.broadcast_address:
        return "which is the broadcast address"
    return ""

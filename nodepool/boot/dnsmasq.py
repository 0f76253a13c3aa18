"""dnsmasq's files: DHCP with reservations, TFTP for firmware that has no iPXE, router advertisements.  Pure.

Options are those of dnsmasq(8); DHCP options by number are those of RFC 2132, RFC 4578 (93: the firmware's
architecture) and of iPXE (175: sent by iPXE alone).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from itertools import pairwise
from pathlib import Path

from nodepool.config.records import MachineSpec, Network

HOSTS, LEASES, TFTP = "hosts", "leases", "tftp"  # in the folder
BIOS_FILE, UEFI_FILE = "undionly.kpxe", "snponly.efi"

# A reservation never changes, so its lease may be long: a node keeps its address through half of this without us.
_RESERVED_FOR, _UNKNOWN_FOR = "7d", "10m"
_UNKNOWN_MOST = 64  # addresses for machines that nobody has declared
_LEASES_MOST = 100_000  # dnsmasq stops at 1000 when it is not told
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


def own_address(network: Network) -> str:
    """This daemon's own address on a network."""
    return network.address or network.gateway


def render_conf(
    network: Network, folder: Path, account: tuple[str, str], unknown: str, prefix6: IPv6Network | None = None
) -> str:
    """dnsmasq.conf for one network.

    `folder` holds its files, `account` is the user and the group that it runs as, `unknown` comes from `unknown_range`.

    With `prefix6`, a prefix that the interface has, routers are advertised there with a lifetime of 0: nobody routes by
    them, and iPXE does not wait for one that never answers.
    """
    folder = folder.resolve()
    url = f"http://{own_address(network)}:{network.port}/boot.ipxe"
    lines = [
        f"# Written by nodepool for network {network.name} at each start; changes are lost.",
        "port=0",  # no DNS
        "no-resolv",
        "no-hosts",
        # Ours: with other rights it could not read its files, and the kernel would forget to end it with the daemon.
        f"user={account[0]}",
        f"group={account[1]}",
        f"interface={network.interface}",
        "except-interface=lo",
        "bind-interfaces",
        "dhcp-authoritative",
        "no-ping",
        "log-facility=-",
        f"dhcp-leasefile={folder / LEASES}",
        f"dhcp-lease-max={_LEASES_MOST}",
        f"dhcp-hostsfile={folder / HOSTS}",
        f"dhcp-range={unknown}",
        f"dhcp-option=option:router,{network.gateway}",
        *([f"dhcp-option=option:dns-server,{','.join(network.dns)}"] if network.dns else []),
        "dhcp-match=set:ipxe,175",
        "dhcp-match=set:efi64,option:client-arch,7",
        "dhcp-match=set:efi64,option:client-arch,9",
        f"dhcp-boot=tag:ipxe,{url}",
        f"dhcp-boot=tag:!ipxe,tag:efi64,{UEFI_FILE}",
        f"dhcp-boot=tag:!ipxe,tag:!efi64,{BIOS_FILE}",
        "enable-tftp",
        f"tftp-root={folder / TFTP}",
    ]
    if prefix6 is not None:
        lines += [
            "enable-ra",
            f"dhcp-range={prefix6.network_address},ra-only,64,10m",
            f"ra-param={network.interface},0,0",
        ]
    return "\n".join(lines) + "\n"


def render_hosts(machines: Iterable[MachineSpec]) -> str:
    """The reservations, one network card per line; a machine's name is given to its first card."""
    lines = []
    for machine in machines:
        for number, card in enumerate(machine.interfaces):
            named = number == 0 and _HOST_NAME.fullmatch(machine.name)
            lines.append(",".join([card.mac, card.ip, *([machine.name] if named else []), _RESERVED_FOR]))
    return "".join(f"{line}\n" for line in lines)


def unknown_range(network: Network, machines: Iterable[MachineSpec]) -> str:
    """The `dhcp-range` for machines that nobody has declared: they get an address for long enough to ask for a script.

    It is the end of the largest gap between the addresses that are spoken for; where all are, nobody else gets one.
    """
    cidr = IPv4Network(network.cidr)
    taken = {int(IPv4Address(card.ip)) for machine in machines for card in machine.interfaces}
    taken |= {int(IPv4Address(address)) for address in (network.gateway, network.address) if address}
    taken |= {int(cidr.network_address), int(cidr.broadcast_address)}
    inside = sorted(address for address in taken if IPv4Address(address) in cidr)
    gaps = [(after - before - 1, after - 1) for before, after in pairwise(inside)]
    size, last = max(gaps, default=(0, 0))
    if size == 0:
        return f"{cidr.network_address},static,{cidr.netmask},{_RESERVED_FOR}"
    first = last - min(size, _UNKNOWN_MOST) + 1
    return f"{IPv4Address(first)},{IPv4Address(last)},{cidr.netmask},{_UNKNOWN_FOR}"


def stale(leases: str, machines: Iterable[MachineSpec]) -> list[str]:
    """The lines of a lease file that keep a reserved address from its network card, because another one had it.

    dnsmasq would not give the address away before such a lease is over; a card that was replaced needs it now.
    """
    reserved: Mapping[str, str] = {card.ip: card.mac for machine in machines for card in machine.interfaces}
    found = []
    for line in leases.splitlines():
        words = line.split()
        if len(words) >= 4 and reserved.get(words[2], words[1]) != words[1]:
            found.append(line)
    return found

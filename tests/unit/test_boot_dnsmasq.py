"""dnsmasq's files."""

from ipaddress import IPv4Address, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepool.boot import dnsmasq
from nodepool.config.records import Interface, MachineSpec, Network

LAB = Network("lab", "br0", "198.51.100.0/24", "198.51.100.1")


def machine(name, *cards):
    return MachineSpec(name, "rack1", interfaces=tuple(Interface(mac, ip) for mac, ip in cards))


N1 = machine("n1", ("52:54:00:00:00:01", "198.51.100.11"))


def conf(network=LAB, machines=(N1,), prefix6=None):
    unknown = dnsmasq.unknown_range(network, machines)
    return dnsmasq.render_conf(network, Path("/var/boot/lab"), ("root", "root"), unknown, prefix6).splitlines()


def test_it_serves_dhcp_on_the_one_interface_and_no_names():
    lines = conf()
    assert {"port=0", "interface=br0", "bind-interfaces", "except-interface=lo", "dhcp-authoritative"} <= set(lines)
    assert "dhcp-option=option:router,198.51.100.1" in lines
    assert "dhcp-hostsfile=/var/boot/lab/hosts" in lines


def test_ipxe_is_sent_to_our_own_address_and_bare_firmware_to_tftp():
    lines = conf(Network("lab", "br0", "198.51.100.0/24", "198.51.100.1", address="198.51.100.2", port=8091))
    assert "dhcp-boot=tag:ipxe,http://198.51.100.2:8091/boot.ipxe" in lines
    assert "dhcp-boot=tag:!ipxe,tag:efi64,snponly.efi" in lines
    assert "dhcp-boot=tag:!ipxe,tag:!efi64,undionly.kpxe" in lines
    assert "tftp-root=/var/boot/lab/tftp" in lines


def test_name_servers_are_told_when_there_are_any():
    assert not any("dns-server" in line for line in conf())
    network = Network("lab", "br0", "198.51.100.0/24", "198.51.100.1", dns=("192.0.2.53", "192.0.2.54"))
    assert "dhcp-option=option:dns-server,192.0.2.53,192.0.2.54" in conf(network)


def test_routers_are_advertised_only_for_a_prefix_that_the_interface_has_and_nobody_routes_by_them():
    assert not any("ra" in line.split("=")[0].split("-") for line in conf())
    lines = conf(prefix6=IPv6Network("fd42::/64"))
    assert {"enable-ra", "dhcp-range=fd42::,ra-only,64,10m", "ra-param=br0,0,0"} <= set(lines)


def test_a_reservation_per_card_with_the_name_on_the_first():
    two = machine("n2", ("52:54:00:00:00:02", "198.51.100.12"), ("52:54:00:00:00:03", "198.51.100.13"))
    assert dnsmasq.render_hosts([N1, two]).splitlines() == [
        "52:54:00:00:00:01,198.51.100.11,n1,7d",
        "52:54:00:00:00:02,198.51.100.12,n2,7d",
        "52:54:00:00:00:03,198.51.100.13,7d",
    ]


def test_a_machine_whose_name_is_no_host_name_keeps_its_address():
    assert dnsmasq.render_hosts([machine("a+b", ("52:54:00:00:00:01", "198.51.100.11"))]) == (
        "52:54:00:00:00:01,198.51.100.11,7d\n"
    )


def test_unknown_machines_get_the_end_of_the_largest_gap():
    assert dnsmasq.unknown_range(LAB, [N1]) == "198.51.100.191,198.51.100.254,255.255.255.0,10m"


def test_a_new_reservation_at_the_front_leaves_the_range_as_it_is():
    n2 = machine("n2", ("52:54:00:00:00:02", "198.51.100.12"))
    assert dnsmasq.unknown_range(LAB, [N1, n2]) == dnsmasq.unknown_range(LAB, [N1])


def test_a_full_network_has_reservations_alone():
    network = Network("lab", "br0", "198.51.100.0/30", "198.51.100.1")
    full = [machine("n1", ("52:54:00:00:00:01", "198.51.100.2"))]
    assert dnsmasq.unknown_range(network, full) == "198.51.100.0,static,255.255.255.252,7d"


@given(st.sets(st.integers(2, 254), max_size=253))
def test_the_range_never_has_an_address_that_is_spoken_for(taken):
    machines = [machine(f"n{n}", (f"52:54:00:00:00:{n:02x}", f"198.51.100.{n}")) for n in sorted(taken)]
    first, last, *_ = dnsmasq.unknown_range(LAB, machines).split(",")
    if last != "static":
        given_out = range(int(IPv4Address(first)), int(IPv4Address(last)) + 1)
        assert len(given_out) > 0
        spoken_for = taken | {0, 1, 255}
        assert not any(address - int(IPv4Address("198.51.100.0")) in spoken_for for address in given_out)
    else:
        assert len(taken) == 253


@pytest.mark.parametrize(
    ("lease", "stale"),
    [
        ("1700000000 52:54:00:00:00:01 198.51.100.11 n1 *", False),
        ("1700000000 52:54:00:00:00:99 198.51.100.11 * 01:52:54:00:00:00:99", True),
        ("1700000000 52:54:00:00:00:99 198.51.100.200 * *", False),
        ("duid 00:01:00:01:2f:00", False),
    ],
)
def test_a_lease_is_stale_when_another_card_has_the_reserved_address(lease, stale):
    assert dnsmasq.stale(lease + "\n", [N1]) == ([lease] if stale else [])

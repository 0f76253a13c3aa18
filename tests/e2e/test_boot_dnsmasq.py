"""Real dnsmasq in a network namespace of its own, asked by a real DHCP client in another one that a cable joins to it.

The daemon's side is this file run as a program inside the first namespace: it follows the lines of its standard input.
"""

import json
import logging
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from nodepool.boot.network import NetworkBoot
from nodepool.config.records import Config, Interface, MachineSpec, Network, Provider
from nodepool.errors import NodepoolError

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]

MAC, NEW_MAC, STRANGER = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:99"
LAB = Network("lab", "br0", "198.51.100.0/24", "198.51.100.1", dns=("198.51.100.53",))
PROBE = '#!/bin/sh\n[ "$1" = bound ] && env >"$NODEPOOL_LEASE"\nexit 0\n'


class NobodyExpected:
    """A door at which nothing happens."""

    def expected_boot(self, mac):
        return None


def serve(folder):
    """Inside the namespace: network boot, with the reservations of the latest line of standard input."""
    logging.basicConfig(level=logging.DEBUG, filename=folder / "log")
    config = [_config({})]
    boot = NetworkBoot(lambda: config[0], NobodyExpected(), folder / "boot")
    for line in sys.stdin:
        wish = json.loads(line)
        try:
            if wish["do"] == "start":
                config[0] = _config(wish["machines"])
                boot.start()
            elif wish["do"] == "follow":
                config[0] = _config(wish["machines"])
                boot.pass_once()
            answer = {"ok": boot.sentence}
        except NodepoolError as error:
            answer = {"error": str(error)}
        answer["pid"] = boot._servers["lab"].pid if "lab" in boot._servers else 0
        print(json.dumps(answer), flush=True)
    boot.stop()


def _config(machines):
    specs = tuple(MachineSpec(name, "rack1", interfaces=(Interface(*card),)) for name, card in machines.items())
    return Config("x", networks={"lab": LAB}, providers={"rack1": Provider("rack1", "metal", "lab", machines=specs)})


class Daemon:
    """The program above."""

    def __init__(self, namespace, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, what, machines=None):
        self.process.stdin.write(json.dumps({"do": what, "machines": machines or {}}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.log
        return json.loads(answer)

    @property
    def log(self):
        return (self.folder / "log").read_text()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(10)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


def inside(namespace):
    done = subprocess.run(["ip", "netns", "pids", namespace], check=True, capture_output=True, text=True, timeout=30)
    return done.stdout.split()


class Cable:
    """A namespace with a bridge for the daemon, one with a network card for the machine, a cable between them."""

    def __init__(self, folder):
        self.folder = folder
        name = f"npb-{uuid.uuid4().hex[:8]}"
        self.daemons, self.machines = f"{name}-d", f"{name}-m"
        (folder / "probe").write_text(PROBE)
        (folder / "probe").chmod(0o755)
        for namespace in (self.daemons, self.machines):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        at = ("-n", self.daemons)
        ip(*at, "link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        ip(*at, "link", "add", "port", "type", "veth", "peer", "name", "card", "netns", self.machines)
        ip(*at, "link", "set", "port", "master", "br0", "up")
        ip(*at, "address", "add", "198.51.100.1/24", "dev", "br0")
        ip(*at, "link", "set", "br0", "up")

    def ask(self, mac, *options, tries=3):
        """What a machine with this MAC is told by DHCP: the client's variables; nothing: no answer."""
        at, lease = ("-n", self.machines), self.folder / "lease"
        lease.unlink(missing_ok=True)
        ip(*at, "link", "set", "card", "down", "address", mac)
        ip(*at, "link", "set", "card", "up")
        client = ["busybox", "udhcpc", "-i", "card", "-s", str(self.folder / "probe"), "-f", "-n", "-q"]
        subprocess.run(
            ["ip", "netns", "exec", self.machines, *client, "-t", str(tries), "-T", "1", *options],
            env={**os.environ, "NODEPOOL_LEASE": str(lease)},
            capture_output=True,
            timeout=30,
            check=False,
        )
        if not lease.exists():
            return {}
        return dict(line.split("=", 1) for line in lease.read_text().splitlines() if "=" in line)

    def close(self):
        left = [int(pid) for namespace in (self.daemons, self.machines) for pid in inside(namespace)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for namespace in (self.daemons, self.machines):
            ip("netns", "delete", namespace)
        assert not left, "processes were left in the namespaces"


@pytest.fixture
def cable(tmp_path):
    made = Cable(tmp_path)
    yield made
    made.close()


@pytest.fixture
def daemon(cable, tmp_path):
    made = Daemon(cable.daemons, tmp_path)
    yield made
    if made.process.poll() is None:
        made.close()


def test_a_machine_gets_its_address_and_what_its_firmware_can_boot(cable, daemon, tmp_path):
    told = daemon.do("start", {"n1": (MAC, "198.51.100.11")})
    assert told["ok"].startswith("DHCP on br0 for 1 machines of network lab"), told
    lease = cable.ask(MAC)
    assert (lease["ip"], lease["router"], lease["dns"]) == ("198.51.100.11", "198.51.100.1", "198.51.100.53")
    assert lease["boot_file"] == "undionly.kpxe"
    assert cable.ask(MAC, "-x", "0x5d:0007")["boot_file"] == "snponly.efi"
    assert cable.ask(MAC, "-x", "0xaf:0101")["boot_file"] == "http://198.51.100.1:8090/boot.ipxe"
    ip("-n", cable.machines, "address", "add", "198.51.100.11/24", "dev", "card")
    subprocess.run(
        [
            "ip",
            "netns",
            "exec",
            cable.machines,
            "busybox",
            "tftp",
            "-g",
            "-r",
            "undionly.kpxe",
            "-l",
            "got",
            "198.51.100.1",
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=30,
    )
    assert (tmp_path / "got").read_bytes() == (tmp_path / "boot" / "lab" / "tftp" / "undionly.kpxe").read_bytes()
    assert daemon.close() == 0
    assert inside(cable.daemons) == []


def test_reservations_follow_the_yaml_while_dnsmasq_runs_on(cable, daemon):
    pid = daemon.do("start", {"n1": (MAC, "198.51.100.11")})["pid"]
    assert cable.ask(MAC)["ip"] == "198.51.100.11"
    assert daemon.do("follow", {"n1": (MAC, "198.51.100.22"), "n2": (NEW_MAC, "198.51.100.23")})["pid"] == pid
    assert cable.ask(MAC)["ip"] == "198.51.100.22"
    assert cable.ask(NEW_MAC)["ip"] == "198.51.100.23"
    assert daemon.do("follow", {"n2": (NEW_MAC, "198.51.100.23")})["pid"] == pid
    assert cable.ask(MAC)["ip"] != "198.51.100.22"


def test_a_machine_that_nobody_declared_gets_an_address_outside_of_the_reservations(cable, daemon):
    daemon.do("start", {"n1": (MAC, "198.51.100.11")})
    lease = cable.ask(STRANGER)
    assert 191 <= int(lease["ip"].split(".")[3]) <= 254
    assert lease["lease"] == "600"


def test_a_card_that_was_replaced_gets_the_address_that_the_old_one_still_leases(cable, daemon):
    daemon.do("start", {"n1": (MAC, "198.51.100.11")})
    assert cable.ask(MAC)["ip"] == "198.51.100.11"
    daemon.do("follow", {"n1": (NEW_MAC, "198.51.100.11")})
    assert cable.ask(NEW_MAC, tries=6)["ip"] == "198.51.100.11"


def test_a_killed_dnsmasq_comes_back_and_says_so(cable, daemon):
    pid = daemon.do("start", {"n1": (MAC, "198.51.100.11")})["pid"]
    os.kill(pid, signal.SIGKILL)
    assert cable.ask(MAC, tries=8)["ip"] == "198.51.100.11"
    end = time.monotonic() + 10
    while not (told := daemon.do("look"))["ok"].startswith("DHCP on br0"):  # it answers before its word is read
        assert time.monotonic() < end, told
    assert told["pid"] not in {0, pid}
    assert "has ended (signal SIGKILL); starting it again in 1 s" in daemon.log
    assert "dnsmasq serves network lab again" in daemon.log


def test_dnsmasq_ends_with_a_daemon_that_is_killed(cable, daemon):
    handle = os.pidfd_open(daemon.do("start", {"n1": (MAC, "198.51.100.11")})["pid"])
    try:
        daemon.process.kill()
        daemon.close()
        assert select.select([handle], [], [], 5)[0], "dnsmasq runs on"
    finally:
        os.close(handle)


def test_routers_are_advertised_where_the_interface_has_a_prefix(cable, daemon, tmp_path):
    ip("-n", cable.daemons, "address", "add", "fd42::1/64", "dev", "br0", "nodad")
    daemon.do("start", {"n1": (MAC, "198.51.100.11")})
    conf = (tmp_path / "boot" / "lab" / "dnsmasq.conf").read_text().splitlines()
    assert "dhcp-range=fd42::,ra-only,64,10m" in conf


def test_another_dhcp_server_there_is_said_with_the_remedy(cable, daemon):
    blocker = textwrap.dedent("""
        import socket, sys
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("0.0.0.0", 67))
            print("taken", flush=True)
            sys.stdin.read()
    """)
    command = ["ip", "netns", "exec", cable.daemons, sys.executable, "-c", blocker]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "taken\n"
        told = daemon.do("start", {"n1": (MAC, "198.51.100.11")})
        other.stdin.close()
    assert "another DHCP server has port 67 here: stop it" in told["error"]
    assert "`dhcp: external`" in told["error"]


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

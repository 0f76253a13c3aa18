"""Network boot as the configuration says: started, changed while it runs, refused in one sentence with the remedy."""

import http.client
import socket
from dataclasses import replace

import pytest

from nodepool.boot import server
from nodepool.boot.network import NetworkBoot
from nodepool.boot.server import Dnsmasq
from nodepool.clock import VirtualClock
from nodepool.config.records import Config, Interface, MachineSpec, Network, Provider
from nodepool.errors import NodepoolError

N1 = MachineSpec("n1", "rack1", interfaces=(Interface("52:54:00:00:00:01", "127.0.0.11"),))


class NobodyExpected:
    """A door at which nothing happens."""

    def expected_boot(self, mac):
        return None


class Boot:
    """Network boot on loopback, where somebody else serves DHCP, and the configuration that it follows."""

    def __init__(self, folder):
        network = Network("lab", "lo", "127.0.0.0/8", "127.0.0.1", dhcp="external", port=free_port())
        provider = Provider("rack1", "metal", "lab", machines=(N1,))
        self.config = Config("one", networks={"lab": network}, providers={"rack1": provider})
        self.clock = VirtualClock()
        self.boot = NetworkBoot(lambda: self.config, NobodyExpected(), folder / "boot", self.clock)

    @property
    def network(self):
        return self.config.networks["lab"]

    def change(self, **settings):
        self.config = replace(self.config, networks={"lab": replace(self.network, **settings)})


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serves(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/boot/52:54:00:00:00:01")
        return connection.getresponse().status == 200
    except ConnectionRefusedError:
        return False
    finally:
        connection.close()


@pytest.fixture
def up(tmp_path):
    made = Boot(tmp_path)
    yield made
    made.boot.stop()


def test_a_network_of_bare_machines_is_served_until_the_end(up):
    up.boot.start()
    assert serves(up.network.port)
    assert up.boot.sentence == "0 agents wait for work"
    up.boot.stop()
    assert not serves(up.network.port)


def test_a_pass_after_the_end_brings_nothing_back(up):
    up.boot.start()
    up.boot.stop()
    up.change(port=free_port())
    up.boot.pass_once()
    assert not serves(up.network.port)


def test_a_network_that_no_metal_provider_uses_is_not_served(up):
    provider = replace(up.config.providers["rack1"], driver="fake", network="")
    up.config = replace(up.config, providers={"rack1": provider})
    up.boot.start()
    assert not serves(up.network.port)
    assert up.boot.sentence == "no provider has machines that boot over the network"


def test_a_pass_follows_the_configuration(up):
    up.boot.start()
    before = up.network.port
    up.change(port=free_port())
    up.boot.pass_once()
    assert serves(up.network.port)
    assert not serves(before)


def test_a_start_without_the_port_is_refused_with_the_remedy_and_leaves_nothing(up):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", up.network.port))
        taken.listen()
        with pytest.raises(NodepoolError) as refused:
            up.boot.start()
    sentence = f"network lab: port {up.network.port} of 127.0.0.1 is in use by another program: stop it"
    assert str(refused.value).startswith(sentence)
    assert not serves(up.network.port)


def test_what_cannot_be_had_while_it_runs_is_said_once_and_tried_again(up, caplog):
    up.boot.start()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        up.change(port=taken.getsockname()[1])
        soon = up.boot.pass_once()
        up.clock.advance(5)
        up.boot.pass_once()
        assert "is in use by another program" in up.boot.sentence
        assert caplog.text.count("is in use by another program") == 1
    assert soon == up.clock.now()
    up.boot.pass_once()
    assert not serves(up.network.port)  # many wake-ups are no reason to try more often
    up.clock.advance(5)
    up.boot.pass_once()
    assert serves(up.network.port)
    assert "in use" not in up.boot.sentence


def test_a_wake_up_before_and_after_it_runs_does_nothing(up):
    up.boot.wake()
    up.boot.start()
    up.boot.wake()
    assert serves(up.network.port)
    up.boot.stop()
    up.boot.wake()
    assert not serves(up.network.port)


def test_dhcp_on_an_interface_that_is_not_there_is_refused(tmp_path):
    network = Network("lab", "nodepool-none", "198.51.100.0/24", "198.51.100.1")
    with pytest.raises(NodepoolError, match=r"network lab: there is no interface nodepool-none here; make it, or name"):
        Dnsmasq(network, (N1,), tmp_path / "lab").start()


def test_without_dnsmasq_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(server, "_SYSTEM_PATH", str(tmp_path))
    network = Network("lab", "nodepool-none", "198.51.100.0/24", "198.51.100.1")
    with pytest.raises(NodepoolError, match=r"needs dnsmasq and setpriv: apt-get install dnsmasq-base util-linux"):
        Dnsmasq(network, (N1,), tmp_path / "lab").start()

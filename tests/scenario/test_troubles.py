"""What goes wrong names itself: the sentence that people read in `nodepool show`."""

import pytest

from nodepool.api.app import create_app
from nodepool.api.server import ApiServer
from nodepool.cmd.cli import main
from nodepool.door import Call
from nodepool.drivers import metal
from nodepool.drivers.power import open_power
from nodepool.drivers.step import Ports
from nodepool.loops.launcher import Kit
from nodepool.model import Boot, Machine
from nodepool.rack import bmc
from nodepool.store import tables as t


@pytest.fixture
def show(capsys):
    """`nodepool show WHAT` against the story's store, over the real API."""

    def run(story, what):
        app = create_app(story.store, story.current, lambda: story.daemon.planner.reasons, lambda: {"loops": {}})
        server = ApiServer(app, story.folder / "np.sock")
        server.start()
        try:
            assert main(["--url", str(story.folder / "np.sock"), "show", str(what)]) == 0
        finally:
            server.stop()
        return " ".join(capsys.readouterr().out.split())

    return run


def failed_node(story):
    assert story.run(lambda: any(node.failed_at for node in story.nodes()), limit=4 * 3600)
    return next(node for node in story.nodes() if node.failed_at)


def test_a_machine_that_fails_a_phase_is_broken_with_phase_reason_and_what_comes_next(tell, show):
    story = tell(machines=2, min_ready=1, max_servers=2, failures={"lab-01": "write"})
    assert story.run(story.ready(1))
    shown = show(story, "lab-01")
    for part in ("broken", "write", "input/output error at byte 4194304", "disk-write", "machine-inspect lab-01"):
        assert part in shown


def test_an_image_too_large_for_the_disk_is_refused_before_a_byte_is_written(tell, show):
    story = tell(machines=1, max_servers=1)
    story.image_size = 9 * 10**9
    node = failed_node(story)
    shown = show(story, node.id)
    for part in ("image debian needs 9.0 GB; disk vda of lab-01 has 8.0 GB", "disk-too-small", "image"):
        assert part in shown
    assert story.machine("lab-01").strikes == 0


def test_an_altered_byte_of_the_image_is_told_and_is_no_fault_of_the_machine(tell, show):
    story = tell(machines=1, max_servers=1, failures={"lab-01": "write image-altered"})
    node = failed_node(story)
    shown = show(story, node.id)
    assert "another sha256 than the image" in shown
    assert "image-altered" in shown
    assert story.machine("lab-01").strikes == 0


def test_a_disk_that_gives_back_other_bytes_breaks_its_machine(tell, show):
    story = tell(machines=1, max_servers=1, failures={"lab-01": "write disk-readback"})
    assert story.run(lambda: story.states().get("lab-01") == "broken")
    assert "gives back other bytes than were written" in show(story, "lab-01")


def newest_boot(story, machine):
    return story.all(Boot, t.boots.c.machine_id == machine.id)[-1]


def waiting_agent(story):
    """A machine whose agent waits for work, and its boot."""
    story.run(lambda: "available" in story.states().values())
    [machine] = story.all(Machine, t.machines.c.name == "lab-02")
    return machine, newest_boot(story, machine)


def hello(story, token, nonce, mac):
    lines = {"version": "1", "token": token, "nonce": nonce, "nic.0.mac": mac}
    [reply] = story.desk.together([Call("hello", lines, "198.51.100.99")])
    return reply


def test_a_foreign_token_is_refused_and_changes_nothing(tell):
    story = tell(machines=2, min_ready=0)
    machine, boot = waiting_agent(story)
    reply = hello(story, "f" * 32, "e" * 32, "02:00:00:00:00:01")
    assert reply.status == 403
    assert "not known here" in reply.lines["error"]
    assert story.machine("lab-02") == machine
    assert newest_boot(story, machine) == boot


def test_a_replayed_token_fails_the_boot_and_the_machine_boots_anew(tell, show):
    story = tell(machines=2, min_ready=0)
    _, boot = waiting_agent(story)
    reply = hello(story, boot.token, "e" * 32, "02:00:00:00:00:01")
    assert reply.status == 409
    assert "a second machine (198.51.100.99) used the boot token" in show(story, "lab-02")
    story.write(story.path.read_text().replace("min-ready: 0", "min-ready: 2"))
    story.reload(story.path.read_text())
    assert story.run(story.ready(2))
    assert story.machine("lab-02").boot_id != boot.id


def test_a_token_of_a_boot_that_is_over_is_refused(tell):
    story = tell(machines=2, min_ready=0)
    _, boot = waiting_agent(story)
    story.write(story.path.read_text().replace("min-ready: 0", "min-ready: 2"))
    story.reload(story.path.read_text())
    story.run(story.ready(2))
    reply = hello(story, boot.token, boot.nonce, story.world.machines["lab-02"].mac)
    assert reply.status == 403
    assert "is over" in reply.lines["error"]


METAL = """
version: 1
networks: [{{name: lab, interface: br0, cidr: 198.51.100.0/24, gateway: 198.51.100.1, dhcp: external}}]
diskimages: [{{name: debian, release: bookworm, elements: [debian-minimal]}}]
labels: [{{name: small, min-ready: 1}}]
providers:
  - name: rack1
    driver: metal
    network: lab
    machines:
      - name: r1n1
        bmc: ipmi://{host}:{port}
        credentials: r1n1
        interfaces: [{{mac: "52:54:00:00:00:01", ip: 198.51.100.11}}]
        accept: true
    pools: [{{name: main, labels: [{{name: small, diskimage: debian}}]}}]
"""


def test_a_wrong_bmc_password_is_tried_once_and_told_with_its_remedy(tell, show, tmp_path):
    with bmc.running(1) as [endpoint]:
        story = tell()
        secure = tmp_path / "secure.yaml"
        secure.touch(mode=0o600)
        secure.write_text("credentials: [{name: r1n1, username: admin, password: wrong}]\n")
        with open_power() as power:
            ports = Ports(power, story.world, "ssh-ed25519 AAAAnodepool nodepool")
            story.kits["metal"] = Kit(metal.JOBS, metal.entry, lambda _: ports, blocking=False)
            story.reload(METAL.format(host=endpoint.host, port=endpoint.port), secure)
            assert story.run(lambda: story.states().get("r1n1") == "broken")
            story.run(limit=1800)
        shown = show(story, "r1n1")
        for part in ("broken", "power-off", "bmc-auth", 'refused user "admin" or its password', "secure.yaml"):
            assert part in shown
        assert endpoint.bmc.received["rakp1"] == 1


def test_a_machine_behind_another_bmc_is_not_wiped(tell, show):
    story = tell(machines=1, max_servers=1)
    story.world.machines["lab-01"].uuid = "12345678-1234-1234-1234-123456789abc"  # what its BMC says
    story.world.machines["lab-01"].marker = "somebody's data"
    assert story.run(lambda: story.states().get("lab-01") == "broken")
    shown = show(story, "lab-01")
    for part in ("identity", "belongs to another", "identity: unchecked"):
        assert part in shown
    assert story.world.machines["lab-01"].marker == "somebody's data"

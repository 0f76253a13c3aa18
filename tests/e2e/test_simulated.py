"""The whole pool over loopback: a daemon and a rack of simulated machines; no root, no QEMU, no image build."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
from rack_helpers import rack

from nodepool.rack import rack as racks

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.e2e


class Lab:
    """A simulated rack, and a daemon that uses it; all in one folder."""

    def __init__(self, folder):
        self.rack = folder / "rack"
        self.home = folder / "home"
        self.log = folder / "log"
        self.daemon = None

    def up(self, machines, seconds, **changes):
        done = rack("up", "--dir", self.rack, "--simulated", machines, "--seconds", seconds)
        assert done.returncode == 0, done.stderr
        image = ROOT / "tools" / "fake-image-create"
        done = rack("yaml", "--dir", self.rack, "--to", self.home, "--dib-cmd", image)
        assert done.returncode == 0, done.stderr
        yaml = self.home / "nodepool.yaml"
        comment, _, text = yaml.read_text().partition("\n")
        config = json.loads(text)
        config["providers"][0] |= {key.replace("_", "-"): value for key, value in changes.items()}
        yaml.write_text(f"{comment}\n{json.dumps(config)}\n")

    def start(self):
        with self.log.open("ab") as log:
            command = [BIN / "nodepoold", "-d", "-c", "home/nodepool.yaml", "-s", "home/secure.yaml"]
            self.daemon = subprocess.Popen(command, cwd=self.home.parent, stdout=log, stderr=log)
        self.until(lambda: self.cli("status").returncode == 0)

    def end(self, number=signal.SIGTERM):
        self.daemon.send_signal(number)
        return self.daemon.wait(10)

    def cli(self, *words):
        command = [BIN / "nodepool", "--url", self.home / "nodepool.sock", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def items(self, *words):
        done = self.cli(*words, "--format", "json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found["items"] if isinstance(found, dict) and "items" in found else found

    def ready(self):
        return {node["id"]: node for node in self.items("list") if node["state"] == "ready"}

    def consoles(self):
        return {machine["name"]: machine["console"] for machine in racks.status(self.rack, 100)}

    def boots(self):
        return {machine["name"]: machine["firmware_boots"] for machine in racks.status(self.rack)}

    def until(self, true, seconds=60):
        end = time.monotonic() + seconds
        while not (found := true()):
            assert self.daemon.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.05)  # neither the command line nor the rack has a way to wait for this
        return found


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path)
    yield lab
    if lab.daemon and lab.daemon.poll() is None:
        lab.daemon.kill()
        lab.daemon.wait()
    if (lab.rack / "rack.json").exists():
        rack("down", "--dir", lab.rack)


def ssh(node, key, folder, *command):
    """Log in as the node's requestor does."""
    known = folder / "known_hosts"
    known.write_text(f"[{node['address']}]:{node['port']} {node['host_key']}\n")
    options = ["-o", f"UserKnownHostsFile={known}", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-F", "none"]
    place = ["-p", str(node["port"]), f"{node['username']}@{node['address']}"]
    return subprocess.run(["ssh", *options, "-i", key, *place, *command], capture_output=True, text=True, check=False)


def test_twenty_machines_are_ready_five_are_given_out_and_made_ready_anew(lab, tmp_path):
    lab.up(20, "all=0.1")
    lab.start()
    lab.until(lambda: len(lab.ready()) == 20)
    first, before = lab.ready(), lab.boots()
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    done = lab.cli("request", "simulated=5", "--wait", "60", "--ssh-key", f"{key}.pub", "--format", "json")
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)
    given = request["nodes"]
    logins = [ssh(node, key, tmp_path, "hostname") for node in given]
    assert [login.stdout.strip() for login in logins] == [node["machine"] for node in given], logins
    assert lab.cli("release", "--request", request["id"]).returncode == 0
    lab.until(lambda: len(lab.ready()) == 20 and not lab.ready().keys() & {node["id"] for node in given})
    assert len(lab.ready().keys() & first.keys()) == 15
    used = {node["machine"] for node in given}
    after = {name for name, boots in lab.boots().items() if boots > before[name]}
    assert after == used
    again = [node for node in (lab.items("show", number) for number in lab.ready()) if node["machine"] in used]
    refused = ssh({**given[0], "host_key": again[0]["host_key"]}, key, tmp_path, "hostname")
    assert refused.returncode == 255


def test_killed_in_every_phase_the_daemon_goes_on_to_the_same_end(lab):
    lab.up(4, "all=1.0,system=4")  # the last ones go by without a daemon: it must be back in time to be killed in them
    for phase in ("firmware", "ramdisk", "agent: erase", "agent: write", "agent: configure", "agent: start", "system"):
        lab.start()
        lab.until(lambda said=f": {phase}": any(line.endswith(said) for line in chain(*lab.consoles().values())))
        lab.end(signal.SIGKILL)
    lab.start()
    lab.until(lambda: len(lab.ready()) == 4)
    assert lab.end() == 0


def test_a_machine_that_is_told_to_fail_is_broken_with_phase_and_reason_and_good_again_when_it_is_not(lab):
    lab.up(2, "all=0.1", launch_retries=1, retry_broken=2)
    assert rack("fault", "--dir", lab.rack, "n1", "fail=erase").returncode == 0
    lab.start()
    machines = lambda: {machine["name"]: machine for machine in lab.items("machine-list")}  # noqa: E731
    lab.until(lambda: machines()["n1"]["state"] == "broken" and len(lab.ready()) == 1)
    shown = lab.cli("show", "n1").stdout
    assert "erase was told to fail on n1" in shown
    assert "disk-erase" in shown
    assert rack("fault", "--dir", lab.rack, "n1", "--clear").returncode == 0
    lab.until(lambda: len(lab.ready()) == 2)


FAILURES = {  # the phase that is told to fail: the step at which the daemon finds out, and the code
    "firmware": ("agent", "boot-silent"),
    "ramdisk": ("agent", "boot-silent"),
    "erase": ("erase", "disk-erase"),
    "write": ("write", "disk-write"),
    "configure": ("configure", "agent-error"),
    "start": ("start", "agent-error"),
    "system": ("login", "login-silent"),
}


def test_each_phase_can_be_told_to_fail_and_the_one_good_machine_is_ready(lab):
    lab.up(len(FAILURES) + 1, "all=0.1", launch_retries=1, strikes=1, boot_timeout=6)
    names = {phase: f"n{number}" for number, phase in enumerate(FAILURES, 1)}
    for phase, name in names.items():
        assert rack("fault", "--dir", lab.rack, name, f"fail={phase}").returncode == 0

    def found():
        troubles = {machine["name"]: machine["trouble"] for machine in lab.items("machine-list")}
        return {name: (trouble["phase"], trouble["code"]) for name, trouble in troubles.items() if trouble}

    lab.start()
    lab.until(lambda: found() == {names[phase]: failure for phase, failure in FAILURES.items()})
    assert [node["machine"] for node in lab.ready().values()] == [f"n{len(names) + 1}"]


def test_a_rack_says_what_it_cannot_do_and_leaves_nothing(lab):
    lab.up(3, "all=0.1")
    server = os.pidfd_open(int((lab.rack / "server.pid").read_text()))
    wrong = rack("fault", "--dir", lab.rack, "n1", "fail=flying")
    assert (wrong.returncode, "firmware, ramdisk, erase" in wrong.stderr) == (1, True)
    assert "another rack is up" in rack("up", "--dir", lab.rack, "--simulated", 4).stderr
    assert (
        "there is no phase 'flying'" in rack("up", "--dir", lab.rack, "--simulated", 3, "--seconds", "flying=1").stderr
    )
    assert rack("down", "--dir", lab.rack).returncode == 0
    assert select.select([server], [], [], 0)[0], "the rack's process outlives it"
    os.close(server)
    assert not (lab.rack / "rack.json").exists()


def test_the_demo_goes_the_whole_round_as_an_ordinary_user(tmp_path):
    command = [
        sys.executable,
        ROOT / "tools" / "demo_simulated.py",
        "--once",
        "--machines",
        "3",
        "--seconds",
        "all=0.1",
    ]
    ordinary = ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
    if ordinary and subprocess.run([*ordinary, "true"], check=False, capture_output=True).returncode:
        pytest.skip("root cannot become an ordinary user here: user namespaces are switched off")
    done = subprocess.run([*ordinary, *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "each by its proven host key" in done.stdout
    assert "3 of them erased, written anew and READY" in done.stdout
    assert not (tmp_path / "var" / "simulated" / "rack" / "rack.json").exists()

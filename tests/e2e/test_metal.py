"""The main job on a real machine: empty disk, IPMI, PXE, agent, image by diskimage-builder, login; and what then holds.

One rack, one daemon, one machine for all tests of this file; they are told in order, as its life goes.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and taps need root")]


def load_demo():
    """The same program that `make run` is: the rack, the YAML and the daemon of the tests are the demo's."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    return module


class Lab:
    """The running pool."""

    def __init__(self, demo, rack, folder):
        self.demo = demo
        self.rack = rack
        self.folder = folder
        self.machine = rack["machines"][0]
        self.client = demo.Client(str(folder / "var" / "nodepool.sock"))

    def inside(self, *command, timeout=60):
        command = ["ip", "netns", "exec", self.rack["namespace"], *map(str, command)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)

    def ipmitool(self, *words):
        bmc = self.machine["bmc"]
        return self.inside(
            "ipmitool", "-I", "lanplus", "-H", bmc["host"], "-p", bmc["port"], "-U", bmc["username"], "-P",
            bmc["password"], *words,
        ).stdout.strip()  # fmt: skip

    def nodes(self, *states):
        return [node for node in self.client.items("/nodes") if node["state"] in states]

    def node(self):
        [node] = self.nodes("ready", "in-use")
        return self.client.get(f"/nodes/{node['id']}")

    def ssh(self, command, timeout=40):
        node = self.node()
        known = self.folder / "known_hosts"
        known.write_text(f"{node['address']} {node['host_key']}\n")
        return self.inside(
            "ssh", "-i", self.folder / "var" / "id_ed25519", "-o", f"UserKnownHostsFile={known}", "-o",
            "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "LogLevel=ERROR",
            f"root@{node['address']}", command, timeout=timeout,
        )  # fmt: skip

    def until(self, true, seconds):
        end = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < end, (self.folder / "var" / "nodepoold.log").read_text()[-4000:]
            time.sleep(0.5)  # a machine under emulation: there is no event to wait on from out here
        return found


@pytest.fixture(scope="module")
def lab():
    folder = ROOT / "var" / "e2e"
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("var/nodepool.db*"), folder / "var" / "images"]:
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
    before = Path.cwd()
    os.chdir(folder)  # the demo's files are in the var/ of where it runs
    try:
        demo = load_demo()
        demo._check()
        demo._agent()
        with demo._rack(1) as rack:
            demo._write_yaml(rack, 1)
            with demo._daemon(rack) as daemon:
                lab = Lab(demo, rack, folder)
                demo._answers(lab.client, daemon)
                demo._watch(lab.client, daemon, 1)
                yield lab
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert rack["namespace"] not in left
    finally:
        os.chdir(before)


@pytest.mark.timeout(420)
def test_from_an_empty_disk_to_a_login_with_the_host_key_that_was_made_on_it(lab):
    done = lab.ssh("cat /etc/hostname /proc/sys/kernel/random/boot_id; findmnt -no SOURCE,FSTYPE /; id -u")
    assert done.returncode == 0, done.stderr
    hostname, boot_id, root, uid = done.stdout.splitlines()
    assert (hostname, uid) == (lab.machine["name"], "0")
    assert root.split()[1] == "ext4"
    assert boot_id == lab.node()["boot_id"]


def test_the_file_system_fills_the_disk_and_no_old_byte_is_left_behind_it(lab):
    size = int(lab.ssh("findmnt -bno SIZE /").stdout)
    disk = lab.machine["disks"][0]
    assert size > 0.85 * disk["size"]
    with Path(disk["path"]).open("rb") as file:  # it was prefilled with 0xAA and ignores discard
        file.seek(disk["size"] - (64 << 20))
        assert b"\xaa" * 512 not in file.read()


def test_the_time_to_ready_is_told_phase_by_phase(lab):
    phases = [phase["phase"] for phase in lab.node()["timeline"] if phase["state"] == "building"]
    assert [phase for phase in phases if phase not in {"queued", "waiting"}][-4:] == [
        "write",
        "configure",
        "start",
        "login",
    ]


def test_ipmitool_and_the_daemon_agree_on_power(lab):
    [machine] = lab.client.items("/machines")
    assert machine["power"] == "on"
    assert lab.ipmitool("power", "status") == "Chassis Power is on"


def test_a_plain_reboot_comes_up_from_the_disk(lab):
    before = lab.node()["boot_id"]
    lab.ssh("systemctl reboot")

    def rebooted():
        done = lab.ssh("cat /proc/sys/kernel/random/boot_id")
        return done.returncode == 0 and done.stdout.strip() != before

    lab.until(rebooted, 120)
    assert lab.node()["state"] == "ready"


def test_the_requestors_key_is_on_when_the_node_is_handed_over(lab):
    key = lab.folder / "user_key"
    if not key.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = key.with_suffix(".pub").read_text().strip()
    request = lab.client.post("/requests", {"nodes": [{"label": lab.demo.LABEL, "count": 1}], "ssh_keys": [public]})
    request = lab.client.get(f"/requests/{request['id']}", wait=30)
    assert request["state"] == "fulfilled", json.dumps(request)
    assert public.split()[1] in lab.ssh("cat .ssh/authorized_keys").stdout


def test_what_is_released_is_wiped_and_ready_again_with_another_host_key(lab):
    used = lab.node()
    lab.ssh("echo left-by-its-user > /root/marker; sync")
    lab.client.post(f"/nodes/{used['id']}/release")
    node = lab.until(lambda: next((n for n in lab.nodes("ready") if n["id"] != used["id"]), None), 180)
    assert lab.client.get(f"/nodes/{node['id']}")["host_key"] != used["host_key"]
    assert lab.ssh("ls /root/marker").returncode != 0

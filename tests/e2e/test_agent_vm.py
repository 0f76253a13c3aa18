"""The agent in its ramdisk on a QEMU machine: real devices, a real kernel, a real address by DHCP.

One boot serves all tests here; they run in the order of a machine's life.  What is on the disks is read by this
system from the disks' files, not asked of the agent.
"""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import agent_lab
import pytest
from agent_server import Daemon

from nodepool.image.ramdisk import build_ramdisk

MIB = 1024 * 1024
BUILT = Path(__file__).parents[2] / "var/agent-test"
ROOT_START = 2 * MIB
KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEfx nodepool\'s "own" key'

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(agent_lab.missing()), reason=agent_lab.missing() or "-")]


def old_disk(path, size):
    """A disk full of somebody's bytes."""
    path.write_bytes(b"\xaa" * size)
    return path


def debugfs(disk, command):
    """What e2fsprogs reads of the root file system on a disk's file."""
    done = subprocess.run(
        ["/sbin/debugfs", "-R", command, f"{disk}?offset={ROOT_START}"], capture_output=True, text=True, check=True
    )
    return done.stdout


def mode_and_owner(disk, path):
    found = re.search(r"Mode:\s+(\d+).*?User:\s+(\d+)\s+Group:\s+(\d+)", debugfs(disk, f"stat {path}"), re.DOTALL)
    return found.groups()


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A tiny system's image: GPT, a BIOS boot partition, root last; with what an image brings from its own past."""
    folder = tmp_path_factory.mktemp("image")
    root = folder / "root"
    for name in ("etc/ssh", "etc/cloud/cloud.cfg.d", "root", "home/ops", "var/lib"):
        (root / name).mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nops:x:1000:1001::/home/ops:/bin/sh\n")
    (root / "etc/hosts").write_text("127.0.0.1\tlocalhost\n127.0.1.1\told-name\n")
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (root / "etc/ssh/ssh_host_rsa_key").write_text("everybody's\n")
    (root / "marker").write_bytes(os.urandom(MIB))
    disk = folder / "image.raw"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    table = "label: gpt\nstart=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649\nstart=4096, type=linux\n"
    subprocess.run(["/sbin/sfdisk", "-q", disk], input=table, text=True, check=True)
    place = f"offset={ROOT_START},lazy_itable_init=1"
    subprocess.run(
        ["/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-E", place, "-d", root, disk, "60M"], check=True
    )
    return disk


class Booted:
    """The machine with its daemon and its disks."""

    def __init__(self, folder, lab, daemon) -> None:
        self.folder = folder
        self.daemon = daemon
        self.roomy = old_disk(folder / "roomy.raw", 192 * MIB)
        self.small = old_disk(folder / "small.raw", 32 * MIB)
        files = build_ramdisk(BUILT, lambda _: None)
        words = f"nodepool.url={daemon.url} nodepool.token={daemon.token} nodepool.mac={lab.mac}"
        devices = [
            *("-drive", f"file={self.roomy},if=none,id=d0,format=raw,cache=unsafe,discard=ignore"),
            *("-device", "ide-hd,drive=d0,bus=ide.0,serial=ROOMY,wwn=0x5000c50015ea71aa"),
            *("-drive", f"file={self.small},if=none,id=d1,format=raw,cache=unsafe,discard=unmap"),
            *("-device", "nvme,drive=d1,serial=SMALL"),
        ]
        self.qemu = lab.boot(files.kernel, files.initrd, words, devices)
        self.hello = daemon.wait_for(lambda: daemon.hellos)[0]

    def write(self, content, device, **more):
        """Give an image to be written; returns the last report."""
        self.daemon.files["/image"] = content
        return self.daemon.carry_out("write", url=f"{self.daemon.url}/image", device=device, **more)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vm")
    with agent_lab.Lab(folder) as lab, Daemon(lab.listen()) as daemon:
        try:
            yield Booted(folder, lab, daemon)
        finally:
            print(lab.console.read_text(errors="replace") if lab.console.exists() else "the machine never started")


@pytest.fixture(scope="module")
def erased(machine):
    return machine.daemon.carry_out("erase", level="default")


@pytest.fixture(scope="module")
def written(machine, erased, image):
    content = image.read_bytes()
    return machine.write(
        content, "sda", size=len(content), sha256=hashlib.sha256(content).hexdigest(), encoding="raw", min_size=0
    )


@pytest.fixture(scope="module")
def configured(machine, written):
    return machine.daemon.carry_out(
        "configure", device="sda", hostname="node-0000000007", user="ops", authorized_keys=f"{KEY}\n", instance_id="n7"
    )


def test_the_machine_says_what_it_is(machine):
    told = machine.hello

    assert told["fact.arch"] == "x86_64"
    assert told["fact.firmware"] == "bios"
    assert told["fact.vendor"] == "QEMU"
    assert told["nic.0.mac"] == "52:54:00:a9:e7:01"
    assert [(told[f"disk.{n}.name"], int(told[f"disk.{n}.size"]), told[f"disk.{n}.serial"]) for n in (0, 1)] == [
        ("sda", 192 * MIB, "ROOMY"),
        ("nvme0n1", 32 * MIB, "SMALL"),
    ]
    assert told["disk.0.wwn"] == "naa.5000c50015ea71aa"
    assert (told["disk.0.rotational"], told["disk.1.rotational"]) == ("1", "0")
    assert 400 * MIB < int(told["fact.memory"]) < 512 * MIB


def test_after_erase_no_old_byte_is_on_any_disk_though_one_ignores_discard(machine, erased):
    assert (erased["state"], erased.get("result.disks")) == ("done", "sda,nvme0n1"), erased
    assert machine.roomy.read_bytes() == bytes(192 * MIB)
    assert machine.small.read_bytes() == bytes(32 * MIB)


def test_an_image_larger_than_the_disk_is_refused_before_a_byte_is_written(machine, erased, image):
    told = machine.write(image.read_bytes(), "nvme0n1", size=64 * MIB, sha256="0" * 64, encoding="raw", min_size=0)

    assert told["code"] == "disk-too-small"
    assert machine.small.read_bytes() == bytes(32 * MIB)


def test_an_altered_byte_is_found_out(machine, erased):
    content = bytearray(os.urandom(MIB))
    sha256 = hashlib.sha256(content).hexdigest()
    content[4711] ^= 1
    told = machine.write(bytes(content), "nvme0n1", size=MIB, sha256=sha256, encoding="raw", min_size=0)

    assert told["code"] == "image-altered", told


def test_what_is_on_the_disk_is_the_image_byte_by_byte(machine, erased):
    content = os.urandom(5 * MIB) + bytes(6 * MIB) + os.urandom(4096 + 512)
    sha256 = hashlib.sha256(content).hexdigest()
    told = machine.write(content, "nvme0n1", size=len(content), sha256=sha256, encoding="raw", min_size=0)

    assert (told["state"], told.get("result.sha256")) == ("done", sha256), told
    assert machine.small.read_bytes()[: len(content)] == content


def test_a_written_image_fills_the_disk(machine, written):
    assert written["state"] == "done", written
    table = json.loads(subprocess.run(["/sbin/sfdisk", "-J", machine.roomy], capture_output=True, check=True).stdout)
    last = table["partitiontable"]["partitions"][-1]
    blocks = int(re.search(r"Block count:\s+(\d+)", debugfs(machine.roomy, "stats")).group(1))

    assert (last["start"] + last["size"]) * 512 > 190 * MIB
    assert blocks * 4096 > 188 * MIB


def test_the_host_key_that_is_reported_is_the_one_on_the_disk_and_no_old_one_is_left(machine, configured):
    assert configured["state"] == "done", configured
    public = debugfs(machine.roomy, "cat /etc/ssh/ssh_host_ed25519_key.pub")

    assert public.split()[:2] == configured["result.host_key"].split()
    assert "BEGIN OPENSSH PRIVATE KEY" in debugfs(machine.roomy, "cat /etc/ssh/ssh_host_ed25519_key")
    assert mode_and_owner(machine.roomy, "/etc/ssh/ssh_host_ed25519_key") == ("0600", "0", "0")
    assert "rsa" not in debugfs(machine.roomy, "ls /etc/ssh")


def test_the_users_key_is_put_in_with_the_modes_that_sshd_asks_for(machine, configured):
    assert debugfs(machine.roomy, "cat /home/ops/.ssh/authorized_keys") == f"{KEY}\n"
    assert mode_and_owner(machine.roomy, "/home/ops/.ssh") == ("0700", "1000", "1001")
    assert mode_and_owner(machine.roomy, "/home/ops/.ssh/authorized_keys") == ("0600", "1000", "1001")


def test_the_new_system_has_a_name_and_an_id_of_its_own(machine, configured):
    assert debugfs(machine.roomy, "cat /etc/hostname") == "node-0000000007\n"
    assert debugfs(machine.roomy, "cat /etc/hosts") == "127.0.0.1\tlocalhost\n127.0.1.1\tnode-0000000007\n"
    assert debugfs(machine.roomy, "cat /etc/machine-id") == ""


def test_cloud_init_is_told_to_keep_the_host_key_and_to_look_nowhere_else(machine, configured):
    seed = "/var/lib/cloud/seed/nocloud"

    assert debugfs(machine.roomy, f"cat {seed}/meta-data") == "instance-id: n7\nlocal-hostname: node-0000000007\n"
    assert "ssh_deletekeys: false" in debugfs(machine.roomy, f"cat {seed}/user-data")
    assert "[NoCloud, None]" in debugfs(machine.roomy, "cat /etc/cloud/cloud.cfg.d/99-nodepool.cfg")


def test_the_file_system_was_left_clean(machine, configured, tmp_path):
    copy = tmp_path / "root.ext4"
    with machine.roomy.open("rb") as disk, copy.open("wb") as file:
        disk.seek(ROOT_START)
        file.write(disk.read(189 * MIB))
    done = subprocess.run(["/sbin/e2fsck", "-f", "-n", copy], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout


def test_start_restarts_the_machine_after_it_was_reported(machine, configured):
    told = machine.daemon.carry_out("start", method="reboot", device="sda")

    assert told["state"] == "done"
    assert machine.qemu.wait(20) == 0  # QEMU was told to end where the machine would start again

"""The main job on real machines: empty disk, IPMI, PXE, agent, image by diskimage-builder, login; and what then holds.

One rack of a BIOS and a UEFI machine and one daemon for all tests of this file; they are told in order, as the
machines' lives go, and both machines do at the same time what takes long.
"""

import base64
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MACHINES = ("n1", "n2")  # BIOS with a disk that ignores discard and was full of 0xAA; UEFI
MARK = b"left-by-the-last-user"
MIB = 1 << 20
EFI_VARIABLES = "/sys/firmware/efi/efivars"
MOUNTED = f"mountpoint -q {EFI_VARIABLES} || mount -t efivarfs efivarfs {EFI_VARIABLES}"
EFI_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"  # the namespace of UEFI's own variables (UEFI 2.10, section 3.3)
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
        self.machines = {machine["name"]: machine for machine in rack["machines"]}
        self.client = demo.Client(str(folder / "var" / "nodepool.sock"))

    def inside(self, *command, timeout=60):
        """Run a command beside the machines; one that a machine keeps waiting while it goes down has failed."""
        command = ["ip", "netns", "exec", self.rack["namespace"], *map(str, command)]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 255, "", f"no answer within {timeout} s")

    def ipmitool(self, name, *words):
        bmc = self.machines[name]["bmc"]
        return self.inside(
            "ipmitool", "-I", "lanplus", "-H", bmc["host"], "-p", bmc["port"], "-U", bmc["username"], "-P",
            bmc["password"], *words,
        ).stdout.strip()  # fmt: skip

    def nodes(self, *states):
        """The nodes in these states, by the machine that each is on."""
        return {node["machine"]: node for node in self.client.items("/nodes") if node["state"] in states}

    def node(self, name):
        return self.client.get(f"/nodes/{self.nodes('ready', 'in-use')[name]['id']}")

    def ssh(self, name, command, timeout=40):
        node = self.node(name)
        known = self.folder / f"known_hosts.{name}"
        known.write_text(f"{node['address']} {node['host_key']}\n")
        return self.inside(
            "ssh", "-i", self.folder / "var" / "id_ed25519", "-o", f"UserKnownHostsFile={known}", "-o",
            "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "LogLevel=ERROR",
            "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3",
            f"root@{node['address']}", command, timeout=timeout,
        )  # fmt: skip

    def rack_says(self, name):
        """What the rack tells of a machine."""
        command = [self.demo.BIN / "nodepool-rack", "status", "--dir", "var/rack", "--format", "json"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return next(machine for machine in json.loads(said) if machine["name"] == name)

    def firmware_boots(self):
        """How often each machine's firmware has started since the rack came up: one self test each on real hardware."""
        return {name: self.rack_says(name)["firmware_boots"] for name in MACHINES}

    def disk(self, name):
        return Path(self.machines[name]["disks"][0]["path"])

    def log(self):
        return (self.folder / "var" / "nodepoold.log").read_text()

    def until(self, true, seconds):
        end = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < end, self.log()[-4000:]
            time.sleep(0.5)  # a machine under emulation: there is no event to wait on from out here
        return found

    def until_all_are_up_anew(self, before, seconds=120):
        """Wait until each machine runs another kernel than the one with that boot id; each of them stays READY."""

        def up(name):
            done = self.ssh(name, "cat /proc/sys/kernel/random/boot_id")
            return done.returncode == 0 and done.stdout.strip() != before[name]

        for name in MACHINES:
            self.until(lambda name=name: up(name), seconds)
        assert {node["state"] for node in self.nodes("ready", "in-use").values()} == {"ready"}


def places(size):
    """Where marks are left on a disk of so many bytes: before the first partition, all over, in the last MiB."""
    return [40 * 512, *range(size // 2, size - MIB, 256 * MIB), size - MIB + 512 * 1024]


def read_all(path):
    """Every byte that the next user could read of a disk, in overlapping pieces."""
    tail = b""
    with path.open("rb") as file:
        while chunk := file.read(32 * MIB):
            yield tail + chunk
            tail = chunk[-len(MARK) :]


def boot_variables(lab):
    """The UEFI machine's boot variables, read by its own system: name -> content behind the attributes."""
    command = f"cd {EFI_VARIABLES} && for f in Boot*-{EFI_GLOBAL}; do echo ${{f%%-*}} $(base64 -w0 $f); done"
    done = lab.ssh("n2", f"{MOUNTED}; {command}")
    assert done.returncode == 0, done.stderr
    return {name: base64.b64decode(data)[4:] for name, data in map(str.split, done.stdout.splitlines())}


def boot_entry(description, partition):
    """A boot option (UEFI 2.10, sections 3.1.3, 10.3.5.1, 10.3.5.4): a loader on the GPT partition of that identity."""
    disk = struct.pack("<BBHIQQ16sBB", 4, 1, 42, 1, 2048, 16384, partition, 2, 2)
    loader = "\\EFI\\old\\grubx64.efi\0".encode("utf-16-le")
    path = disk + struct.pack("<BBH", 4, 4, 4 + len(loader)) + loader + b"\x7f\xff\x04\x00"
    return struct.pack("<IH", 1, len(path)) + f"{description}\0".encode("utf-16-le") + path


def plant(lab, name, content):
    """Make a UEFI variable on the UEFI machine, which survives resets and power-offs (attributes 7)."""
    data = "".join(f"\\{byte:03o}" for byte in struct.pack("<I", 7) + content)
    done = lab.ssh(
        "n2", f"{MOUNTED}; printf '{data}' >/tmp/v && dd if=/tmp/v of={EFI_VARIABLES}/{name}-{EFI_GLOBAL} bs=4k"
    )
    assert done.returncode == 0, done.stderr


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
        demo._check(len(MACHINES))
        demo._agent()
        with demo._rack(len(MACHINES)) as rack:
            demo._write_yaml(rack, len(MACHINES))
            with demo._daemon(rack) as daemon:
                lab = Lab(demo, rack, folder)
                demo._answers(lab.client, daemon)
                demo._watch(lab.client, daemon, len(MACHINES))
                yield lab
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert rack["namespace"] not in left
    finally:
        os.chdir(before)


@pytest.mark.timeout(420)
@pytest.mark.parametrize("name", MACHINES)
def test_from_an_empty_disk_to_a_login_with_the_host_key_that_was_made_on_it(lab, name):
    done = lab.ssh(name, "cat /etc/hostname /proc/sys/kernel/random/boot_id; findmnt -no SOURCE,FSTYPE /; id -u")
    assert done.returncode == 0, done.stderr
    hostname, boot_id, root, uid = done.stdout.splitlines()
    assert (hostname, uid) == (name, "0")
    assert root.split()[1] == "ext4"
    assert boot_id == lab.node(name)["boot_id"]


def test_each_machine_came_up_by_its_own_firmware(lab):
    found = [lab.ssh(name, "test -d /sys/firmware/efi && echo uefi || echo bios").stdout.strip() for name in MACHINES]
    assert found == ["bios", "uefi"]


@pytest.mark.parametrize("name", MACHINES)
def test_the_file_system_fills_the_disk(lab, name):
    size = int(lab.ssh(name, "findmnt -bno SIZE /").stdout)
    assert size > 0.85 * lab.disk(name).stat().st_size


def test_no_old_byte_is_left_behind_the_image_on_the_disk_that_was_full_of_them(lab):
    path = lab.disk("n1")
    with path.open("rb") as file:
        file.seek(path.stat().st_size - 64 * MIB)
        assert b"\xaa" * 512 not in file.read()


@pytest.mark.parametrize("name", MACHINES)
def test_the_time_to_ready_is_told_phase_by_phase(lab, name):
    phases = [phase["phase"] for phase in lab.node(name)["timeline"] if phase["state"] == "building"]
    assert [phase for phase in phases if phase not in {"queued", "waiting"}][-4:] == [
        "write",
        "configure",
        "start",
        "login",
    ]


@pytest.mark.parametrize("name", MACHINES)
def test_ipmitool_and_the_daemon_agree_on_power(lab, name):
    machine = lab.client.get(f"/machines/{name}")
    assert machine["power"] == "on"
    assert lab.ipmitool(name, "power", "status") == "Chassis Power is on"


def test_the_uefi_firmware_has_an_entry_for_what_was_written_and_it_is_first(lab):
    variables = boot_variables(lab)
    first = variables[f"Boot{int.from_bytes(variables['BootOrder'][:2], 'little'):04X}"]
    assert "nodepool\0".encode("utf-16-le") in first
    assert "\\EFI\\BOOT\\BOOTX64.EFI\0".encode("utf-16-le") in first


@pytest.mark.timeout(300)
def test_a_plain_reboot_comes_up_from_the_disk(lab):
    before = {name: lab.node(name)["boot_id"] for name in MACHINES}
    for name in MACHINES:
        lab.ssh(name, "systemctl reboot")
    lab.until_all_are_up_anew(before)
    assert {lab.node(name)["state"] for name in MACHINES} == {"ready"}


@pytest.mark.timeout(300)
def test_a_machine_that_asks_the_network_unexpectedly_is_sent_to_its_disk(lab):
    before = {name: lab.ssh(name, "cat /proc/sys/kernel/random/boot_id").stdout.strip() for name in MACHINES}
    lab.ipmitool("n2", "chassis", "bootdev", "pxe", "options=efiboot")
    lab.ipmitool("n2", "power", "reset")
    lab.ipmitool("n1", "chassis", "bootdev", "pxe")
    lab.ipmitool("n1", "power", "reset")
    # By UEFI the firmware hears that this boot option has failed and takes up its next one.  OVMF has four more for the
    # same card (IPv6, HTTP), a minute each, before it comes to the disk: that is not waited for.
    console = Path(lab.machines["n2"]["console"])
    lab.until(lambda: b"BdsDxe: failed to start" in console.read_bytes().rpartition(b"expects no network boot")[2], 120)
    lab.ipmitool("n2", "power", "reset")
    lab.until_all_are_up_anew(before)
    for name in MACHINES:
        assert f"{lab.machines[name]['mac']} ({lab.machines[name]['ip']}) gets its disk" in lab.log()


def test_both_are_handed_over_together_with_the_requestors_key_on(lab):
    key = lab.folder / "user_key"
    if not key.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = key.with_suffix(".pub").read_text().strip()
    request = lab.client.post("/requests", {"nodes": [{"label": lab.demo.LABEL, "count": 2}], "ssh_keys": [public]})
    request = lab.client.get(f"/requests/{request['id']}", wait=30)
    assert request["state"] == "fulfilled", json.dumps(request)
    for name in MACHINES:
        assert public.split()[1] in lab.ssh(name, "cat .ssh/authorized_keys").stdout


class Recycled:
    """What was before both nodes were released, and what is once others are READY in their place."""

    def __init__(self, lab):
        self.used = {name: lab.node(name) for name in MACHINES}
        for name in MACHINES:
            self.leave_marks(lab, name)
        plant(lab, "Boot00FE", boot_entry("an earlier life", bytes(range(16))))
        self.planted = boot_variables(lab)
        self.boots_before = lab.firmware_boots()
        for node in self.used.values():
            lab.client.post(f"/nodes/{node['id']}/release")
        old = {node["id"] for node in self.used.values()}

        def ready():
            found = lab.nodes("ready")
            return len(found) == len(MACHINES) and not old & {node["id"] for node in found.values()}

        lab.until(ready, 240)
        self.boots = {name: boots - self.boots_before[name] for name, boots in lab.firmware_boots().items()}

    @staticmethod
    def leave_marks(lab, name):
        """As root can: in a file, and past every file system."""
        path = lab.disk(name)
        dd = "".join(
            f" && dd if=/root/marker of=/dev/vda bs=512 oflag=seek_bytes seek={place} conv=notrunc,fsync status=none"
            for place in places(path.stat().st_size)
        )
        done = lab.ssh(name, f"echo {MARK.decode()} >/root/marker && sync{dd}")
        assert done.returncode == 0, done.stderr
        with path.open("rb") as file:
            for place in places(path.stat().st_size):
                file.seek(place)
                assert file.read(len(MARK)) == MARK


@pytest.fixture(scope="module")
def recycled(lab):
    return Recycled(lab)


@pytest.mark.timeout(400)
def test_what_is_released_is_ready_again_with_another_host_key(lab, recycled):
    for name in MACHINES:
        assert lab.node(name)["host_key"] != recycled.used[name]["host_key"]


@pytest.mark.parametrize("name", MACHINES)
def test_nothing_that_a_user_left_can_be_read_by_the_next_one(lab, recycled, name):
    assert lab.ssh(name, "ls /root/marker").returncode != 0
    assert not any(MARK in piece for piece in read_all(lab.disk(name)))


def test_a_recycle_costs_one_self_test(recycled):
    assert recycled.boots == dict.fromkeys(MACHINES, 1)


def test_boot_entries_of_earlier_lives_are_gone_from_the_uefi_firmware(lab, recycled):
    assert "Boot00FE" in recycled.planted
    variables = boot_variables(lab)
    assert "Boot00FE" not in variables
    ours = [name for name, content in variables.items() if "nodepool\0".encode("utf-16-le") in content]
    assert ours == [f"Boot{int.from_bytes(variables['BootOrder'][:2], 'little'):04X}"]

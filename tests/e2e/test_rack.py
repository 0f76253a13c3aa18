"""The rack on this host: real QEMU machines, switched by ipmitool through the rack's own BMCs."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rack_helpers import DISK_WORD, NETWORK_WORD, SCRIPT_WORD, Up, network_boot, put_boot_sector, rack

from nodepool.rack import accel
from nodepool.rack.accel import Accelerator

BUSYBOX = Path("/bin/busybox")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and taps need root"),
]


def namespaces():
    return {path.name for path in Path("/run/netns").iterdir()} if Path("/run/netns").exists() else set()


def processes_of(folder):
    """Processes whose command line or working folder is in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + os.fsencode((process / "cwd").readlink())
        except OSError:
            continue
        if os.fsencode(folder) in words and int(process.name) != os.getpid():
            found.append(words)
    return found


def ended(pid, seconds=10):
    """Wait until process `pid` is gone."""
    handle = os.pidfd_open(pid)
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    """One rack of two machines for the tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("rack")
    done = rack("up", "--dir", folder, "--machines", 2, "--disk-size", "64M", "--memory", 256)
    assert done.returncode == 0, done.stderr
    yield Up(folder)
    rack("down", "--dir", folder)


def test_one_shot_pxe_boots_the_network_once_and_the_guests_own_reboot_comes_up_from_the_disk(up, tmp_path):
    put_boot_sector(up, "n1")
    with network_boot(up, tmp_path, "#!ipxe\nreboot\n"):
        up.ipmitool("chassis", "bootdev", "pxe")
        up.ipmitool("power", "on")
        with up.console() as console:
            console.wait_for(DISK_WORD)
    status = up.status()
    up.ipmitool("power", "off")
    assert SCRIPT_WORD in console.heard.split(DISK_WORD)[0]
    assert (status["power"], status["boot"], status["firmware_boots"]) == ("on", "default", 2)


def test_one_shot_pxe_is_honoured_by_a_reset_too(up, tmp_path):
    put_boot_sector(up, "n1")
    with network_boot(up, tmp_path, "#!ipxe\nreboot\n"):
        up.ipmitool("power", "on")
        with up.console() as console:
            console.wait_for(DISK_WORD)
            up.ipmitool("chassis", "bootdev", "pxe")
            up.ipmitool("power", "reset")
            console.wait_for(SCRIPT_WORD)
            console.heard = b""
            console.wait_for(DISK_WORD)
            assert SCRIPT_WORD not in console.heard
    up.ipmitool("power", "off")


def test_without_a_word_from_ipmi_the_disk_comes_first(up):
    put_boot_sector(up, "n2")
    up.ipmitool("power", "on", name="n2")
    with up.console("n2") as console:
        console.wait_for(DISK_WORD)
    up.ipmitool("power", "off", name="n2")
    assert NETWORK_WORD not in console.heard


def test_reset_boots_anew_in_the_same_process(up):
    up.ipmitool("power", "on")
    before = up.status()
    up.ipmitool("power", "reset")
    after = up.status()
    up.ipmitool("power", "off")
    assert after["pid"] == before["pid"]
    assert after["firmware_boots"] == before["firmware_boots"] + 1


def test_power_reads_off_once_the_guest_has_shut_down(up):
    up.ipmitool("power", "on")
    with up.console() as console:
        os.kill(up.status()["pid"], signal.SIGTERM)
        console.wait_for_end()
    assert "is off" in up.ipmitool("power", "status")


def test_cycle_starts_another_qemu(up):
    up.ipmitool("power", "on")
    before = up.status()["pid"]
    up.ipmitool("power", "cycle")
    after = up.status()["pid"]
    up.ipmitool("power", "off")
    assert after not in (None, before)
    assert up.status()["pid"] is None


def test_console_log_has_a_line_for_each_power_on(up):
    log = Path(up.machine()["console"])
    before = log.read_text(errors="replace").count("power on, boot")
    for _ in range(2):
        up.ipmitool("power", "on")
        up.ipmitool("power", "off")
    assert log.read_text(errors="replace").count("power on, boot") == before + 2


def test_first_disk_is_full_of_old_bytes_and_ignores_discard(up):
    disk = up.machine("n1")["disks"][0]
    assert disk["ignores_discard"]
    with Path(disk["path"]).open("rb") as file:
        file.seek(-4096, os.SEEK_END)
        assert file.read() == b"\xaa" * 4096
    assert Path(disk["path"]).stat().st_blocks * 512 >= disk["size"]


def test_other_disks_are_sparse(up):
    path = Path(up.machine("n2")["disks"][0]["path"])
    assert path.stat().st_blocks * 512 < 1 << 20


def test_guid_of_the_bmc_is_the_uuid_that_the_firmware_shows(up):
    assert up.machine()["uuid"] in up.ipmitool("mc", "guid")
    up.ipmitool("power", "on")
    with up.console() as console:
        console.wait_for(up.machine()["uuid"].encode())
    up.ipmitool("power", "off")


def test_ipmipower_sees_all_bmcs_of_the_rack(up):
    for name in ("n1", "n2"):
        place = up.machine(name)["bmc"]
        account = ["-u", place["username"], "-p", place["password"]]
        out = up.inside("ipmipower", "-D", "LAN_2_0", "-I", "17", "-h", place["host"], *account, "--stat")
        assert out.strip() == f"{place['host']}: off"


def test_fault_is_set_shown_and_cleared(up):
    assert rack("fault", "--dir", up.folder, "n1", "refuse=control:0xc0", "lag=3").returncode == 0
    assert up.status()["faults"] == ["lag=3.0", "refuse=control:0xc0"]
    assert "n1" in rack("status", "--dir", up.folder).stdout
    assert rack("fault", "--dir", up.folder, "n1", "--clear").stdout.endswith("faults of n1: none\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["n9", "full"], "there is no machine 'n9'; the machines are n1, n2"),
        (["n1", "explode"], "there is no fault 'explode'"),
        (["n1", "silent=never"], "give one of open, rakp1"),
    ],
)
def test_fault_that_cannot_be_set_says_what_can(up, words, sentence):
    done = rack("fault", "--dir", up.folder, *words)
    assert done.returncode == 1
    assert sentence in done.stderr


def test_up_of_a_rack_that_is_up_changes_nothing(up):
    before = (up.folder / "rack.json").read_bytes()
    done = rack("up", "--dir", up.folder, "--machines", 2, "--disk-size", "64M", "--memory", 256)
    assert done.returncode == 0, done.stderr
    assert (up.folder / "rack.json").read_bytes() == before


def test_up_with_other_settings_is_refused(up):
    done = rack("up", "--dir", up.folder, "--machines", 1)
    assert done.returncode == 1
    assert "nodepool-rack down" in done.stderr


def test_passwords_are_for_the_owner_only(up):
    assert (up.folder / "rack.json").stat().st_mode & 0o077 == 0


def small(folder, *words):
    done = rack("up", "--dir", folder, "--disk-size", "16M", "--memory", 128, *words)
    assert done.returncode == 0, done.stderr
    return Up(folder)


def test_down_leaves_nothing_behind(tmp_path):
    up = small(tmp_path)
    up.ipmitool("power", "on")
    assert rack("down", "--dir", tmp_path).returncode == 0
    assert up.namespace not in namespaces()
    assert processes_of(tmp_path) == []
    assert not list(tmp_path.glob("**/disk*")) + list(tmp_path.glob("**/*.sock")) + list(tmp_path.glob("rack.json"))


def test_disks_can_be_kept_for_the_next_rack(tmp_path):
    disk = Path(small(tmp_path).machine()["disks"][0]["path"])
    with disk.open("r+b") as file:
        file.write(b"mine")
    rack("down", "--dir", tmp_path, "--keep-disks")
    small(tmp_path)
    try:
        assert disk.read_bytes()[:4] == b"mine"
    finally:
        rack("down", "--dir", tmp_path)


def test_machines_die_with_a_server_that_is_killed_and_down_cleans_up(tmp_path):
    up = small(tmp_path)
    up.ipmitool("power", "on")
    qemu = up.status()["pid"]
    os.kill(int((tmp_path / "server.pid").read_text()), signal.SIGKILL)
    assert ended(qemu)
    assert "is not up" in rack("status", "--dir", tmp_path).stderr
    assert rack("down", "--dir", tmp_path).returncode == 0
    assert up.namespace not in namespaces()


def test_up_after_a_server_that_was_killed_makes_a_new_rack(tmp_path):
    up = small(tmp_path)
    os.kill(int((tmp_path / "server.pid").read_text()), signal.SIGKILL)
    again = small(tmp_path)
    try:
        assert "is off" in again.ipmitool("power", "status")
        assert again.namespace == up.namespace
    finally:
        rack("down", "--dir", tmp_path)


def test_folder_with_a_long_path_is_no_trouble(tmp_path):
    folder = tmp_path / ("x" * 120)
    up = small(folder)
    try:
        up.ipmitool("power", "on")
        assert up.status()["power"] == "on"
    finally:
        rack("down", "--dir", folder)


def test_uefi_machine_beside_a_bios_one_gets_to_its_own_network_boot(tmp_path):
    up = small(tmp_path, "--machines", 2, "--firmware", "bios,uefi", "--memory", 256)
    try:
        up.ipmitool("chassis", "bootdev", "pxe", "options=efiboot", name="n2")
        up.ipmitool("power", "on", name="n2")
        with up.console("n2") as console:
            console.wait_for(b"iPXE")
    finally:
        rack("down", "--dir", tmp_path)
    assert [machine["firmware"] for machine in up.json["machines"]] == ["bios", "uefi"]


def test_firmware_that_the_rack_has_not_is_a_usage_error(tmp_path):
    done = rack("up", "--dir", tmp_path, "--firmware", "bios,coreboot")
    assert done.returncode == 2
    assert "give bios, uefi or one for each machine" in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--machines", 20, "--memory", 1 << 20], "take fewer (--machines) or smaller ones (--memory)"),
        (["--disk-size", "900T"], "free some, take --disk-size, or another --dir"),
        (["--machines", 0], "a rack has 1 to 200 machines"),
    ],
)
def test_host_that_is_too_small_is_told_so_and_left_alone(tmp_path, words, sentence):
    before = namespaces()
    done = rack("up", "--dir", tmp_path, *words)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert namespaces() == before


def test_missing_programs_are_named_by_their_package(tmp_path):
    command = [sys.executable, "-m", "nodepool.cmd.rack", "up", "--dir", str(tmp_path)]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert "apt-get install iproute2 qemu-system-x86 util-linux" in done.stderr


def test_without_root_the_rack_says_so(tmp_path):
    command = ["unshare", "--user", sys.executable, "-m", "nodepool.cmd.rack", "up", "--dir", str(tmp_path / "rack")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("needs root: run it with sudo\n")


def test_wrong_size_is_a_usage_error(tmp_path):
    done = rack("up", "--dir", tmp_path, "--disk-size", "huge")
    assert done.returncode == 2
    assert "give e.g. 2G" in done.stderr


def test_down_of_no_rack_is_said(tmp_path):
    done = rack("down", "--dir", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "there is no rack in" in done.stderr


def test_accelerator_is_chosen_with_a_reason(up):
    assert up.json["accelerator"]["name"] in {"kvm", "tcg"}
    assert up.json["accelerator"]["reason"]


def test_kvm_that_was_never_seen_to_boot_a_kernel_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(accel, "_host_kernels", list)
    assert accel.choose(tmp_path).name == "tcg"
    assert not (tmp_path / "accel.json").exists()


def test_probe_that_hears_no_word_falls_back_to_tcg():
    not_a_kernel = Path("/usr/lib/ipxe/ipxe.lkrn")
    assert accel.probe(not_a_kernel, BUSYBOX, 2.0, "tcg").reason == "no kernel came up under tcg within 2 s"


def test_answer_of_the_probe_is_kept_until_the_host_boots_anew(tmp_path):
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (tmp_path / "accel.json").write_text(json.dumps({"name": "kvm", "reason": "seen", "host_boot": boot_id}))
    kept = accel.choose(tmp_path)
    (tmp_path / "accel.json").write_text(json.dumps({"name": "kvm", "reason": "seen", "host_boot": "another"}))
    assert kept == Accelerator("kvm", "seen") or not os.access("/dev/kvm", os.R_OK | os.W_OK)
    assert accel.choose(tmp_path).reason != "seen"


def test_initramfs_of_the_probe_is_a_cpio_archive(tmp_path):
    archive = accel.cpio({"bin": None, "bin/busybox": b"x" * 1001, "init": b"y"})
    done = subprocess.run(["cpio", "-idv"], input=archive, cwd=tmp_path, capture_output=True, check=True)
    assert done.stderr.split()[:3] == [b"bin", b"bin/busybox", b"init"]
    assert (tmp_path / "bin/busybox").read_bytes() == b"x" * 1001
    assert os.access(tmp_path / "init", os.X_OK)

"""A disk is assembled from a small hand-made root and does what firmware asks of it; no network, no loop device."""

import os
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest

from nodepool.config.records import DiskImage
from nodepool.errors import Code, Permanent
from nodepool.image import assemble, verify
from nodepool.image.make import ImagePaths, make_image
from nodepool.image.process import bounded

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="keeping owners needs root"),
]

WORDS = "first light from the root file system"
MENU = f"""\
serial --unit=0 --speed=115200
terminal_output serial console
echo "{WORDS}"
"""
OVMF = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")


def plant(root, without=""):
    """A root with everything that is looked for, but for `without`."""
    for path in ("sbin/init", "usr/sbin/sshd", "vmlinuz", "initrd.img", "boot/grub/grub.cfg", "etc/fstab", "bin/su"):
        if path != without:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(path)
    (root / "boot/grub/grub.cfg").write_text(MENU)
    (root / "boot/vmlinuz-6.1.0-1-test").write_text("a kernel")
    (root / "etc/fstab").write_text("LABEL=cloudimg-rootfs / ext4 defaults 0 1\ntmpfs /scratch tmpfs defaults 0 0\n")
    os.chown(root / "bin/su", 1234, 5678)
    (root / "bin/su").chmod(0o4755)


def disk_of(folder, without=""):
    """The assembled disk of a planted root, and what bounds the work on it."""
    work = bounded(folder / "log", 120, threading.Event())
    root, tar = folder / "root", folder / "work/root.tar"
    plant(root, without)
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as out:
        out.add(root, ".")
    assemble.assemble(work, tar, folder / "disk.raw", lambda step: None)
    return work, folder / "disk.raw"


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    return disk_of(tmp_path_factory.mktemp("disk"))


def debugfs(disk, command):
    root = verify.read_table(disk)[-1]
    done = subprocess.run(
        ["debugfs", "-R", command, f"{disk}?offset={root.start}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return done.stdout


def say(folder, disk, *firmware):
    """What the machine says on its serial line, up to the menu's words."""
    command = [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-m",
        "256",
        "-nodefaults",
        "-display",
        "none",
        "-serial",
        "stdio",
    ]
    command += ["-drive", f"file={disk},if=virtio,format=raw,snapshot=on", *firmware]
    with (folder / "qemu.err").open("wb") as errors:
        machine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
    watchdog = threading.Timer(50, machine.kill)
    watchdog.start()
    heard = b""
    try:
        while WORDS.encode() not in heard and (chunk := machine.stdout.read1(4096)):
            heard += chunk
    finally:
        watchdog.cancel()
        machine.kill()
        machine.wait()
        machine.stdout.close()
    return heard.decode(errors="replace")


def test_the_disk_passes_its_own_examination(assembled):
    work, disk = assembled
    verify.verify(work, disk, ours=True)  # raises what it does not like
    assert len(verify.read_table(disk)) == 3  # BIOS boot, EFI system, root


def test_a_bios_finds_its_way_to_the_root_file_system(assembled, tmp_path):
    assert WORDS in say(tmp_path, assembled[1], "-machine", "pc,graphics=off")


@pytest.mark.skipif(not OVMF.exists(), reason="apt-get install ovmf")
def test_a_uefi_firmware_finds_its_way_to_the_root_file_system(assembled, tmp_path):
    variables = shutil.copy("/usr/share/OVMF/OVMF_VARS_4M.fd", tmp_path / "vars.fd")
    flash = [
        "-drive",
        f"if=pflash,format=raw,readonly=on,file={OVMF}",
        "-drive",
        f"if=pflash,format=raw,file={variables}",
    ]
    assert WORDS in say(tmp_path, assembled[1], "-machine", "q35", *flash)


def test_owners_and_modes_are_kept(assembled):
    described = debugfs(assembled[1], "stat /bin/su")
    assert "Mode:  04755" in described
    assert "User:  1234   Group:  5678" in described


def test_the_root_is_mounted_by_its_own_name_and_other_mounts_stay(assembled):
    first, second = debugfs(assembled[1], "cat /etc/fstab").splitlines()
    assert first.startswith("UUID=")
    assert second == "tmpfs /scratch tmpfs defaults 0 0"


def test_the_kernel_is_told_where_its_root_is(assembled):
    name = debugfs(assembled[1], "cat /etc/fstab").split()[0]
    assert debugfs(assembled[1], "cat /etc/kernel/cmdline").startswith(f"root={name} ro ")


def test_partition_table_and_backup_are_sound_to_sfdisk(assembled):
    done = subprocess.run(["sfdisk", "--verify", assembled[1]], capture_output=True, text=True, check=True, timeout=20)
    assert "No errors detected" in done.stdout


def test_an_image_that_nobody_could_log_in_to_is_refused(tmp_path):
    work, disk = disk_of(tmp_path, without="usr/sbin/sshd")
    with pytest.raises(Permanent, match="no SSH server") as caught:
        verify.verify(work, disk, ours=True)
    assert caught.value.code is Code.IMAGE_UNREADABLE


def test_a_damaged_file_system_is_refused(assembled, tmp_path):
    work, disk = assembled
    damaged = tmp_path / "disk.raw"
    subprocess.run(["cp", "--sparse=always", disk, damaged], check=True, timeout=20)
    with damaged.open("r+b") as out:
        out.seek(verify.read_table(damaged)[-1].start + 4096)  # the group descriptors
        out.write(b"\xaa" * 64)
    with pytest.raises(Permanent, match="damaged") as caught:
        verify.verify(work, damaged, ours=True)
    assert caught.value.code is Code.IMAGE_UNREADABLE


def test_a_build_goes_from_a_tar_to_a_published_disk(tmp_path):
    plant(tmp_path / "root")
    command = tmp_path / "make-tar"
    command.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nexec tar -cf "$2.tar" -C {tmp_path}/root .\n')
    command.chmod(0o755)
    image = DiskImage("tiny", elements=("any",), formats=("raw", "raw.zst"), dib_cmd=str(command))
    paths = ImagePaths(tmp_path / "images", tmp_path / "logs")
    made = make_image(image, "0" * 32, paths, lambda phase, share: None, threading.Event())
    assert sorted(path.name for path in paths.images_dir.iterdir()) == [
        f"tiny-{'0' * 32}.raw",
        f"tiny-{'0' * 32}.raw.zst",
    ]
    unpacked = subprocess.run(
        ["zstd", "-dcq", made.files["raw.zst"]], capture_output=True, check=True, timeout=20
    ).stdout
    assert unpacked == made.files["raw"].read_bytes()

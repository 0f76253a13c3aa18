"""Building the ramdisk: what goes in, in which form, and when it is built anew."""

import json
import shutil
import stat
import subprocess

import pytest

from nodepool.cmd import agent_build
from nodepool.image import ramdisk
from nodepool.image.ramdisk import AgentFiles, Entry


@pytest.fixture
def built(tmp_path):
    """Files as a build leaves them."""
    files = AgentFiles(tmp_path / "vmlinuz", tmp_path / "initrd.img", tmp_path / "manifest.json")
    for name in ("kernel", "packed"):
        (tmp_path / name).write_text(f"this is {name}")
    ramdisk.install(files, tmp_path / "kernel", tmp_path / "packed", {"inputs": "abc", "kernel": "6.1"})
    return files


def test_the_archive_is_what_cpio_reads_with_folders_links_and_devices():
    archive = ramdisk.cpio(
        {
            "usr/bin/tool": Entry(stat.S_IFREG | 0o755, b"12345"),
            "bin": Entry(stat.S_IFLNK | 0o777, b"usr/bin"),
            "console": Entry(stat.S_IFCHR | 0o600, device=(5, 1)),
        }
    )
    listed = subprocess.run([shutil.which("busybox"), "cpio", "-itv"], input=archive, capture_output=True, check=True)
    lines = [line.split() for line in listed.stdout.decode().splitlines()]

    assert [(line[0], line[-1]) for line in lines] == [
        ("lrwxrwxrwx", "usr/bin"),
        ("crw-------", "console"),
        ("drwxr-xr-x", "usr"),
        ("drwxr-xr-x", "usr/bin"),
        ("-rwxr-xr-x", "usr/bin/tool"),
    ]
    assert len(archive) % 4 == 0


def test_chosen_modules_bring_what_they_need_and_nothing_else():
    needs = {
        "kernel/drivers/net/virtio_net.ko.xz": ["kernel/net/core/failover.ko.xz"],
        "kernel/net/core/failover.ko.xz": [],
        "kernel/drivers/scsi/scsi_debug.ko.xz": [],
        "kernel/sound/core/snd.ko.xz": [],
    }

    assert ramdisk.choose_modules(needs) == {
        "kernel/drivers/net/virtio_net.ko.xz",
        "kernel/net/core/failover.ko.xz",
    }


def test_what_was_built_of_the_same_inputs_is_current(built):
    assert ramdisk.is_current(built, "abc")


def test_other_inputs_ask_for_a_new_build(built):
    assert not ramdisk.is_current(built, "abd")


def test_a_file_that_was_damaged_asks_for_a_new_build(built):
    built.initrd.write_text("this is other")

    assert not ramdisk.is_current(built, "abc")


def test_a_manifest_that_cannot_be_read_asks_for_a_new_build(built):
    built.manifest.write_text("{")

    assert not ramdisk.is_current(built, "abc")


def test_the_manifest_says_what_the_files_were_made_of(built):
    manifest = json.loads(built.manifest.read_text())

    assert (manifest["kernel"], manifest["files"]["vmlinuz"]["size"]) == ("6.1", len("this is kernel"))


def test_missing_tools_are_named_with_their_packages_in_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ramdisk, "TOOLS", {"no-such-tool": "its-package"})
    status = agent_build.run(agent_build_arguments(tmp_path))

    assert status == 1
    assert capsys.readouterr().err == "The agent's ramdisk needs more tools; run: apt-get install its-package\n"


def test_a_tools_libraries_travel_with_it():
    found = ramdisk.libraries([ramdisk.Path(shutil.which("zstd"))])

    assert any(path.name.startswith("libc.so") for path in found)
    assert any(path.name.startswith("ld-") for path in found)


def agent_build_arguments(folder):
    import argparse

    parser = argparse.ArgumentParser()
    agent_build.add_arguments(parser)
    return parser.parse_args(["--dir", str(folder)])

"""Builds through tools/fake-image-create: what is published, what is said of failures, and that nothing is left."""

import os
import stat
import threading
from pathlib import Path

import pytest

from nodepool.config.records import DiskImage
from nodepool.errors import Code, Permanent
from nodepool.image import process
from nodepool.image.make import ImagePaths, make_image

FAKE = Path(__file__).resolve().parents[2] / "tools/fake-image-create"
BUILD = "0123456789abcdef" * 2


class Site:
    """A folder for images and the phases that were told."""

    def __init__(self, folder):
        self.paths = ImagePaths(folder / "images", folder / "images/logs")
        self.phases = []
        self.cancelled = threading.Event()
        self.heard = threading.Condition()

    def make(self, build=BUILD, command=str(FAKE), **more):
        more = {"assembly": "dib", "elements": ("debian-minimal",), "release": "bookworm"} | more
        return make_image(DiskImage("fake", dib_cmd=command, **more), build, self.paths, self.progress, self.cancelled)

    def progress(self, phase, share):
        with self.heard:
            self.phases.append((phase, share))
            self.heard.notify_all()

    def wait_for(self, phase):
        with self.heard:
            assert self.heard.wait_for(lambda: phase in [name for name, _ in self.phases], 20)

    def left(self):
        return sorted(path.name for path in self.paths.images_dir.iterdir())

    @property
    def log(self):
        return self.paths.log_dir / f"fake-{BUILD}.log"


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def alive(pid):
    fields = process._stat(pid)
    return bool(fields) and fields[0] != "Z"


def test_a_build_is_published_under_its_name(site):
    made = site.make()
    assert made.files == {"raw": site.paths.images_dir / f"fake-{BUILD}.raw"}
    assert made.size == 4 << 20 == made.files["raw"].stat().st_size


def test_a_build_leaves_its_file_and_its_log_only(site):
    site.make()
    assert site.left() == [f"fake-{BUILD}.raw", "logs"]


def test_the_builder_is_told_release_and_elements(site):
    with site.make(elements=("debian-minimal", "mine")).files["raw"].open("rb") as disk:
        disk.seek(1 << 20)
        assert disk.readline() == b"fake image of debian-minimal mine (DIB_RELEASE=bookworm)\n"


def test_phases_are_told_in_their_order_with_growing_shares(site):
    site.make()
    names = list(dict.fromkeys(name for name, _ in site.phases))
    assert names[0] == "root.d"
    assert names[-2:] == ["testing", "publish"]
    shares = [share for _, share in site.phases]
    assert shares == sorted(shares)


def test_the_log_holds_what_the_builder_said(site):
    assert "Running" in site.make().log.read_text()


def test_a_compressed_copy_is_made_on_request(site):
    made = site.make(formats=("raw.zst",))
    assert set(made.files) == {"raw.zst"}
    assert made.size == 4 << 20


def test_the_same_content_has_the_same_sum(site):
    assert site.make().sha256 == site.make("f" * 32).sha256


def test_a_failed_build_names_phase_reason_and_log(site):
    with pytest.raises(Permanent) as caught:
        site.make(env_vars={"FAKE_IMAGE_FAIL": "install"})
    assert caught.value.code is Code.IMAGE_BUILD
    assert str(caught.value) == (
        "diskimage-builder failed with status 1 in install.d/10-fake: "
        f"E: Unable to locate package no-such-package; log: {site.log}"
    )


def test_a_failed_build_leaves_its_log_only(site):
    with pytest.raises(Permanent):
        site.make(env_vars={"FAKE_IMAGE_FAIL": "install"})
    assert site.left() == ["logs"]


def test_a_build_that_takes_too_long_is_ended_with_all_its_processes(site):
    with pytest.raises(Permanent, match=r"longer than its build-timeout of 1 s") as caught:
        site.make(env_vars={"FAKE_IMAGE_HANG": "install"}, build_timeout=1.0)
    assert caught.value.code is Code.IMAGE_BUILD
    assert not alive(int(site.log.read_text().rsplit("waiting for process ", 1)[1]))


def test_a_cancelled_build_is_ended_with_all_its_processes(site):
    failure = []

    def build():
        try:
            site.make(env_vars={"FAKE_IMAGE_HANG": "install"})
        except Permanent as err:
            failure.append(err)

    thread = threading.Thread(target=build)
    thread.start()
    site.wait_for("install.d")
    site.cancelled.set()
    thread.join(20)
    assert failure[0].code is Code.CANCELLED
    assert site.left() == ["logs"]


def test_a_build_cancelled_before_it_began_starts_nothing(site):
    site.cancelled.set()
    with pytest.raises(Permanent) as caught:
        site.make()
    assert caught.value.code is Code.CANCELLED
    assert site.phases == []


def test_a_process_in_a_session_of_its_own_is_ended_too(site):
    script = site.paths.images_dir.parent / "own-session"
    script.write_text("#!/bin/sh\nsetsid -w sh -c 'echo pid $$; exec sleep 86400'\n")
    script.chmod(0o755)
    with pytest.raises(Permanent, match="build-timeout"):
        site.make(command=str(script), build_timeout=1.0)
    assert not alive(int(site.log.read_text().rsplit("pid ", 1)[1]))


def test_a_builder_that_makes_nothing_is_caught(site):
    with pytest.raises(Permanent, match=r"true ended well and made no disk\.raw"):
        site.make(command="/bin/true")


def test_a_disk_that_nothing_could_boot_is_not_published(site):
    script = site.paths.images_dir.parent / "empty"
    script.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho nothing > "$2.raw"\n')
    script.chmod(0o755)
    with pytest.raises(Permanent, match="no partition table") as caught:
        site.make(command=str(script))
    assert caught.value.code is Code.IMAGE_UNREADABLE
    assert site.left() == ["logs"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "images").write_text("a file")
    with pytest.raises(Permanent, match=r"cannot build in .*images"):
        Site(tmp_path).make()


def test_a_repeated_build_starts_from_nothing(site):
    scratch = site.paths.images_dir / f".fake-{BUILD}.building"
    scratch.mkdir(parents=True)
    (scratch / "disk.raw").write_text("half a disk")
    site.make()
    assert site.left() == [f"fake-{BUILD}.raw", "logs"]


def test_old_logs_go_as_new_ones_come(tmp_path):
    site = Site(tmp_path)
    site.paths = ImagePaths(tmp_path / "images", tmp_path / "logs", keep_logs=1)
    site.make("1" * 32)
    os.utime(tmp_path / "logs" / f"fake-{'1' * 32}.log", (1000, 1000))
    site.make("2" * 32)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [f"fake-{'2' * 32}.log"]


def test_the_fake_can_be_run_by_anybody():
    assert FAKE.stat().st_mode & stat.S_IXOTH

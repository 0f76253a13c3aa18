"""What diskimage-builder is told, and what is read out of its log."""

from pathlib import Path

import pytest

from nodepool.config.records import DiskImage
from nodepool.errors import Code, Permanent
from nodepool.image import apt, dib

HERE = apt.Host("debian", "bookworm", apt.parse_list("deb http://mirror.example/debian bookworm main"))
IMAGE = DiskImage("debian-12", release="bookworm", elements=("debian-minimal", "nodepool-node"))


def read(*lines):
    told = []
    reader = dib.Reader(lambda phase, share: told.append((phase, share)))
    for line in lines:
        reader.line("2026-11-20 04:49:48.127 | " + line)
    return reader, told


def environment(image=IMAGE, base=None, elements_dir=None, scratch=Path("/images/.x.building")):
    return dib.environment(image, elements_dir, scratch, HERE, base or {"PATH": "/bin"})


def test_phases_are_told_as_they_begin():
    _, told = read(
        "dib-run-parts Running /tmp/dib_build.x/hooks/root.d/08-debootstrap",
        "dib-run-parts Running /tmp/in_target.d/install.d/01-package-installs",
        "dib-run-parts Running /tmp/in_target.d/finalise.d/99-clean-up-cache",
    )
    assert [phase for phase, _ in told] == ["root.d", "install.d", "finalise.d"]


def test_the_share_never_goes_back():
    _, told = read(
        "dib-run-parts Running /h/install.d/01-package-installs",
        "> 0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.",
        "> Unpacking udev (252) ...",
        "> Unpacking openssh-server (1:9.2) ...",
        "> Setting up udev (252) ...",
        "> Setting up openssh-server (1:9.2) ...",
        "dib-run-parts Running /h/pre-install.d/99-late",
    )
    shares = [share for _, share in told]
    assert shares == sorted(shares)


def test_installing_packages_fills_its_phase():
    reader, _ = read(
        "dib-run-parts Running /h/install.d/01-package-installs",
        "> 0 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.",
        "> Unpacking udev (252) ...",
        "> Setting up udev (252) ...",
    )
    assert reader.share == dib.PHASES["post-install"]


def test_the_bootstrap_is_seen_to_go_on():
    reader, _ = read("dib-run-parts Running /h/root.d/08-debootstrap", *["I: Unpacking libc6:amd64..."] * 100)
    assert 0.1 < reader.share < 0.2


def test_the_reader_knows_which_script_runs():
    reader, _ = read("dib-run-parts Running /h/install.d/01-package-installs")
    assert reader.where == "install.d/01-package-installs"


def test_the_environment_names_release_and_mirror():
    env = environment()
    assert (env["DIB_RELEASE"], env["DIB_DISTRIBUTION_MIRROR"]) == ("bookworm", "http://mirror.example/debian")


def test_the_users_variables_win():
    image = DiskImage(
        "x",
        elements=("debian-minimal",),
        env_vars={"DIB_DISTRIBUTION_MIRROR": "http://own.example", "DIB_CHECKSUM": "1"},
    )
    env = environment(image)
    assert (env["DIB_DISTRIBUTION_MIRROR"], env["DIB_CHECKSUM"]) == ("http://own.example", "1")


def test_the_operators_environment_wins_over_apts_mirror():
    env = environment(base={"PATH": "/bin", "DIB_DISTRIBUTION_MIRROR": "http://operator.example"})
    assert env["DIB_DISTRIBUTION_MIRROR"] == "http://operator.example"


def test_secrets_of_the_daemon_do_not_reach_the_build():
    assert "NODEPOOL_PASSWORD" not in environment(base={"PATH": "/bin", "NODEPOOL_PASSWORD": "x"})


def test_the_users_elements_come_before_our_own(tmp_path):
    assert environment(elements_dir=tmp_path)["ELEMENTS_PATH"].split(":") == [str(tmp_path), str(dib.ELEMENTS)]


def test_our_own_element_is_part_of_the_package():
    assert (dib.ELEMENTS / "nodepool-node/element-deps").is_file()


def test_an_image_of_no_known_family_gets_no_mirror():
    assert "DIB_DISTRIBUTION_MIRROR" not in environment(DiskImage("x", elements=("fedora",)))


def test_a_command_may_have_words_before_disk_image_create(tmp_path, monkeypatch):
    for name in ("nsenter", "disk-image-create"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = dib.command_words("nsenter --net=/proc/1/ns/net disk-image-create")
    assert words == ["nsenter", "--net=/proc/1/ns/net", "disk-image-create"]


def test_disk_image_create_is_found_beside_the_python_that_runs_us(tmp_path, monkeypatch):
    (tmp_path / "disk-image-create").write_text("#!/bin/sh\n")
    (tmp_path / "disk-image-create").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python3"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert dib.command_words("disk-image-create") == [str(tmp_path / "disk-image-create")]


def test_a_command_that_does_not_exist_is_named_with_the_remedy():
    with pytest.raises(Permanent, match=r"no command /no/such/thing: correct dib-cmd") as caught:
        dib.command_words("/no/such/thing")
    assert caught.value.code is Code.IMAGE_BUILD


def test_the_failure_names_place_reason_and_log():
    tail = [
        "2026-11-20 04:49:48.127 | > Reading package lists...",
        "2026-11-20 04:49:48.127 | > E: Unable to locate package no-such-package",
        "2026-11-20 04:49:48.127 | > returncode: 100",
        "2026-11-20 04:49:48.127 | dib-run-parts --- PROFILING ---",
    ]
    sentence = dib.failure(1, "install.d/01-package-installs", tail, Path("/logs/a.log"))
    assert sentence == (
        "diskimage-builder failed with status 1 in install.d/01-package-installs: "
        "E: Unable to locate package no-such-package; log: /logs/a.log"
    )


def test_a_log_without_a_word_of_failure_gives_its_last_lines():
    assert dib.telling(["one", "two", "three", "four"]) == ["two", "three", "four"]


def test_a_silent_failure_says_so():
    assert "it said nothing" in dib.failure(-9, "", [], Path("a.log"))

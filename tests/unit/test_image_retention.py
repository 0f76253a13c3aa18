"""What builds leave behind is recognised by its name, and nothing else is touched."""

import os

from nodepool.image import retention

OLD, NEW = "a" * 32, "b" * 32


def test_files_and_folders_of_unknown_builds_are_leftovers(tmp_path):
    (tmp_path / f"debian-12-{OLD}.raw").touch()
    (tmp_path / f"debian-12-{OLD}.raw.zst").touch()
    (tmp_path / f".debian-12-{OLD}.building").mkdir()
    assert {path.name for path in retention.leftovers(tmp_path, ())} == {
        f"debian-12-{OLD}.raw",
        f"debian-12-{OLD}.raw.zst",
        f".debian-12-{OLD}.building",
    }


def test_known_builds_are_no_leftovers(tmp_path):
    (tmp_path / f"debian-12-{OLD}.raw").touch()
    (tmp_path / f".debian-12-{NEW}.building").mkdir()
    assert retention.leftovers(tmp_path, {OLD, NEW}) == ()


def test_files_of_somebody_else_are_no_leftovers(tmp_path):
    for name in ("debian-12.raw", "notes.txt", f"{OLD}.raw", f"debian-{OLD}.qcow2", ".cache"):
        (tmp_path / name).touch()
    assert retention.leftovers(tmp_path, ()) == ()


def test_no_folder_means_no_leftovers(tmp_path):
    assert retention.leftovers(tmp_path / "missing", ()) == ()


def test_leftovers_are_removed_with_what_is_in_them(tmp_path):
    folder = tmp_path / f".debian-12-{OLD}.building"
    (folder / "tree/etc").mkdir(parents=True)
    (tmp_path / f"debian-12-{OLD}.raw").touch()
    retention.remove(retention.leftovers(tmp_path, ()))
    assert list(tmp_path.iterdir()) == []


def test_mounts_below_a_folder_are_found_with_their_odd_names(tmp_path):
    table = tmp_path / "mountinfo"
    table.write_text(
        f"1 0 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {tmp_path}/a\\040b rw - tmpfs tmpfs rw\n"
        f"3 2 0:3 / {tmp_path}/a\\040b/proc rw - proc none rw\n4 1 0:4 / {tmp_path}-other rw - tmpfs tmpfs rw\n"
    )
    assert retention.mounts_below(tmp_path, table) == [f"{tmp_path}/a b", f"{tmp_path}/a b/proc"]


def test_only_the_newest_logs_of_an_image_are_kept(tmp_path):
    for number in range(4):
        path = tmp_path / f"debian-12-{number:032x}.log"
        path.touch()
        os.utime(path, (1000 + number, 1000 + number))
    (tmp_path / f"debian-{OLD}.log").touch()
    gone = retention.prune_logs(tmp_path, "debian-12", 2)
    assert sorted(path.name[-5] for path in gone) == ["0", "1"]


def test_all_logs_are_kept_on_request(tmp_path):
    (tmp_path / f"debian-12-{OLD}.log").touch()
    assert retention.prune_logs(tmp_path, "debian-12", -1) == ()

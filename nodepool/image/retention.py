"""What builds leave on the disk: its names, what a killed build left behind, and how many logs are kept.

    IMAGE-BUILD.raw, IMAGE-BUILD.raw.zst    a finished image           .IMAGE-BUILD.building/    one being made
    logs/IMAGE-BUILD.log                    its log                    .cache/                   downloaded packages

BUILD is the build's id, 32 hex digits.  A name says everything: nothing else has to be remembered to clean up.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path

SUFFIXES = (".raw", ".raw.zst")
_FINISHED = re.compile(r"^(?P<image>[^.].*)-(?P<build>[0-9a-f]{32})\.raw(\.zst)?$")
_BUILDING = re.compile(r"^\.(?P<image>.+)-(?P<build>[0-9a-f]{32})\.building$")
_LOG = re.compile(r"^(?P<image>.+)-(?P<build>[0-9a-f]{32})\.log$")


def scratch_of(images_dir: Path, image: str, build_id: str) -> Path:
    """The folder in which a build is made; it is on the file system of the finished files, so they can be renamed."""
    return images_dir / f".{image}-{build_id}.building"


def file_of(images_dir: Path, image: str, build_id: str, form: str) -> Path:
    """The finished file of a build in one format (`raw`, `raw.zst`)."""
    return images_dir / f"{image}-{build_id}.{form}"


def log_of(log_dir: Path, image: str, build_id: str) -> Path:
    """The log of a build."""
    return log_dir / f"{image}-{build_id}.log"


def leftovers(images_dir: Path, known_ids: Collection[str]) -> tuple[Path, ...]:
    """Files and folders of builds that nobody knows: of killed ones, and of ones removed while a daemon was down.

    `known_ids` are the ids of all builds that are being made or kept.  Files that no build has named are not ours.
    """
    if not images_dir.is_dir():
        return ()
    found = []
    for path in sorted(images_dir.iterdir()):
        match = _FINISHED.match(path.name) or _BUILDING.match(path.name)
        if match and match["build"] not in known_ids:
            found.append(path)
    return tuple(found)


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders of builds, unmounting first what a killed build has left mounted in them."""
    for path in paths:
        if path.is_dir():
            clear_scratch(path)
        else:
            path.unlink(missing_ok=True)


def clear_scratch(folder: Path) -> None:
    """Remove a build's folder, after what is mounted in it (innermost first, or its contents would go too)."""
    loops = _loops_of(folder)
    for mount_point in reversed(mounts_below(folder)):
        subprocess.run(["umount", "--lazy", mount_point], check=False, capture_output=True, timeout=30)
    if still := mounts_below(folder):
        raise OSError(f"{still[0]} is still mounted: end what uses it, and `umount {still[0]}`")
    for device in loops:
        subprocess.run(["losetup", "--detach", device], check=False, capture_output=True, timeout=30)
    shutil.rmtree(folder)


def _loops_of(folder: Path) -> list[str]:
    """Loop devices over files below `folder`."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if backing.read_text().startswith(f"{folder.resolve()}/"):
                found.append(f"/dev/{backing.parent.parent.name}")
    return found


def mounts_below(folder: Path, table: Path = Path("/proc/self/mountinfo")) -> list[str]:
    """Mount points at or below `folder`, outer ones first (proc(5): field 5, spaces as octal escapes)."""
    top = str(folder.resolve())
    points = (line.split()[4] for line in table.read_text().splitlines())
    plain = (re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point) for point in points)
    return [point for point in plain if point == top or point.startswith(top + "/")]


def prune_logs(log_dir: Path, image: str, keep: int) -> tuple[Path, ...]:
    """Remove all but the `keep` newest logs of an image (-1: keep all) and give those that went."""
    if keep < 0 or not log_dir.is_dir():
        return ()
    logs = [path for path in log_dir.iterdir() if (match := _LOG.match(path.name)) and match["image"] == image]
    old = sorted(logs, key=lambda path: path.stat().st_mtime_ns, reverse=True)[keep:]
    for path in old:
        path.unlink(missing_ok=True)
    return tuple(old)

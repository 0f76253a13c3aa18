"""Making an image: diskimage-builder, assembly, a look at the result, publication under its final name."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from nodepool.config.records import DiskImage
from nodepool.errors import Code, Permanent
from nodepool.image import assemble, dib, retention, verify
from nodepool.image.process import Work, bounded, execute
from nodepool.image.tools import find_tool, sentence_of_missing

log = logging.getLogger("nodepool.image")

Progress = Callable[[str, float | None], None]

# The share of a build's time at which each later phase begins (55 s in all: 45 diskimage-builder, 10 the rest).
_SHARES = {"unpack": 0.84, "file system": 0.88, "boot loader": 0.91, "testing": 0.92, "compress": 0.95, "publish": 0.99}


@dataclass(frozen=True, slots=True)
class ImagePaths:
    """Where images and their logs are kept, the user's own elements, and how many logs stay (-1: all)."""

    images_dir: Path
    log_dir: Path
    elements_dir: Path | None = None
    keep_logs: int = 7


@dataclass(frozen=True, slots=True)
class ImageResult:
    """A finished image: a file for each format; bytes and sha256 (hex, holes as zeros) of the raw disk."""

    files: Mapping[str, Path]
    size: int
    sha256: str
    seconds: float
    log: Path


def make_image(image: DiskImage, build_id: str, paths: ImagePaths, progress: Progress, cancelled: Event) -> ImageResult:
    """Build `image` under `build_id` (32 hex digits) and give what was made; blocks for minutes.

    `progress(phase, share)` hears of diskimage-builder's phases (`root.d`, ...) and of `unpack`, `file system`, `boot
    loader`, `testing`, `compress`, `publish`; the share is of the whole build, 0 to 1, an estimate.  Files appear under
    their final names only when everything was good; otherwise nothing but the log is left.  Raises `Permanent`:
    image-build (also when `build-timeout` is over), image-unreadable, or cancelled when `cancelled` was set.
    """
    started = time.monotonic()
    log_file = retention.log_of(paths.log_dir, image.name, build_id)
    scratch = retention.scratch_of(paths.images_dir.absolute(), image.name, build_id)  # commands may change folders
    try:
        paths.log_dir.mkdir(parents=True, exist_ok=True)
        paths.images_dir.mkdir(parents=True, exist_ok=True)
        if scratch.exists():
            retention.clear_scratch(scratch)
        scratch.mkdir()
    except OSError as err:
        raise Permanent(f"cannot build in {paths.images_dir}: {err}", Code.IMAGE_BUILD) from err
    work = bounded(log_file, image.build_timeout, cancelled)
    try:
        raw = _make_raw(work, image, scratch, paths, progress)
        progress("testing", _SHARES["testing"])
        verify.verify(work, raw, ours=image.assembly != "dib")
        size, sha256 = raw.stat().st_size, verify.digest(work, raw)
        made = _formats(work, image, raw, progress)
        work.check()
        progress("publish", _SHARES["publish"])
        files = _publish(image, build_id, paths.images_dir, made)
    except OSError as err:  # most often: no space left on device
        raise Permanent(f"the build failed: {err}; log: {log_file}", Code.IMAGE_BUILD) from err
    finally:
        _clear(scratch)
        retention.prune_logs(paths.log_dir, image.name, paths.keep_logs)
    return ImageResult(files, size, sha256, time.monotonic() - started, log_file)


def _make_raw(work: Work, image: DiskImage, scratch: Path, paths: ImagePaths, progress: Progress) -> Path:
    theirs = _SHARES["testing" if image.assembly == "dib" else "unpack"]

    def of_whole(phase: str, share: float | None) -> None:
        progress(phase, None if share is None else share * theirs)

    if image.assembly == "dib":
        return dib.build_root(work, image, scratch / "disk", paths.elements_dir, of_whole)
    if lacks := assemble.missing_tools(image.formats):
        raise Permanent(sentence_of_missing(lacks), Code.IMAGE_BUILD)
    tar = dib.build_root(work, image, scratch / "root", paths.elements_dir, of_whole)
    raw = scratch / "disk.raw"
    assemble.assemble(work, tar, raw, lambda step: progress(step, _SHARES[step]))
    return raw


def _formats(work: Work, image: DiskImage, raw: Path, progress: Progress) -> dict[str, Path]:
    """The raw disk in each format that is wanted."""
    made = {"raw": raw} if "raw" in image.formats else {}
    if "raw.zst" in image.formats:
        progress("compress", _SHARES["compress"])
        zstd = find_tool("zstd")
        if not zstd:
            raise Permanent(sentence_of_missing({"zstd": "zstd"}), Code.IMAGE_BUILD)
        packed = raw.with_name(raw.name + ".zst")
        if execute(work, (zstd, "-q", "-T0", "-3", "-o", str(packed), str(raw))):
            raise Permanent(f"zstd could not compress the image; log: {work.log}", Code.IMAGE_BUILD)
        made["raw.zst"] = packed
    return made


def _publish(image: DiskImage, build_id: str, images_dir: Path, made: Mapping[str, Path]) -> dict[str, Path]:
    """Give the files their names, on the disk for good before anybody is told of them."""
    files = {}
    for form, path in made.items():
        _sync(path)
        files[form] = path.rename(retention.file_of(images_dir, image.name, build_id, form))
    _sync(images_dir)
    return files


def _clear(scratch: Path) -> None:
    """What cannot be cleared now is found again as a leftover; it does not decide over the build."""
    try:
        retention.clear_scratch(scratch)
    except (OSError, subprocess.SubprocessError) as err:
        log.warning("%s could not be cleared: %s", scratch, err)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

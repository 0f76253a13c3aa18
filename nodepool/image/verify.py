"""Looking at a finished disk image before anything is made from it (the build's state `testing`).

Nothing is mounted and no loop device taken: the partition table is read here, file systems by e2fsprogs at an offset.
Formats: UEFI specification 2.10, section 5 (GPT); the MBR's 4 entries of 16 bytes at 446; ext4's superblock at 1024.
"""

from __future__ import annotations

import hashlib
import os
import struct
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

from nodepool.errors import Code, Permanent
from nodepool.image.process import Work, execute
from nodepool.image.tools import find_tool

SECTOR = 512
_CHUNK = 8 << 20
BIOS_BOOT = uuid.UUID("21686148-6449-6E6F-744E-656564454649")
EFI_SYSTEM = uuid.UUID("C12A7328-F81F-11D2-BA4B-00A0C93EC93B")

# What a system must have to be reached: one path of each line must exist.
CONTENTS = {
    "an init": ("/sbin/init", "/usr/sbin/init", "/usr/lib/systemd/systemd"),
    "an SSH server": ("/usr/sbin/sshd",),
    "a kernel": ("/vmlinuz", "/boot/vmlinuz"),
    "an initial ramdisk": ("/initrd.img", "/boot/initrd.img"),
    "a boot menu": ("/boot/grub/grub.cfg",),
}


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition: first byte, bytes, and its type's GUID (None with an MBR)."""

    start: int
    size: int
    kind: uuid.UUID | None = None


class Unreadable(ValueError):
    """There is no partition table that can be trusted; the message says why."""


def verify(work: Work, raw: Path, *, ours: bool) -> None:
    """Raise `Permanent` (image-unreadable) unless the disk image can be booted as far as can be seen from outside.

    Its table must be sound and its ext file systems clean; one that was assembled here (`ours`) must also have both
    boot partitions and, in its last partition, a system that can be logged in to.
    """
    try:
        partitions = read_table(raw)
    except Unreadable as err:
        raise Permanent(f"the image cannot be used: {err}", Code.IMAGE_UNREADABLE) from err
    for partition in partitions:
        if _is_ext(raw, partition):
            _check_ext(work, raw, partition)
    if not ours:
        return
    kinds = {partition.kind for partition in partitions}
    if not {BIOS_BOOT, EFI_SYSTEM} <= kinds:
        raise Permanent("the image lacks its BIOS or its EFI boot partition", Code.IMAGE_UNREADABLE)
    root = partitions[-1]
    if not _is_ext(raw, root):
        raise Permanent("the image's last partition is not an ext4 file system", Code.IMAGE_UNREADABLE)
    _check_contents(work, raw, root)


def read_table(raw: Path) -> tuple[Partition, ...]:
    """The partitions of a disk image, by their start.  Raises `Unreadable`."""
    size = raw.stat().st_size
    with raw.open("rb") as disk:
        mbr = disk.read(SECTOR)
        header = disk.read(SECTOR)
        if len(mbr) < SECTOR or mbr[510:512] != b"\x55\xaa":
            raise Unreadable("it has no partition table (an image of a bare file system? add the element `vm`)")
        if header[:8] == b"EFI PART":
            start, count, width, checksum = _gpt_header(header)
            disk.seek(start)
            found = _gpt_entries(disk.read(count * width), width, checksum)
        else:
            entries = (struct.unpack_from("<4xB3xII", mbr, 446 + 16 * number) for number in range(4))
            found = [Partition(lba * SECTOR, sectors * SECTOR) for kind, lba, sectors in entries if kind and sectors]
    if not found:
        raise Unreadable("its partition table is empty")
    for partition in found:
        if partition.start + partition.size > size:
            raise Unreadable(f"a partition ends at byte {partition.start + partition.size}, the image at {size}")
    return tuple(sorted(found, key=lambda partition: partition.start))


def _gpt_header(header: bytes) -> tuple[int, int, int, int]:
    """(first byte, number, width, checksum) of the entries."""
    length, checksum = struct.unpack_from("<II", header, 12)
    if not 92 <= length <= SECTOR or zlib.crc32(header[:16] + bytes(4) + header[20:length]) != checksum:
        raise Unreadable("its partition table's header is damaged (checksum)")
    lba, count, width, entries_checksum = struct.unpack_from("<QIII", header, 72)
    if not (count <= 1024 and 128 <= width <= 4096):
        raise Unreadable(f"its partition table claims {count} entries of {width} bytes")
    return lba * SECTOR, count, width, entries_checksum


def _gpt_entries(entries: bytes, width: int, checksum: int) -> list[Partition]:
    if zlib.crc32(entries) != checksum:
        raise Unreadable("its partition table's entries are damaged (checksum)")
    found = []
    for offset in range(0, len(entries), width):
        kind = uuid.UUID(bytes_le=entries[offset : offset + 16])
        first, last = struct.unpack_from("<QQ", entries, offset + 32)
        if kind.int:
            found.append(Partition(first * SECTOR, (last - first + 1) * SECTOR, kind))
    return found


def _is_ext(raw: Path, partition: Partition) -> bool:
    with raw.open("rb") as disk:
        disk.seek(partition.start + 1024 + 56)
        return disk.read(2) == b"\x53\xef"


def _check_ext(work: Work, raw: Path, partition: Partition) -> None:
    said: list[str] = []
    status = execute(work, (_e2fs("e2fsck"), "-fn", f"{raw}?offset={partition.start}"), on_line=said.append)
    if status:
        last = "; ".join(line.strip() for line in said[-3:] if line.strip())
        raise Permanent(f"the image's file system is damaged: {last}; log: {work.log}", Code.IMAGE_UNREADABLE)


def _check_contents(work: Work, raw: Path, partition: Partition) -> None:
    said: list[str] = []
    script = work.log.with_suffix(".debugfs")
    paths = [path for choice in CONTENTS.values() for path in choice]
    script.write_text("".join(f"stat {path}\n" for path in paths))
    try:
        execute(work, (_e2fs("debugfs"), "-f", str(script), f"{raw}?offset={partition.start}"), on_line=said.append)
    finally:
        script.unlink()
    # debugfs echoes each command; what follows is an inode's description or "...: File not found by ext2_lookup".
    there: set[str] = set()
    path = ""
    for line in said:
        if line.startswith("debugfs: stat "):
            path = line.removeprefix("debugfs: stat ").strip()
        elif line.startswith("Inode:"):
            there.add(path)
    for what, choice in CONTENTS.items():
        if not there.intersection(choice):
            raise Permanent(f"the image has no {what.split(' ', 1)[1]} ({' or '.join(choice)})", Code.IMAGE_UNREADABLE)


def _e2fs(tool: str) -> str:
    found = find_tool(tool)
    if not found:
        raise Permanent(f"{tool} is missing to look at the image: apt-get install e2fsprogs", Code.IMAGE_BUILD)
    return found


def digest(work: Work, raw: Path) -> str:
    """The sha256 (hex) over the whole disk: holes count as the zeros that they read as."""
    total = hashlib.sha256()
    zeros = bytes(_CHUNK)
    with raw.open("rb", buffering=0) as disk:
        size = os.fstat(disk.fileno()).st_size
        at = 0
        while at < size:
            work.check()
            data = _next_data(disk.fileno(), at, size)
            while at < data:  # a hole need not be read to know what it holds
                count = min(_CHUNK, data - at)
                total.update(memoryview(zeros)[:count])
                at += count
            chunk = os.pread(disk.fileno(), min(_CHUNK, size - at), at)
            total.update(chunk)
            at += len(chunk)
    return total.hexdigest()


def _next_data(descriptor: int, at: int, size: int) -> int:
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError:  # ENXIO: nothing but a hole up to the end
        return size

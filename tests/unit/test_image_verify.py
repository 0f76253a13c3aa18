"""A disk image is looked at before it is used: its partition table, and the sum over what a disk would read."""

import hashlib
import struct
import uuid
import zlib
from threading import Event

import pytest

from nodepool.image import assemble, verify
from nodepool.image.process import bounded

MIB = 1 << 20


def gpt(path, entries, size=8 * MIB):
    """A disk of `size` bytes with GPT `entries` of (type, first sector, last sector)."""
    table = b"".join(
        kind.bytes_le + uuid.uuid4().bytes_le + struct.pack("<QQ", *span) + bytes(80) for kind, *span in entries
    )
    table += bytes(128 * 128 - len(table))
    header = bytearray(
        b"EFI PART" + struct.pack("<IIIIQQQQ", 0x10000, 92, 0, 0, 1, size // 512 - 1, 34, size // 512 - 34)
    )
    header += uuid.uuid4().bytes_le + struct.pack("<QIII", 2, 128, 128, zlib.crc32(table))
    struct.pack_into("<I", header, 16, zlib.crc32(bytes(header)))
    with path.open("wb") as out:
        out.truncate(size)
        out.seek(510)
        out.write(b"\x55\xaa" + bytes(header))
        out.seek(1024)
        out.write(table)
    return path


def test_partitions_of_a_gpt_are_read_in_their_order(tmp_path):
    disk = gpt(tmp_path / "d", [(verify.EFI_SYSTEM, 4096, 8191), (verify.BIOS_BOOT, 2048, 4095)])
    assert verify.read_table(disk) == (
        verify.Partition(MIB, MIB, verify.BIOS_BOOT),
        verify.Partition(2 * MIB, 2 * MIB, verify.EFI_SYSTEM),
    )


@pytest.mark.parametrize(("offset", "what"), [(512 + 40, "header"), (1024 + 33, "entries")])
def test_an_altered_byte_in_the_table_is_seen(tmp_path, offset, what):
    disk = gpt(tmp_path / "d", [(verify.EFI_SYSTEM, 4096, 8191)])
    with disk.open("r+b") as out:
        out.seek(offset)
        out.write(b"\x77")
    with pytest.raises(verify.Unreadable, match=what):
        verify.read_table(disk)


def test_a_disk_that_was_cut_short_is_seen(tmp_path):
    disk = gpt(tmp_path / "d", [(verify.EFI_SYSTEM, 4096, 8191)])
    with disk.open("r+b") as out:
        out.truncate(3 * MIB)
    with pytest.raises(verify.Unreadable, match="ends at byte"):
        verify.read_table(disk)


def test_a_bare_file_system_is_no_disk(tmp_path):
    (tmp_path / "d").write_bytes(bytes(4096))
    with pytest.raises(verify.Unreadable, match="no partition table"):
        verify.read_table(tmp_path / "d")


def test_an_empty_file_is_no_disk(tmp_path):
    (tmp_path / "d").touch()
    with pytest.raises(verify.Unreadable, match="no partition table"):
        verify.read_table(tmp_path / "d")


def test_partitions_of_an_mbr_are_read(tmp_path):
    sector = bytearray(512)
    struct.pack_into("<4xB3xII", sector, 446, 0x83, 2048, 2048)
    sector[510:] = b"\x55\xaa"
    with (tmp_path / "d").open("wb") as out:
        out.write(sector)
        out.truncate(4 * MIB)
    assert verify.read_table(tmp_path / "d") == (verify.Partition(MIB, MIB),)


@pytest.mark.parametrize(
    "layout", [[(0, b"a" * 5000)], [(3 * MIB, b"z" * 10)], [], [(MIB, b"x" * MIB), (9 * MIB - 7, b"end")]]
)
def test_holes_count_as_the_zeros_they_read_as(tmp_path, layout):
    disk = tmp_path / "d"
    with disk.open("wb") as out:
        out.truncate(9 * MIB + 13)
        for at, data in layout:
            out.seek(at)
            out.write(data)
    work = bounded(tmp_path / "log", 60, Event())
    assert verify.digest(work, disk) == hashlib.sha256(disk.read_bytes()).hexdigest()


def test_the_boot_sector_keeps_the_partition_table():
    sector = assemble.boot_sector(bytes(512), bytes(440) + bytes(range(72)))
    assert sector[440:] == bytes(range(72))


def test_the_boot_sector_points_at_the_boot_partition_and_trusts_the_bios_drive():
    sector = assemble.boot_sector(bytes(512), bytes(512))
    assert struct.unpack_from("<Q", sector, 0x5C)[0] == assemble.BIOS_START
    assert (sector[0x64], sector[0x66:0x68]) == (0xFF, b"\x90\x90")


def test_the_second_stage_knows_where_it_goes_on():
    assert struct.unpack_from("<Q", assemble.second_stage(bytes(2048)), 0x1F4)[0] == assemble.BIOS_START + 1


def tree(root, *paths, links=()):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    for link, target in links:
        (root / link).symlink_to(target)
    return root


def test_debians_links_to_the_newest_kernel_are_followed(tmp_path):
    tree(
        tmp_path,
        "boot/vmlinuz-6.1.0-9-amd64",
        "boot/initrd.img-6.1.0-9-amd64",
        links=[("vmlinuz", "boot/vmlinuz-6.1.0-9-amd64"), ("initrd.img", "boot/initrd.img-6.1.0-9-amd64")],
    )
    found = assemble.find_system(tmp_path)
    assert (found.kernel, found.initrd) == ("/vmlinuz", "/initrd.img")


def test_without_links_the_newest_version_is_taken(tmp_path):
    tree(tmp_path, "boot/vmlinuz-6.1.0-9-amd64", "boot/vmlinuz-6.1.0-10-amd64")
    assert assemble.find_system(tmp_path).kernel == "/boot/vmlinuz-6.1.0-10-amd64"


def test_the_images_command_line_is_kept_but_for_its_root(tmp_path):
    tree(tmp_path, "boot/vmlinuz-6", "etc/kernel/cmdline")
    (tmp_path / "etc/kernel/cmdline").write_text("root=/dev/sda1 ro quiet console=ttyS1\n")
    assert assemble.find_system(tmp_path).cmdline == "quiet console=ttyS1"


def test_an_image_without_a_kernel_is_refused(tmp_path):
    with pytest.raises(Exception, match="no kernel"):
        assemble.find_system(tree(tmp_path, "etc/fstab"))

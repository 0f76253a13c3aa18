"""From a root file system in a tar to a disk image that boots by BIOS and by UEFI, without a single loop device.

    LBA 0      protective MBR with GRUB's boot.img       4096   EFI system partition, FAT16, BOOTX64.EFI
    2048       BIOS boot partition, GRUB's core.img      20480  root, ext4, last: so it can grow

Containers and small kernels have neither device-mapper nor partitions on loop devices; every step here writes plain
files.  Where GRUB's boot sector keeps the place of its second stage: grub-core/boot/i386/pc/{boot,diskboot}.S.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nodepool.errors import Code, Permanent
from nodepool.image.process import Work, execute
from nodepool.image.tools import find_tool, lacking, sentence_of_missing

SECTOR = 512
BIOS_START, ESP_START, ROOT_START = 2048, 4096, 20480  # sectors; all on whole MiB
END_SECTORS = 2048  # the second copy of the partition table and its alignment
MIB = 1 << 20
BLOCK = 4096

GRUB_DIR = Path("/usr/lib/grub")
_MODULES = (
    "part_gpt part_msdos ext2 normal linux search search_fs_uuid configfile serial terminal echo test boot minicmd"
)
_DEFAULT_CMDLINE = "quiet console=tty0 console=ttyS0,115200n8"

# What the assembly needs of this machine, and the Debian packages that have it.
_TOOLS = {
    "tar": "tar",
    "sfdisk": "fdisk",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mmd": "mtools",
    "mcopy": "mtools",
    "grub-mkimage": "grub-common",
}
_GRUB_FILES = {"i386-pc/boot.img": "grub-pc-bin", "x86_64-efi/kernel.img": "grub-efi-amd64-bin"}


@dataclass(frozen=True, slots=True)
class System:
    """What a root file system boots: absolute paths in it, and the kernel's command line less its root=."""

    kernel: str
    initrd: str  # empty when there is none
    cmdline: str


def missing_tools(formats: Sequence[str] = ()) -> dict[str, str]:
    """What this machine lacks for an assembly: tool or file -> the Debian package that has it."""
    tools = lacking(_TOOLS | ({"zstd": "zstd"} if "raw.zst" in formats else {}))
    files = {str(GRUB_DIR / name): package for name, package in _GRUB_FILES.items() if not (GRUB_DIR / name).exists()}
    return tools | files


def assemble(work: Work, tar: Path, raw: Path, step: Callable[[str], None]) -> None:
    """Make the disk image `raw` of the root file system in `tar`, using `tar`'s folder as scratch space.

    `step` is told what is being done.  Raises `Permanent` (image-build) naming the tool that failed, and the log.
    """
    if os.geteuid() != 0:
        raise Permanent("assembling an image keeps owners and devices: run the builder as root", Code.IMAGE_BUILD)
    scratch = tar.parent
    tree = scratch / "tree"
    tree.mkdir()
    step("unpack")
    _tool(work, "tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", str(tar), "-C", str(tree))
    tar.unlink()
    system = find_system(tree)
    root_uuid = str(uuid.uuid4())
    _settle(tree, system, root_uuid)
    step("file system")
    size_kib = _root_kib(tree)
    sectors = ROOT_START + size_kib * 2 + END_SECTORS
    with raw.open("wb") as out:
        out.truncate(sectors * SECTOR)
    _tool(
        work,
        *("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-L", "root", "-U", root_uuid, "-m", "0"),
        *("-E", f"offset={ROOT_START * SECTOR},lazy_itable_init=1,lazy_journal_init=1"),
        *("-d", str(tree), str(raw), f"{size_kib}k"),
    )
    shutil.rmtree(tree)
    step("boot loader")
    _partition(work, raw, scratch, size_kib)
    _boot_loaders(work, raw, scratch, root_uuid)


def find_system(tree: Path) -> System:
    """The kernel, initial ramdisk and command line of an unpacked root file system.

    Debian keeps links to the newest ones in `/`, Ubuntu in `/boot`; without links the newest version is taken.  The
    command line is `/etc/kernel/cmdline` (kernel-install(8)).  Raises `Permanent` when there is no kernel.
    """
    kernel = _newest(tree, "vmlinuz")
    if not kernel:
        raise Permanent("the image has no kernel: add an element that installs one", Code.IMAGE_BUILD)
    cmdline = tree / "etc/kernel/cmdline"
    words = cmdline.read_text().split() if cmdline.is_file() else _DEFAULT_CMDLINE.split()
    kept = " ".join(word for word in words if not word.startswith("root=") and word not in {"ro", "rw"})
    return System(kernel, _newest(tree, "initrd.img"), kept)


def _newest(tree: Path, name: str) -> str:
    for folder in ("", "boot"):
        link = tree / folder / name
        if link.is_symlink() and (link.parent / link.readlink()).exists():
            return "/" + str(link.relative_to(tree))
    versions = sorted((tree / "boot").glob(f"{name}-*"), key=_version)
    return f"/boot/{versions[-1].name}" if versions else ""


def _version(path: Path) -> list[tuple[int, str]]:
    """Orders `vmlinuz-6.1.9` before `vmlinuz-6.1.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.name.replace("-", ".").split(".")]


def _settle(tree: Path, system: System, root_uuid: str) -> None:
    """Tell the system where its root is: command line, GRUB's menu, fstab.

    The root is not checked at boot (fstab's last field): a node's disk lives as long as the node.
    """
    for mount_point in ("dev", "proc", "run", "sys", "tmp"):  # diskimage-builder leaves proc and sys out of its tar
        (tree / mount_point).mkdir(exist_ok=True)
    cmdline = f"root=UUID={root_uuid} ro {system.cmdline}".strip()
    (tree / "etc/kernel").mkdir(parents=True, exist_ok=True)
    (tree / "etc/kernel/cmdline").write_text(cmdline + "\n")
    fstab = tree / "etc/fstab"
    lines = fstab.read_text().splitlines() if fstab.is_file() else []
    others = [line for line in lines if line.lstrip().startswith("#") or line.split()[1:2] != ["/"]]
    own = f"UUID={root_uuid} / ext4 defaults,errors=remount-ro 0 0"
    fstab.write_text("\n".join([own, *others]) + "\n")
    menu = tree / "boot/grub/grub.cfg"
    menu.parent.mkdir(parents=True, exist_ok=True)
    if not menu.exists():
        initrd = f"initrd {system.initrd}\n" if system.initrd else ""
        menu.write_text(f"linux {system.kernel} {cmdline}\n{initrd}boot\n")


def _root_kib(tree: Path) -> int:
    """How large the root file system must be for what is in `tree`: content, its bookkeeping, and some room."""
    size = inodes = 0
    seen: set[int] = set()
    for folder, _, files in os.walk(tree):
        for path in (folder, *(os.path.join(folder, name) for name in files)):  # noqa: PTH118 - Path is 5 times slower
            stat = os.lstat(path)
            if stat.st_ino not in seen:
                seen.add(stat.st_ino)
                inodes += 1
                size += math.ceil(stat.st_size / BLOCK) * BLOCK
    # The journal takes 16 to 64 MiB, tables 256 bytes an inode; a tenth and 64 MiB let the system boot ungrown.
    return math.ceil((size * 1.1 + inodes * 512 + 64 * MIB + 64 * MIB) / MIB) * 1024


def _partition(work: Work, raw: Path, scratch: Path, size_kib: int) -> None:
    script = scratch / "table"
    script.write_text(
        "label: gpt\nfirst-lba: 2048\n"
        f"start={BIOS_START}, size={ESP_START - BIOS_START}, type=21686148-6449-6E6F-744E-656564454649, name=bios\n"
        f"start={ESP_START}, size={ROOT_START - ESP_START}, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name=efi\n"
        f"start={ROOT_START}, size={size_kib * 2}, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name=root\n"
    )
    _tool(work, "sh", "-c", 'exec "$0" -q --no-reread --no-tell-kernel "$1" < "$2"', _path("sfdisk"), raw, script)


def _boot_loaders(work: Work, raw: Path, scratch: Path, root_uuid: str) -> None:
    early = scratch / "early.cfg"
    early.write_text(
        f"search --no-floppy --fs-uuid --set=root {root_uuid}\n"
        "set prefix=($root)/boot/grub\n"
        "configfile $prefix/grub.cfg\n"
    )
    core, efi, esp = scratch / "core.img", scratch / "BOOTX64.EFI", scratch / "esp.img"
    make = ("grub-mkimage", "-p", "/boot/grub", "-c", str(early))
    _tool(work, *make, "-O", "i386-pc", "-o", str(core), "biosdisk", *_MODULES.split())
    _tool(work, *make, "-O", "x86_64-efi", "-o", str(efi), *_MODULES.split())
    with esp.open("wb") as out:
        out.truncate((ROOT_START - ESP_START) * SECTOR)
    _tool(work, "mkfs.vfat", "-F", "16", "-s", "1", "-n", "EFI", str(esp))
    _tool(work, "mmd", "-i", str(esp), "::/EFI", "::/EFI/BOOT")
    _tool(work, "mcopy", "-i", str(esp), str(efi), "::/EFI/BOOT/BOOTX64.EFI")
    boot = (GRUB_DIR / "i386-pc/boot.img").read_bytes()
    with raw.open("r+b") as out:
        out.seek(0)
        mbr = boot_sector(boot, out.read(SECTOR))
        out.seek(0)
        out.write(mbr)
        out.seek(BIOS_START * SECTOR)
        out.write(second_stage(core.read_bytes()))
        out.seek(ESP_START * SECTOR)
        out.write(esp.read_bytes())


def boot_sector(boot: bytes, mbr: bytes) -> bytes:
    """GRUB's `boot.img` pointed at the BIOS boot partition, with the partition table of `mbr` (each 512 bytes)."""
    code = bytearray(boot[:440])
    struct.pack_into("<Q", code, 0x5C, BIOS_START)  # where the second stage is
    code[0x64] = 0xFF  # on the drive that the BIOS booted
    code[0x66:0x68] = b"\x90\x90"  # two no-ops instead of the jump that keeps that drive's number from being used
    return bytes(code) + mbr[440:SECTOR]


def second_stage(core: bytes) -> bytes:
    """GRUB's `core.img` whose first sector is told where the rest of it is: the sector after."""
    stage = bytearray(core)
    if len(stage) > (ESP_START - BIOS_START) * SECTOR:
        raise Permanent("GRUB's core image does not fit into its partition of 1 MiB", Code.IMAGE_BUILD)
    struct.pack_into("<Q", stage, 0x1F4, BIOS_START + 1)
    return bytes(stage)


def _path(tool: str) -> str:
    found = find_tool(tool)
    if not found:
        raise Permanent(sentence_of_missing({tool: _TOOLS.get(tool, tool)}), Code.IMAGE_BUILD)
    return found


def _tool(work: Work, tool: str, *arguments: str | Path) -> None:
    """Run a tool; `Permanent` with its last words when it fails."""
    said: list[str] = []
    status = execute(work, (_path(tool), *map(str, arguments)), on_line=said.append)
    if status:
        last = "; ".join(line.strip() for line in said[-3:] if line.strip()) or "it said nothing"
        raise Permanent(f"{tool} failed with status {status}: {last}; log: {work.log}", Code.IMAGE_BUILD)

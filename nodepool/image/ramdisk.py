"""Build what a machine boots over the network to be worked on: the agent's kernel and its ramdisk.

The kernel is a distribution's package, unpacked and not installed, so that it has the drivers of real servers and gets
its security updates from the distribution.  The ramdisk holds busybox, the few real tools that the agent calls with
the libraries they need (taken from the running system), the kernel modules of disks, network cards and file systems,
and the two programs `agent/init.sh` and `agent/agent.sh`.  Nothing here needs root.

The same inputs give the same bytes: entries are sorted, times are zero, owners are root; and what was built is named
by a hash over its inputs in `manifest.json`, so that a second call with the same inputs builds nothing.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nodepool.errors import NodepoolError

RECIPE = "1"  # raise it when this module would make something else of the same inputs
DEFAULT_KERNEL_PACKAGE = "linux-image-amd64"
AGENT_DIR = Path(__file__).resolve().parent.parent / "agent"
AGENT_PROGRAMS = {"init.sh": "init", "agent.sh": "usr/bin/nodepool-agent", "dhcp.sh": "usr/bin/nodepool-dhcp"}

# The real tools that the agent calls, and the Debian package that has each.
TOOLS = {
    "blkdiscard": "util-linux",
    "blockdev": "util-linux",
    "curl": "curl",
    "dd": "coreutils",
    "e2fsck": "e2fsprogs",
    "kmod": "kmod",
    "mke2fs": "e2fsprogs",
    "openssl": "openssl",
    "resize2fs": "e2fsprogs",
    "sfdisk": "fdisk",
    "sha256sum": "coreutils",
    "ssh-keygen": "openssh-client",
    "zstd": "zstd",
}
OPTIONAL_TOOLS = {"efibootmgr": "efibootmgr", "kexec": "kexec-tools"}
BUILD_TOOLS = {"apt-cache": "apt", "apt-get": "apt", "depmod": "kmod", "dpkg-deb": "dpkg", "ldd": "libc-bin"}

# What servers have: disks, network cards and the file systems of images.  Patterns of paths below `kernel/`; what the
# chosen kernel does not have is left out, what the chosen modules need is added.
MODULES = (
    "arch/x86/crypto/crc32c-intel.ko",  # file systems and disks ask for checksums by name: no dependency says so
    "crypto/blake2b_generic.ko",
    "crypto/crc32c_generic.ko",
    "crypto/crct10dif*.ko",
    "crypto/sha256_generic.ko",
    "crypto/xxhash_generic.ko",
    "drivers/ata/*",
    "drivers/block/virtio_blk.ko",
    "drivers/char/hw_random/virtio-rng.ko",
    "drivers/char/ipmi/*",
    "drivers/message/fusion/mpt*",
    "drivers/mmc/*",
    "drivers/net/ethernet/amazon/*",
    "drivers/net/ethernet/amd/*",
    "drivers/net/ethernet/aquantia/*",
    "drivers/net/ethernet/atheros/*",
    "drivers/net/ethernet/broadcom/*",
    "drivers/net/ethernet/chelsio/cxgb4/*",
    "drivers/net/ethernet/cisco/*",
    "drivers/net/ethernet/emulex/*",
    "drivers/net/ethernet/intel/*",
    "drivers/net/ethernet/marvell/sk*",
    "drivers/net/ethernet/mellanox/mlx4/*",
    "drivers/net/ethernet/mellanox/mlx5/*",
    "drivers/net/ethernet/qlogic/*",
    "drivers/net/ethernet/realtek/*",
    "drivers/net/virtio_net.ko",
    "drivers/nvme/host/*",
    "drivers/scsi/*",
    "drivers/usb/host/*",
    "drivers/usb/storage/*",
    "drivers/virtio/*",
    "fs/btrfs/*",
    "fs/efivarfs/*",
    "fs/ext4/*",
    "fs/fat/*",
    "fs/nls/*",
    "fs/xfs/*",
)
# Of those, what no rack server boots or keeps its disks by: PCMCIA, tape, test drivers, Fibre Channel targets.
NOT_MODULES = ("*/pcmcia/*", "*/scsi_debug.ko", "*/st.ko", "*/mmc_test.ko", "*/pata_pcmcia.ko", "*/pata_*", "*/tcm_*")


@dataclass(frozen=True, slots=True)
class AgentFiles:
    """What `build_ramdisk` leaves in its target: kernel, ramdisk, and the manifest that says what they were made of."""

    kernel: Path
    initrd: Path
    manifest: Path


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the ramdisk: `mode` with the file type's bits; `data` is content or a link's target."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class KernelPackage:
    """A package as the package manager offers it."""

    name: str
    file: str
    sha256: str


class RamdiskError(NodepoolError):
    """The ramdisk cannot be built here; the message says what is missing and how to get it."""


def build_ramdisk(
    target: Path, progress: Callable[[str], None], kernel_package: str = DEFAULT_KERNEL_PACKAGE
) -> AgentFiles:
    """Make `vmlinuz`, `initrd.img` and `manifest.json` in `target`, or leave them when nothing has changed.

    `progress` is called with one sentence per step.  `kernel_package` is a package or meta package of the
    distribution; its file stays in `target`/cache for the next build.  Raises `RamdiskError`.
    """
    tools = find_tools()
    packages = kernel_packages(kernel_package)
    inputs = inputs_hash(tools, packages)
    files = AgentFiles(target / "vmlinuz", target / "initrd.img", target / "manifest.json")
    if is_current(files, inputs):
        progress(f"The agent in {target} is up to date")
        return files
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ramdisk-", dir=target) as scratch:
        tree = Path(scratch) / "kernel"
        for package in packages:
            unpack(package, target / "cache", tree, progress)
        image, version = find_kernel(tree)
        progress(f"Choosing modules of Linux {version}")
        modules = collect_modules(tree, version, Path(scratch) / "modules")
        progress(f"Packing the ramdisk: {len(tools)} tools, {sum(p.endswith('.ko') for p in modules)} modules")
        entries = {**skeleton(), **collect_tools(tools), **modules, **collect_agent()}
        archive = Path(scratch) / "initrd.cpio"
        archive.write_bytes(cpio(entries))
        packed = Path(scratch) / "initrd.img"
        run(["zstd", "-q", "-12", "-T0", "-o", str(packed), str(archive)])
        described = {"inputs": inputs, "kernel": version, "packages": [p.file for p in packages]}
        install(files, image, packed, described)
    size = (files.kernel.stat().st_size + files.initrd.stat().st_size) / 1e6
    progress(f"Built the agent in {target}: Linux {version}, {size:.0f} MB to load")
    return files


def find_tools() -> dict[str, Path]:
    """Where the tools are on this system, busybox included; raises when one is missing, naming every package."""
    wanted = {**TOOLS, **OPTIONAL_TOOLS, **BUILD_TOOLS}
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin"
    found = {name: which for name in ("busybox", *wanted) if (which := shutil.which(name, path=path))}
    missing = {wanted[name] for name in wanted if name not in found and name not in OPTIONAL_TOOLS}
    if "busybox" not in found or not is_static(Path(found["busybox"])):
        missing.add("busybox-static")
    if missing:
        raise RamdiskError(f"The agent's ramdisk needs more tools; run: apt-get install {' '.join(sorted(missing))}")
    return {name: Path(found[name]) for name in sorted(found) if name not in BUILD_TOOLS}


def is_static(program: Path) -> bool:
    """Whether `program` runs without shared libraries."""
    return subprocess.run(["ldd", str(program)], capture_output=True, check=False).returncode != 0


def kernel_packages(name: str) -> list[KernelPackage]:
    """The packages that hold the kernel behind `name`, a meta package followed down to the real ones."""
    names: list[str] = []
    waiting = [name]
    while waiting:
        package = waiting.pop(0)
        depends = run(["apt-cache", "depends", "--no-suggests", "--no-recommends", package], f"find package {package}")
        found = re.findall(r"^\s*Depends: (linux-(?:image|modules)[-\w.+]*)", depends, re.MULTILINE)
        waiting += [other for other in found if other not in names and other not in waiting]
        names.append(package)
    listed = run(["apt-get", "download", "--print-uris", *names], f"find package {name}")
    rows = re.findall(r"^'[^']+' (\S+) \d+ SHA256:([0-9a-f]{64})$", listed, re.MULTILINE)
    real = [KernelPackage(file.split("_")[0], file, digest) for file, digest in rows]
    return [package for package in real if re.search(r"-\d", package.name)]


def inputs_hash(tools: Mapping[str, Path], packages: Iterable[KernelPackage]) -> str:
    """A name for everything that the result is made of (libraries change with the tools' packages)."""
    digest = hashlib.sha256(f"{RECIPE} {MODULES} {NOT_MODULES}".encode())
    for package in packages:
        digest.update(package.sha256.encode())
    for path in [*tools.values(), *libraries(tools.values()), *(AGENT_DIR / name for name in AGENT_PROGRAMS)]:
        digest.update(f"{path} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def is_current(files: AgentFiles, inputs: str) -> bool:
    """Whether `files` are whole and were made of `inputs`."""
    try:
        manifest = json.loads(files.manifest.read_text())
        wanted = manifest["files"]
        return manifest["inputs"] == inputs and all(
            file_hash(path) == wanted[path.name]["sha256"] for path in (files.kernel, files.initrd)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def unpack(package: KernelPackage, cache: Path, tree: Path, progress: Callable[[str], None]) -> None:
    """Unpack the package into `tree`; it is fetched unless `cache` has it with the right content."""
    cache.mkdir(exist_ok=True)
    deb = cache / package.file
    if not deb.exists() or file_hash(deb) != package.sha256:
        progress(f"Fetching {package.name}")
        for old in cache.glob(f"{package.name}_*.deb"):
            old.unlink()
        run(["apt-get", "-q", "download", package.name], f"fetch package {package.name}", cwd=cache)
        if not deb.exists() or file_hash(deb) != package.sha256:
            raise RamdiskError(f"Package {package.file} came with other content than listed; run: apt-get update")
    progress(f"Unpacking {package.name}")
    run(["dpkg-deb", "-x", str(deb), str(tree)])


def find_kernel(tree: Path) -> tuple[Path, str]:
    """The kernel's image in an unpacked package and its version."""
    images = sorted(tree.glob("boot/vmlinuz-*"))
    if len(images) != 1:
        raise RamdiskError(f"The kernel package holds {len(images)} kernels instead of one; name another package")
    return images[0], images[0].name.removeprefix("vmlinuz-")


def collect_modules(tree: Path, version: str, staging: Path) -> dict[str, Entry]:
    """The chosen modules, what they depend on, and the indexes that modprobe needs."""
    modules = next((d for d in (tree / "lib/modules", tree / "usr/lib/modules") if d.is_dir()), None)
    if modules is None:
        raise RamdiskError(f"The kernel package of Linux {version} holds no modules; name another kernel package")
    base = modules.parent.parent
    run(["depmod", "-b", str(base), version])
    needs = read_dependencies(modules / version / "modules.dep")
    goal = staging / "lib/modules" / version
    for relative in sorted(choose_modules(needs)):
        (goal / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(modules / version / relative, goal / relative)
    for index in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copyfile(modules / version / index, goal / index)
    run(["depmod", "-b", str(staging), version])
    files = sorted(path for path in goal.rglob("*") if path.is_file() and not path.name.endswith(".modinfo"))
    return {f"usr/{path.relative_to(staging)}": Entry(stat.S_IFREG | 0o644, path.read_bytes()) for path in files}


def read_dependencies(listing: Path) -> dict[str, list[str]]:
    """Each module's path with the paths of the modules it needs (modules.dep(5))."""
    lines = (line.partition(":") for line in listing.read_text().splitlines())
    return {module: needed.split() for module, _, needed in lines}


def choose_modules(needs: Mapping[str, list[str]]) -> set[str]:
    """The modules that `MODULES` names and all that they need."""
    chosen: set[str] = set()
    for module in needs:
        plain = re.sub(r"\.(xz|zst|gz)$", "", module.removeprefix("kernel/"))
        wanted = any(fnmatch.fnmatch(plain, pattern) for pattern in MODULES)
        if wanted and not any(fnmatch.fnmatch(plain, pattern) for pattern in NOT_MODULES):
            chosen.update((module, *needs[module]))
    return chosen


def skeleton() -> dict[str, Entry]:
    """The directories, links and the two devices that must be there before anything is mounted."""
    links = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}
    folders = ("dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "usr", "usr/bin", "usr/sbin", "usr/lib64")
    passwd = b"root:x:0:0:root:/root:/bin/sh\n"  # ssh-keygen asks who it is
    return {
        **{name: Entry(stat.S_IFLNK | 0o777, target.encode()) for name, target in links.items()},
        **{name: Entry(stat.S_IFDIR | 0o755) for name in folders},
        "dev/console": Entry(stat.S_IFCHR | 0o600, device=(5, 1)),
        "dev/null": Entry(stat.S_IFCHR | 0o666, device=(1, 3)),
        "etc/passwd": Entry(stat.S_IFREG | 0o644, passwd),
        "etc/group": Entry(stat.S_IFREG | 0o644, b"root:x:0:\n"),
        "etc/mtab": Entry(stat.S_IFLNK | 0o777, b"/proc/self/mounts"),
    }


def collect_tools(tools: Mapping[str, Path]) -> dict[str, Entry]:
    """The tools under their own paths, their libraries, and busybox under every other name it knows."""
    entries = {merged(path): program(path) for path in [*tools.values(), *libraries(tools.values())]}
    entries["usr/sbin/modprobe"] = Entry(stat.S_IFLNK | 0o777, b"../bin/kmod")
    entries["usr/bin/busybox"] = entries.pop(merged(tools["busybox"]))
    taken = {Path(name).name for name in entries}
    for applet in run([str(tools["busybox"]), "--list"]).split():
        if applet not in taken:
            entries[f"usr/bin/{applet}"] = Entry(stat.S_IFLNK | 0o777, b"busybox")
    return entries


def collect_agent() -> dict[str, Entry]:
    """The programs of the agent."""
    return {goal: program(AGENT_DIR / name) for name, goal in AGENT_PROGRAMS.items()}


def program(path: Path) -> Entry:
    """A file that can be run (libraries may)."""
    return Entry(stat.S_IFREG | 0o755, path.read_bytes())


def merged(path: Path) -> str:
    """The path inside the ramdisk, where /bin, /sbin and /lib are links into /usr."""
    plain = str(path).lstrip("/")
    return plain if plain.startswith("usr/") else f"usr/{plain}"


def libraries(programs: Iterable[Path]) -> list[Path]:
    """Every shared library and loader that the programs ask for, and what glibc opens by itself later."""
    found: set[Path] = set()
    for path in programs:
        if is_static(path):
            continue
        for line in run(["ldd", str(path)]).splitlines():
            match = re.search(r"(?:=> )?(/\S+) \(0x", line)
            if match:
                found.add(Path(match.group(1)))
    libc = next((path for path in found if path.name.startswith("libc.so")), None)
    unwinder = libc.with_name("libgcc_s.so.1") if libc else None  # threads are cancelled by it
    if unwinder and unwinder.exists():
        found.add(unwinder)
    return sorted(found)


def cpio(entries: Mapping[str, Entry]) -> bytes:
    """The entries as a cpio archive of the kind the kernel unpacks (initramfs-buffer-format, "newc")."""
    whole = dict(entries)
    for name in entries:
        for parent in Path(name).parents:
            if str(parent) != ".":
                whole.setdefault(str(parent), Entry(stat.S_IFDIR | 0o755))
    parts: list[bytes] = []
    for number, name in enumerate(sorted(whole), start=1):
        parts.append(cpio_entry(number, name, whole[name]))
    parts.append(cpio_entry(0, "TRAILER!!!", Entry(0)))
    return b"".join(parts)


def cpio_entry(number: int, name: str, entry: Entry) -> bytes:
    """One entry: 13 fields of 8 hex digits after the magic number, then name and data, each padded to 4 bytes."""
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.device
    raw = name.encode() + b"\0"
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, major, minor, len(raw), 0)
    head = b"070701" + b"".join(b"%08x" % value for value in fields) + raw
    return head + b"\0" * (-len(head) % 4) + entry.data + b"\0" * (-len(entry.data) % 4)


def install(files: AgentFiles, image: Path, packed: Path, described: Mapping[str, object]) -> None:
    """Put the new files in place, the manifest last: whatever it describes is there."""
    files.manifest.unlink(missing_ok=True)
    sizes = {}
    for source, goal in ((image, files.kernel), (packed, files.initrd)):
        source.chmod(0o644)
        sizes[goal.name] = {"size": source.stat().st_size, "sha256": file_hash(source)}
        source.replace(goal)
    draft = packed.with_name("manifest.json")
    draft.write_text(json.dumps({**described, "files": sizes}, indent=2, sort_keys=True) + "\n")
    draft.replace(files.manifest)


def file_hash(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(command: list[str], goal: str = "", cwd: Path | None = None) -> str:
    """The output of a command; raises with its last words when it fails.  `goal` says what it was for."""
    environment = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        remedy = "; is the package list there? run: apt-get update" if command[0].startswith("apt") else ""
        raise RamdiskError(f"Could not {goal or 'run ' + command[0]}: {said}{remedy}")
    return done.stdout

"""Which accelerator QEMU gets: kvm only where it has been seen to boot a Linux kernel, else tcg.

That /dev/kvm exists proves nothing: on hosts that are themselves virtual it may open, run the firmware, and never get
through a kernel's start.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

KVM = Path("/dev/kvm")
PROBE_SECONDS = 5.0
_WORD = b"nodepool-rack: this accelerator boots Linux"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What QEMU runs on, and why."""

    name: str  # kvm | tcg
    reason: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """QEMU's arguments; `tb-size` bounds what the translator keeps (MiB), which is most of a small guest's size."""
        if self.name == "kvm":
            return ("-accel", "kvm", "-cpu", "host")
        return ("-accel", "tcg,thread=single,tb-size=256", "-cpu", "qemu64")


def choose(folder: Path, kernels: Iterable[Path] = ()) -> Accelerator:
    """The accelerator for this host; the probe's answer is kept in `folder` until the host boots anew.

    `kernels` are tried before those in /boot; without any kernel to boot the answer is tcg.
    """
    if not os.access(KVM, os.R_OK | os.W_OK):
        return Accelerator("tcg", f"{KVM} is not there or not open to us")
    cache, boot_id = folder / "accel.json", _BOOT_ID.read_text().strip()
    try:
        kept = json.loads(cache.read_text())
        if kept.pop("host_boot") == boot_id:
            return Accelerator(**kept)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no answer yet, or none that can be read: probe
    kernel = next((path for path in (*kernels, *_host_kernels()) if path.is_file()), None)
    busybox = shutil.which("busybox")
    if kernel is None or busybox is None:
        return Accelerator("tcg", f"{KVM} could not be tried: no {'kernel' if busybox else 'busybox'} to boot")
    accelerator = probe(kernel, Path(busybox), PROBE_SECONDS)
    cache.write_text(json.dumps({**asdict(accelerator), "host_boot": boot_id}) + "\n")
    return accelerator


def probe(kernel: Path, busybox: Path, seconds: float, name: str = "kvm") -> Accelerator:
    """Boot `kernel` with one static program under `name`; kvm when its word comes out within `seconds`, else tcg."""
    candidate = Accelerator(name, f"a kernel booted under {name} within {seconds:g} s")
    script = b"#!/bin/busybox sh\n/bin/busybox echo '" + _WORD + b"'\n/bin/busybox poweroff -f\n"
    with tempfile.TemporaryDirectory(prefix="rack-probe-") as folder:
        initrd = Path(folder) / "initrd.img"
        files = {"bin": None, "bin/busybox": busybox.read_bytes(), "init": script}
        initrd.write_bytes(cpio(files))
        command = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", *candidate.arguments]
        command += ["-machine", "pc,graphics=off", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot"]
        command += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", "console=ttyS0 panic=-1 quiet"]
        try:
            done = subprocess.run(
                [*command, "-serial", "stdio"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as expired:
            output = expired.stdout or b""
        else:
            output = done.stdout
    if _WORD in output:
        return candidate
    return Accelerator("tcg", f"no kernel came up under {name} within {seconds:g} s")


def cpio(files: dict[str, bytes | None]) -> bytes:
    """An initramfs in cpio's "newc" format (the kernel's initramfs-buffer-format.rst); None makes a folder."""
    archive = bytearray()
    entries = [(path, 0o040755 if data is None else 0o100755, data or b"") for path, data in files.items()]
    for inode, (path, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        name = path.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _host_kernels() -> list[Path]:
    """The kernels of this host, the running one first."""
    boot = Path("/boot")
    return [boot / f"vmlinuz-{os.uname().release}", *sorted(boot.glob("vmlinuz-*"), reverse=True)]

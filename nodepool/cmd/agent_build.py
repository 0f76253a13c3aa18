"""`nodepool agent-build`: make the kernel and the ramdisk that machines boot over the network, without a daemon."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from nodepool.image import ramdisk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and which kernel."""
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("var/agent"),
        metavar="DIR",
        help="where the files go; the YAML's agent-dir (default: %(default)s)",
    )
    parser.add_argument(
        "--kernel-package",
        default=ramdisk.DEFAULT_KERNEL_PACKAGE,
        metavar="PACKAGE",
        help="the distribution's package to take the kernel from (default: %(default)s, which has the drivers of real "
        "servers; linux-image-cloud-amd64 starts quicker on virtual machines and has few others)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the files are there and current, 1 with one sentence on stderr when they cannot be made."""
    start = time.monotonic()

    def progress(sentence: str) -> None:
        print(f"{time.monotonic() - start:5.1f} s  {sentence}", flush=True)

    try:
        ramdisk.build_ramdisk(args.dir, progress, args.kernel_package)
    except (ramdisk.RamdiskError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0

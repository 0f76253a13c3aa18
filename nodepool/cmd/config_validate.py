"""`nodepool config-validate`: say whether the files can be used, without a daemon."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nodepool.errors import ConfigError

DEFAULT_CONFIG = Path("/etc/nodepool/nodepool.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files to look at; what the program's own parser has under the same names stays when not given here."""
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help=f"the configuration (default: {DEFAULT_CONFIG})",
    )
    parser.add_argument("-s", "--secure", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="the secrets file")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 and one sentence when the files are good, 1 and every problem on stderr when not."""
    from nodepool.config import load_checked

    path = Path(getattr(args, "config", None) or DEFAULT_CONFIG)
    secure = getattr(args, "secure", None)
    try:
        loaded = load_checked(path, Path(secure) if secure else None)
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        print(_count(len(error.problems), "problem"), file=sys.stderr)
        return 1
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    config = loaded.config
    machines = sum(len(provider.machines) for provider in config.providers.values())
    counts = (
        _count(len(config.providers), "provider"),
        _count(machines, "machine"),
        _count(len(config.labels), "label"),
        _count(len(config.diskimages), "diskimage"),
        _count(len(config.networks), "network"),
    )
    print(f"{path} is good: {', '.join(counts)}; generation {config.generation}.")
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

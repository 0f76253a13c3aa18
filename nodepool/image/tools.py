"""Finding the programs that a build calls, and saying which Debian package has one that is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping


def find_tool(name: str) -> str | None:
    """Where a program is, also in the folders that an ordinary user's PATH leaves out."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")


def lacking(needed: Mapping[str, str]) -> dict[str, str]:
    """Of `needed` (tool -> Debian package), what this machine does not have."""
    return {tool: package for tool, package in needed.items() if not find_tool(tool)}


def sentence_of_missing(lacks: Mapping[str, str]) -> str:
    """What is missing on this machine, with the command that brings it."""
    packages = " ".join(sorted(set(lacks.values())))
    verb = "is" if len(lacks) == 1 else "are"
    return f"{', '.join(lacks)} {verb} missing on this machine: apt-get install {packages}"

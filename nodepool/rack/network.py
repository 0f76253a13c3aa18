"""The rack's own network: a namespace with a bridge, a tap per machine, and the loopback that the BMCs live on."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from nodepool.rack import RackError

BRIDGE, CIDR, GATEWAY = "br0", "198.51.100.0/24", "198.51.100.1"  # TEST-NET-2, RFC 5737
GATEWAY6 = "fd42::1/64"
_NAMESPACES = Path("/run/netns")


def namespace_of(folder: Path) -> str:
    """The namespace's name for the rack in `folder`: several racks may exist side by side."""
    return "np-" + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]


def exists(namespace: str) -> bool:
    """Whether there is such a namespace now."""
    return (_NAMESPACES / namespace).exists()


def create(namespace: str, taps: Iterable[str]) -> None:
    """Make the namespace and everything in it.

    The bridge has an address of its own and a port that always carries, so that its IPv6 side is ready before the
    first machine has power: iPXE waits for router advertisements.
    """
    lines = [
        "link set lo up",
        f"link add {BRIDGE} address 52:54:00:00:fe:01 type bridge stp_state 0 forward_delay 0",
        "link add name steady type veth peer name steady-end",
        f"link set steady-end addrgenmode none\nlink set steady-end up\nlink set steady master {BRIDGE} up",
        f"address add {GATEWAY}/24 dev {BRIDGE}\naddress add {GATEWAY6} dev {BRIDGE} nodad",
        f"link set {BRIDGE} up",
        *(f"tuntap add dev {tap} mode tap\nlink set {tap} master {BRIDGE} up" for tap in taps),
    ]
    _ip("netns", "add", namespace)
    try:
        _ip("-n", namespace, "-batch", "-", stdin="\n".join(lines) + "\n")
    except RackError:
        remove(namespace)
        raise


def remove(namespace: str) -> None:
    """Take the namespace away; bridge and taps go with it."""
    if exists(namespace):
        _ip("netns", "delete", namespace)


def processes(namespace: str) -> list[int]:
    """The ids of the processes inside."""
    return [int(word) for word in _ip("netns", "pids", namespace).split()] if exists(namespace) else []


def _ip(*words: str, stdin: str = "") -> str:
    done = subprocess.run(["ip", *words], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise RackError(f"the rack's network cannot be made: ip {' '.join(words)}: {said[0]}")
    return done.stdout

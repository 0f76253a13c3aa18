"""A rack of simulated machines: what rack.json says of it, and the YAML of a daemon that uses it.

Shape of rack.json: {kind: "simulated", folder, namespace: "", gateway, cidr, url, ssh_port, seconds: {phase: seconds},
machines: [{name, mac, ip, uuid, firmware, disk (bytes), bmc: {host, port, username, password}}]}.  A machine's BMC, its
agent and its SSH have one address; the daemon's own is the gateway's.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from nodepool.rack import RackError, inventory
from nodepool.rack.simulated.spec import SimulatedSpec

KIND = "simulated"
MOST_MACHINES = 5000
IPMI_PORT, SSH_PORT, BOOT_PORT = 6230, 2222, 8090  # an ordinary user may not have those below 1024
DISK = 8 * 10**9
LABEL = "simulated"


def describe(folder: Path, count: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The content of rack.json for `count` machines n1, n2, ...; `folder` is absolute.

    Each rack has a network of its own, 127.N.0.0/16, that nobody uses yet.  Raises RackError.
    """
    if not 1 <= count <= MOST_MACHINES:
        raise RackError(f"a simulated rack has 1 to {MOST_MACHINES} machines, not {count}")
    number, password = _free_network(folder), secrets.token_urlsafe(9)
    return {
        "kind": KIND,
        "folder": str(folder),
        "namespace": "",
        "gateway": f"127.{number}.0.1",
        "cidr": f"127.{number}.0.0/16",
        "url": f"http://127.{number}.0.1:{BOOT_PORT}",
        "ssh_port": SSH_PORT,
        "seconds": dict(seconds),
        "machines": [_machine(folder, number, index, password) for index in range(1, count + 1)],
    }


def _machine(folder: Path, network: int, index: int, password: str) -> dict[str, Any]:
    high, low = divmod(index + 9, 250)
    address = f"127.{network}.{high}.{low + 1}"
    return {
        "name": f"n{index}",
        "mac": f"52:54:00:01:{index >> 8:02x}:{index & 0xFF:02x}",
        "ip": address,
        "uuid": str(uuid5(NAMESPACE_URL, f"{folder}/n{index}")),
        "firmware": "bios",
        "disk": DISK,
        "bmc": {"host": address, "port": IPMI_PORT, "username": "admin", "password": password},
    }


def _free_network(folder: Path) -> int:
    """The second byte of a loopback network on which neither a BMC nor a boot listener answers."""
    first = hashlib.sha256(str(folder).encode()).digest()[0]
    for number in ((first + offset) % 128 + 64 for offset in range(128)):
        places = (
            (socket.SOCK_DGRAM, (f"127.{number}.0.11", IPMI_PORT)),
            (socket.SOCK_STREAM, (f"127.{number}.0.1", BOOT_PORT)),
        )
        if all(_free(kind, place) for kind, place in places):
            return number
    raise RackError("all loopback networks for simulated racks are in use: `nodepool-rack down` those not needed")


def _free(kind: socket.SocketKind, place: tuple[str, int]) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1 if kind is socket.SOCK_STREAM else 0)
        try:
            probe.bind(place)
        except OSError:
            return False
    return True


def is_simulated(rack: Mapping[str, Any]) -> bool:
    """Whether it is one of ours."""
    return rack.get("kind") == KIND


def is_simulated_in(folder: Path) -> bool:
    """Whether the rack in `folder`, if there is one, is one of ours."""
    try:
        return is_simulated(inventory.read(folder))
    except RackError:
        return False


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of the same machines; addresses and passwords are drawn anew each time."""
    same = is_simulated(one) and is_simulated(other) and one["seconds"] == other["seconds"]
    return same and len(one["machines"]) == len(other["machines"])


def spec_of(rack: Mapping[str, Any], machine: Mapping[str, Any]) -> SimulatedSpec:
    """The hardware that an entry of rack.json stands for."""
    return SimulatedSpec(
        name=machine["name"],
        uuid=UUID(machine["uuid"]),
        mac=machine["mac"],
        ip=machine["ip"],
        url=rack["url"],
        ssh_port=rack["ssh_port"],
        seconds=rack["seconds"],
        firmware=machine["firmware"],
        disk=machine["disk"],
    )


def write_yaml(rack: Mapping[str, Any], home: Path, dib_cmd: str, min_ready: int | None = None) -> Path:
    """Write into `home` all that a daemon needs for the rack; gives the path of nodepool.yaml.

    `dib_cmd` makes the image, `min_ready` is how many nodes are kept READY (None: as many as there are machines).
    Everything of the daemon stays in `home`.  YAML that is JSON is YAML, and needs no library.
    """
    if not is_simulated(rack):
        raise RackError("this rack has real machines: `make run` writes the YAML for such a one")
    home = home.resolve()
    (home / "agent").mkdir(parents=True, exist_ok=True)
    for name in ("vmlinuz", "initrd.img"):  # what the firmware fetches; its agent is the rack's own
        (home / "agent" / name).write_text("a simulated machine fetches this and does not run it\n")
    _replace(home / "secure.yaml", _lines({"credentials": [_credential(rack)]}), 0o600)
    _replace(home / "nodepool.yaml", _lines(configuration(rack, home, dib_cmd, min_ready)), 0o644)
    return home / "nodepool.yaml"


def configuration(rack: Mapping[str, Any], home: Path, dib_cmd: str, min_ready: int | None) -> dict[str, Any]:
    """The daemon's YAML as data."""
    count = len(rack["machines"])
    network = {"name": "loopback", "interface": "lo", "cidr": rack["cidr"], "gateway": rack["gateway"]}
    image = {"name": "simulated", "elements": ["none"], "formats": ["raw"], "dib-cmd": dib_cmd, "assembly": "dib"}
    provider = {
        "name": "simulated",
        "driver": "metal",
        "network": "loopback",
        "boot-timeout": 60 + 2 * sum(rack["seconds"].values()),
        "ssh": {"user": "root", "key": str(home / "id_ed25519"), "port": rack["ssh_port"]},
        "machines": [_declared(machine) for machine in rack["machines"]],
        "pools": [{"name": "main", "max-servers": count, "labels": [{"name": LABEL, "diskimage": "simulated"}]}],
    }
    return {
        "version": 1,
        "database": f"sqlite:///{home}/nodepool.db",
        "socket": str(home / "nodepool.sock"),
        "images-dir": str(home / "images"),
        "agent-dir": str(home / "agent"),
        "networks": [{**network, "dhcp": "external", "port": BOOT_PORT}],
        "diskimages": [image],
        "labels": [{"name": LABEL, "min-ready": count if min_ready is None else min_ready}],
        "providers": [provider],
    }


def _declared(machine: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": machine["name"],
        "rack": "simulated",
        "bmc": f"ipmi://{machine['bmc']['host']}:{machine['bmc']['port']}",
        "credentials": "simulated",
        "interfaces": [{"mac": machine["mac"], "ip": machine["ip"]}],
        "firmware": machine["firmware"],
        "accept": True,
    }


def _credential(rack: Mapping[str, Any]) -> dict[str, str]:
    """All BMCs of the rack have the same account."""
    bmc = rack["machines"][0]["bmc"]
    return {"name": "simulated", "username": bmc["username"], "password": bmc["password"]}


def _lines(data: Mapping[str, Any]) -> str:
    """JSON, which is YAML too."""
    text = json.dumps(data, indent=1)
    return f"# Written by `nodepool-rack yaml`; changes are lost.\n{text}\n"


def _replace(path: Path, text: str, mode: int) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    draft.replace(path)

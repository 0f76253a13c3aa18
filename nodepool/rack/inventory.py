"""What a rack consists of: `rack.json` in its folder, written by `up`, read by the rack's server and everybody else.

Shape: {namespace, bridge, gateway, cidr, folder, accelerator: {name, reason}, machines: [{name, mac, ip, uuid,
firmware, memory (MiB), tap, console, bmc: {host, port, username, password}, disks: [{path, size, ignores_discard}]}]}.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from nodepool.rack import RackError, network
from nodepool.rack.accel import Accelerator
from nodepool.rack.machine import GIB, DiskSpec, QemuSpec

FILE = "rack.json"
MOST_MACHINES = 200
IPMI_PORT = 623


@dataclass(frozen=True, slots=True)
class Wish:
    """What `up` is asked for.  Sizes: disk in bytes (None: 2 GiB for the first machine, else 4), memory in MiB.

    `firmware`: bios or uefi for each machine in turn, from the start again when there are more machines.
    """

    machines: int = 1
    disk_size: int | None = None
    memory: int = 512
    firmware: tuple[str, ...] = ("bios",)

    def specs(self, folder: Path) -> list[QemuSpec]:
        """The machines n1, n2, ...  The first one's disk ignores discard and is full of old bytes."""
        return [self._spec(folder, number) for number in range(1, self.machines + 1)]

    def _spec(self, folder: Path, number: int) -> QemuSpec:
        name, first = f"n{number}", number == 1
        return QemuSpec(
            name=name,
            uuid=uuid5(NAMESPACE_URL, f"{folder}/{name}"),
            mac=f"52:54:00:00:00:{number:02x}",
            tap=f"tap{number}",
            folder=folder / name,
            memory=self.memory,
            firmware=self.firmware[(number - 1) % len(self.firmware)],
            disks=(DiskSpec(self.disk_size or (2 if first else 4) * GIB, ignores_discard=first),),
        )


def describe(folder: Path, specs: list[QemuSpec], accelerator: Accelerator) -> dict[str, Any]:
    """The content of rack.json; each BMC gets a password of its own."""
    return {
        "namespace": network.namespace_of(folder),
        "bridge": network.BRIDGE,
        "gateway": network.GATEWAY,
        "cidr": network.CIDR,
        "folder": str(folder),
        "accelerator": asdict(accelerator),
        "machines": [_machine(spec, number) for number, spec in enumerate(specs, start=1)],
    }


def _machine(spec: QemuSpec, number: int) -> dict[str, Any]:
    return {
        "name": spec.name,
        "mac": spec.mac,
        "ip": f"198.51.100.{10 + number}",
        "uuid": str(spec.uuid),
        "firmware": spec.firmware,
        "memory": spec.memory,
        "tap": spec.tap,
        "console": str(spec.console),
        "bmc": {
            "host": f"127.0.0.{10 + number}",
            "port": IPMI_PORT,
            "username": "admin",
            "password": secrets.token_urlsafe(9),
        },
        "disks": [
            {"path": str(spec.disk_path(index)), "size": disk.size, "ignores_discard": disk.ignores_discard}
            for index, disk in enumerate(spec.disks)
        ],
    }


def spec_of(folder: Path, machine: Mapping[str, Any]) -> QemuSpec:
    """The hardware that an entry of rack.json stands for."""
    return QemuSpec(
        name=machine["name"],
        uuid=UUID(machine["uuid"]),
        mac=machine["mac"],
        tap=machine["tap"],
        folder=folder / machine["name"],
        memory=machine["memory"],
        firmware=machine["firmware"],
        disks=tuple(DiskSpec(disk["size"], disk["ignores_discard"]) for disk in machine["disks"]),
    )


def write(folder: Path, rack: Mapping[str, Any]) -> None:
    """Put rack.json into `folder`, for its owner's eyes only: it holds passwords."""
    part = folder / (FILE + ".part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(rack, file, indent=2)
        file.write("\n")
    part.rename(folder / FILE)


def read(folder: Path) -> dict[str, Any]:
    """The rack in `folder`; RackError when there is none."""
    try:
        rack: dict[str, Any] = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        raise RackError(f"there is no rack in {folder}: `nodepool-rack up --dir {folder}` makes one") from None
    except ValueError as error:
        raise RackError(f"{folder / FILE} cannot be read ({error}): `nodepool-rack down --dir {folder}`") from error
    return rack

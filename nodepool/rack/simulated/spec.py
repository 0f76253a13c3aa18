"""What a simulated machine is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class SimulatedSpec:
    """A machine's hardware: `ip` is its own loopback address, `url` the boot listener that DHCP would name.

    `seconds` says how long each phase lasts (`phases.DEFAULT` names them), `disk` is bytes.
    """

    name: str
    uuid: UUID
    mac: str
    ip: str
    url: str
    ssh_port: int
    seconds: Mapping[str, float]
    firmware: str = "bios"
    disk: int = 8 * 10**9

    @property
    def facts(self) -> dict[str, str]:
        """What its agent tells about it (doc/agent-protocol.rst)."""
        return {
            "fact.arch": "x86_64",
            "fact.cpus": "2",
            "fact.memory": str(4 << 30),
            "fact.firmware": self.firmware,
            "fact.uuid": str(self.uuid),
            "fact.serial": f"simulated-{self.name}",
            "fact.vendor": "nodepool",
            "fact.product": "simulated machine",
            "nic.0.name": "eth0",
            "nic.0.mac": self.mac,
            "disk.0.name": "vda",
            "disk.0.size": str(self.disk),
            "disk.0.serial": f"{self.name}-disk0",
            "disk.0.rotational": "0",
        }

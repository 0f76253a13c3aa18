"""The system that was installed on a simulated machine: an SSH server with the host key of this one installation.

Its shell is none: it knows the few commands of nodepool's own and some that people try.  Nothing that is typed at a
simulated machine is carried out on the host.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from uuid import uuid4

import asyncssh

KERNEL = "6.1.0-simulated"
_BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


@dataclass(slots=True)
class System:
    """What is on a disk: an image, with the hostname, the user, the keys and the host key of `configured`."""

    hostname: str = "unconfigured"
    user: str = ""
    authorized: set[str] = field(default_factory=set)  # lines of authorized_keys
    key: asyncssh.SSHKey | None = None

    @classmethod
    def configured(cls, hostname: str, user: str, authorized_keys: str) -> System:
        """A system of its own: with a new host key."""
        keys = {line.strip() for line in authorized_keys.splitlines() if line.strip()}
        return cls(hostname, user, keys, asyncssh.generate_private_key("ssh-ed25519"))

    @property
    def host_key(self) -> str:
        """The public half, `ssh-ed25519 AAAA...`."""
        assert self.key is not None
        return _public(self.key)

    async def run(self, address: str, port: int) -> None:
        """Be up, with a boot id of this boot, until somebody types `reboot`; ends at once when cancelled."""
        if self.key is None:
            await asyncio.Event().wait()  # a system without a host key has no SSH
            return
        boot = _Boot(self, str(uuid4()))
        server = await asyncssh.listen(
            address,
            port,
            server_host_keys=[self.key],
            server_factory=lambda: _Door(self),
            process_factory=boot.process,
            encoding="utf-8",
            login_timeout=30,
            keepalive_interval=0,
        )
        try:
            await boot.over.wait()
        finally:
            server.close()
            await asyncio.shield(server.wait_closed())


class _Door(asyncssh.SSHServer):
    """Who may log in."""

    def __init__(self, system: System) -> None:
        self._system = system

    def begin_auth(self, username: str) -> bool:  # noqa: ARG002 - asyncssh's
        """Nobody comes in without proof."""
        return True

    def public_key_auth_supported(self) -> bool:
        """By key alone."""
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        """Whether the key is in the user's authorized_keys."""
        known = {" ".join(line.split()[:2]) for line in self._system.authorized}
        return username == self._system.user and _public(key) in known


@dataclass(slots=True)
class _Boot:
    """One boot of a system."""

    system: System
    boot_id: str
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def process(self, process: asyncssh.SSHServerProcess[str]) -> None:
        """Carry out one command."""
        command = (process.command or "").strip()
        fixed = {
            _BOOT_ID: self.boot_id,
            "hostname": self.system.hostname,
            "id -un": self.system.user,
            "uname -r": KERNEL,
            "true": "",
            "": f"This is {self.system.hostname}, a simulated machine: it has no shell.",
        }
        status = 0
        if command in fixed:
            process.stdout.write(f"{fixed[command]}\n" if fixed[command] else "")
        elif ".ssh/authorized_keys" in command:  # however it is done: the keys come on standard input
            lines = (await process.stdin.read()).splitlines()
            self.system.authorized |= {line.strip() for line in lines if line.strip()}
        elif command == "reboot":
            asyncio.get_running_loop().call_later(0.1, self.over.set)
        else:
            process.stderr.write(f"a simulated machine knows only {', '.join(filter(None, fixed))} and reboot\n")
            status = 127
        process.exit(status)


def _public(key: asyncssh.SSHKey) -> str:
    return " ".join(key.export_public_key("openssh").decode().split()[:2])

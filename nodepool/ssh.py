"""Logging in to nodes: over a connection that has proven the host key that is expected, or not at all (RFC 4253, 8)."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from nodepool.errors import Code, ConfigError, Temporary

if TYPE_CHECKING:
    import asyncssh

T = TypeVar("T")

CONNECT = 5.0  # seconds for TCP and the banner
LOGIN = 15.0  # seconds for the whole of connect, login and command: emulated machines are slow at it
AGAIN = 3.0  # seconds until the next look

# One key per line on standard input; a key that is there already is not added again.
_ADD_KEYS = (
    "umask 077; mkdir -p .ssh && touch .ssh/authorized_keys && while IFS= read -r key; do "
    'grep -qxF -- "$key" .ssh/authorized_keys || printf "%s\\n" "$key" >> .ssh/authorized_keys; done'
)


@dataclass(frozen=True, slots=True)
class Target:
    """A system to log in to, and the host key it must prove (`ssh-ed25519 AAAA...`)."""

    address: str
    port: int
    user: str
    host_key: str


class SshShell:
    """Logs in with one private key; each call is one connection.  Raises Temporary with the code of what went wrong."""

    def __init__(self, key: Path) -> None:
        self._path = key

    @functools.cached_property
    def _key(self) -> asyncssh.SSHKey:
        """The private key, read and parsed once: a pool logs in by the hundred."""
        import asyncssh

        return asyncssh.read_private_key(self._path)

    def boot_id(self, target: Target) -> str:
        """Read the kernel's boot id: it differs from boot to boot (proc(5), /proc/sys/kernel/random/boot_id)."""
        return _wait_for(self._run(target, "cat /proc/sys/kernel/random/boot_id", "")).strip()

    def authorize(self, target: Target, keys: tuple[str, ...]) -> None:
        """Add public keys to those that may log in."""
        _wait_for(self._run(target, _ADD_KEYS, "".join(f"{key}\n" for key in keys)))

    async def _run(self, target: Target, command: str, stdin: str) -> str:
        import asyncssh

        where = f"{target.user}@{target.address}"
        try:
            trusted = asyncssh.import_public_key(target.host_key)
            async with (
                asyncio.timeout(LOGIN),
                asyncssh.connect(
                    target.address,
                    target.port,
                    username=target.user,
                    client_keys=[self._key],
                    known_hosts=([trusted], [], []),
                    connect_timeout=CONNECT,
                    agent_path=None,
                    config=None,
                ) as connection,
            ):
                given = {"input": stdin} if stdin else {"stdin": asyncssh.DEVNULL}
                done = await connection.run(command, check=True, **given)
                return str(done.stdout)
        except asyncssh.HostKeyNotVerifiable as error:
            raise Temporary(
                f"another system than the one just installed answers on {target.address}", Code.LOGIN_HOST_KEY, AGAIN
            ) from error
        except asyncssh.PermissionDenied as error:
            raise Temporary(f"{where} does not let nodepool's key in", Code.LOGIN_AUTH, AGAIN) from error
        except asyncssh.ProcessError as error:
            said = str(error.stderr or "").strip()
            raise Temporary(f"{where}: {said or 'the command failed'}", Code.LOGIN_AUTH, AGAIN) from error
        except (OSError, TimeoutError, asyncssh.Error) as error:
            raise Temporary(f"no SSH on {target.address} yet", Code.LOGIN_SILENT, AGAIN) from error


def _wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end in this thread; steps run in worker threads, which have no loop of their own."""
    return asyncio.run(work)


def ensure_key(path: Path) -> str:
    """Make an Ed25519 private key at `path` (mode 0600) when there is none; gives the public key as one line.

    Raises ConfigError when the file there cannot be used.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Ed25519PrivateKey.generate()
        private = made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(private)
    try:
        found = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            (f"the SSH key {path} cannot be used ({error}); it must be an OpenSSH private key without a passphrase",)
        ) from error
    return found.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() + " nodepool"

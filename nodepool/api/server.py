"""The API on a Unix socket: uvicorn in a thread of the daemon.  There is no TCP until there is access control."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import socket
import stat
import struct
import threading
from pathlib import Path
from typing import cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from nodepool.api.desk import Changes
from nodepool.errors import NodepoolError, Refused

LONGEST_PATH = 107  # bytes: sun_path of sockaddr_un is 108 with its NUL (unix(7))
MODE = 0o660
GRACE = 1  # seconds that answers under way may take when the daemon stops
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)


class ApiServer:
    """Serves `app` on `path`, which only its owner and group may connect to."""

    def __init__(self, app: FastAPI, path: Path) -> None:
        self._app = app
        self._path = path
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._inode: tuple[int, int] | None = None

    def start(self) -> None:
        """Listen; returns when connections are taken.  Raises Refused with the remedy when it cannot."""
        listener = _listen(self._path)
        self._inode = _inode(self._path)
        config = uvicorn.Config(
            self._app,
            http=_PeerProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=GRACE,
        )
        self._server = _Server(config, cast("Changes", self._app.state.changes))
        self._thread = threading.Thread(target=self._serve, args=(listener,), name="api", daemon=True)
        self._thread.start()
        self._server.settled.wait()
        if not self._server.started:
            self.stop()
            raise NodepoolError(f"the API on {self._path} could not be started; the log says why")

    def stop(self) -> None:
        """Stop taking connections, end those that wait, remove the socket; returns within 2 seconds."""
        if self._server is not None and self._thread is not None:
            self._server.stop()
            self._thread.join(2 * GRACE)
            self._server = self._thread = None
        if self._inode is not None and _inode(self._path) == self._inode:
            self._path.unlink()
        self._inode = None

    def _serve(self, listener: socket.socket) -> None:
        assert self._server is not None
        server = self._server
        try:
            server.run([listener])
        finally:
            listener.close()
            server.settled.set()


class _Server(uvicorn.Server):
    """uvicorn that sleeps until it is told to stop: its own loop wakes up ten times a second to look."""

    def __init__(self, config: uvicorn.Config, changes: Changes) -> None:
        super().__init__(config)
        self.settled = threading.Event()  # started, or failed to
        self._changes = changes
        self._stopping: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        """Serve until `stop` is called."""
        self._stopping, self._loop = asyncio.Event(), asyncio.get_running_loop()
        self.settled.set()
        await self._stopping.wait()
        self._changes.close()
        for server in self.servers:  # a connection that is half taken when asyncio closes the listener is never closed
            for listener in server.sockets:
                self._loop.remove_reader(listener.fileno())
        await asyncio.sleep(0.01)

    def stop(self) -> None:
        """From any thread: end `main_loop`."""
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stopping.set)


class _PeerProtocol(H11Protocol):
    """HTTP/1.1 whose client is the user at the other end, as the kernel tells it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        pid, uid, _ = credentials(transport.get_extra_info("socket"))
        self.client = (_user(uid), pid)


def credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end of a Unix socket."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return cast("tuple[int, int, int]", _CREDENTIALS.unpack(raw))


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _listen(path: Path) -> socket.socket:
    length = len(bytes(path))
    if length > LONGEST_PATH:
        raise Refused(
            f"the path of the socket, {path}, has {length} bytes; the kernel takes {LONGEST_PATH}: shorten it"
        )
    _make_way(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _chmod_unbound(listener)
        listener.bind(bytes(path))
        path.chmod(MODE)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise Refused(
            f"cannot listen on {path}: {error.strerror}; make its folder writable, or set another `socket:`"
        ) from error
    return listener


def _chmod_unbound(listener: socket.socket) -> None:
    """The mode that the file will have from its first moment (less the umask), so that no other user slips in."""
    os.fchmod(listener.fileno(), MODE)


def _make_way(path: Path) -> None:
    """Remove the socket that a dead daemon has left; refuse anything else that is in the way."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise Refused(f"cannot listen on {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise Refused(f"{path} is in the way and is no socket: move it, or set another `socket:` in the YAML")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(bytes(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise Refused(f"{path} is in use by something that does not answer: {error.strerror or error}") from error
        pid = credentials(probe)[0]
    raise Refused(f"another daemon (process {pid}) answers on {path}: stop it, or set another `socket:` in the YAML")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino

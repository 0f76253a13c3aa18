"""The command line's end of the Unix socket: HTTP by http.client, errors as sentences with an exit status."""

from __future__ import annotations

import http.client
import json
import os
import socket
from typing import Any
from urllib.parse import quote, urlencode

DEFAULTS = ("./var/nodepool.sock", "/run/nodepool/nodepool.sock")
START = "start it (nodepoold -d -c FILE)"
PATIENCE = 75.0  # seconds for an answer; the longest wait that the daemon grants is 60

DONE, FAILED, USAGE, NOT_FOUND, REFUSED = 0, 1, 2, 4, 5
_STATUS = {400: USAGE, 422: USAGE, 404: NOT_FOUND, 409: REFUSED}
_LISTED_BY = {"nodes": "list", "requests": "request-list", "builds": "dib-image-list"}


class CommandError(Exception):
    """A command was not carried out: a sentence for stderr and the exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        """To the socket instead of a port."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self._path)


class Client:
    """Talks to the daemon behind the first of the sockets that answers."""

    def __init__(self, url: str | None = None) -> None:
        self._paths = sockets(url)

    def get(self, path: str, **query: object) -> Any:
        """What there is at `path` below /api/v1; query values that are empty are left out."""
        kept = {key: value for key, value in query.items() if value not in ("", None, False)}
        return self._call("GET", path + (f"?{urlencode(kept)}" if kept else ""))

    def items(self, path: str, **query: object) -> list[Any]:
        """All items of a list, page after page."""
        found: list[Any] = []
        cursor: object = None
        while True:
            page = self.get(path, **query, cursor=cursor)
            found += page["items"]
            cursor = page["next"]
            if cursor is None:
                return found

    def post(self, path: str, body: object = None) -> Any:
        """Ask for something."""
        return self._call("POST", path, body)

    def delete(self, path: str) -> Any:
        """Remove something."""
        return self._call("DELETE", path)

    def _call(self, method: str, path: str, body: object = None) -> Any:
        connection = self._connect()
        try:
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} if data else {}
            connection.request(method, "/api/v1" + path, data, headers)
            response = connection.getresponse()
            text = response.read()
        except TimeoutError as error:
            raise CommandError(f"nodepoold did not answer within {PATIENCE:.0f} s; its log may say why") from error
        except (OSError, http.client.HTTPException) as error:
            raise CommandError("nodepoold went away while it was asked; try again once it is up") from error
        finally:
            connection.close()
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise CommandError("what answers at the socket is no nodepoold; set --url to the right one") from error
        if response.status >= 400:
            detail = str(answer.get("detail", response.reason))
            lister = _LISTED_BY.get(path.split("/")[1]) if response.status == 404 else None
            hint = f"; nodepool {lister} shows what there is" if lister else ""
            raise CommandError(detail + hint, _STATUS.get(response.status, FAILED))
        return answer

    def _connect(self) -> _Connection:
        """A connection to the first socket that somebody listens on."""
        reasons = []
        for path in self._paths:
            connection = _Connection(path)
            try:
                connection.connect()
            except OSError as error:
                connection.close()
                reasons.append(_why(path, error))
            else:
                self._paths = [path]
                return connection
        raise CommandError(f"no nodepoold answers: {'; '.join(reasons)}. Either {START}, or set --url")


def sockets(url: str | None) -> list[str]:
    """The paths to try: `url` (a path or unix:///path), else NODEPOOL_URL, else where a daemon listens by default."""
    given = url or os.environ.get("NODEPOOL_URL", "")
    if not given:
        return list(DEFAULTS)
    path = given.removeprefix("unix://") if given.startswith("unix:///") else given
    if "://" in path:
        raise CommandError(f"{given!r} is no Unix socket: give a path or unix:///path (there is no TCP)", USAGE)
    return [path]


def _why(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist"
    if isinstance(error, ConnectionRefusedError):
        return f"{path} was left by one that is gone"
    if isinstance(error, PermissionError):
        return f"{path} is closed to you (it is open to its owner and its group)"
    if "too long" in str(error):
        return f"{path} is longer than the 107 bytes that a socket's path may have"
    return f"{path}: {error.strerror or error}"


def part(text: str) -> str:
    """`text` as one part of an URL's path."""
    return quote(text, safe="")

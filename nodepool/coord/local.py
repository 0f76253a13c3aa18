"""Coordination within one machine: whoever holds the lock is in office, and a second daemon is refused.

The lock is handed in as a function, so that the embedded database (a file to lock) and a server (a named lock) serve
alike.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sqlalchemy import Engine

from nodepool.errors import Refused
from nodepool.model import Owner
from nodepool.store import Office, Store, Tx

Unlock = Callable[[], None]
Lock = Callable[[], Unlock | None]  # None: somebody else has it

SCOPE = "daemon"
_LONGEST_IDLE = 31_536_000  # seconds; the server would end an idle connection after 8 hours, and the lock with it


def file_lock(path: Path) -> Lock:
    """An advisory lock on a file beside the database; the kernel gives it back when the process is gone."""

    def take() -> Unlock | None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return None
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        return lambda: os.close(handle)

    return take


def server_lock(engine: Engine) -> Lock:
    """A named lock of MySQL/MariaDB, held by a connection of its own (GET_LOCK), given back when that is gone.

    Such names hold for the whole server, so this one carries the database; they may have 64 characters.
    """
    name = "CONCAT('nodepoold.', SHA1(DATABASE()))"

    def take() -> Unlock | None:
        connection = engine.connect()
        connection.exec_driver_sql(f"SET SESSION wait_timeout = {_LONGEST_IDLE}")
        if connection.exec_driver_sql(f"SELECT GET_LOCK({name}, 0)").scalar() != 1:
            connection.close()
            return None

        def give_back() -> None:
            with suppress(Exception):
                connection.exec_driver_sql(f"SELECT RELEASE_LOCK({name})")
            connection.invalidate()  # nobody else is to have it with its settings
            connection.close()

        return give_back

    return take


class LocalReferee:
    """Nominates this process for every office of its database, or refuses it."""

    def __init__(self, store: Store, lock: Lock) -> None:
        self._store = store
        self._lock = lock
        self._unlock: Unlock | None = None

    def take_office(self) -> Office:
        """Raise the epoch of the owners row; whoever wrote under an earlier one is out of office from here on.

        Raises Refused when another daemon runs on the same database.
        """
        self._unlock = self._lock()
        if self._unlock is None:
            raise Refused(
                f"another nodepoold already runs on {self._store.engine.url.render_as_string()};"
                " stop it, or give this one another database"
            )
        holder = f"{socket.gethostname()}:{os.getpid()}"

        def raise_epoch(tx: Tx) -> Office:
            owner = tx.find(Owner, SCOPE)
            if owner is None:
                owner = tx.add(Owner(SCOPE, 1, holder, 0))
            else:
                owner = tx.put(replace(owner, epoch=owner.epoch + 1, holder=holder))
            return Office(SCOPE, owner.epoch)

        return self._store.write(raise_epoch)

    def leave(self) -> None:
        """Give the office back."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

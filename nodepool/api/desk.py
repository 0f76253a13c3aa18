"""What the handlers have in common: the store, the configuration in force, who asks, and waiting for a commit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Query
from starlette.requests import Request as HttpRequest

from nodepool.errors import Conflict
from nodepool.model import Request
from nodepool.plan import Catalog
from nodepool.service.views import Page
from nodepool.store import Store, Tx

T = TypeVar("T")

TRIES = 5  # how often a use case is run again when the loops have changed its row at the same time
_LARGEST = 2**63 - 1

Id = Annotated[int, Path(ge=1, le=_LARGEST)]


@dataclass(frozen=True)
class Desk:
    """What every handler works with."""

    store: Store
    catalog: Callable[[], Catalog]
    reasons: Callable[[], Mapping[str, Sequence[str]]]
    status: Callable[[], Mapping[str, Any]]
    changes: Changes

    def read(self, query: Callable[[Tx], T]) -> T:
        """Run `query` in a transaction that writes nothing."""
        return self.store.read(query)

    def write(self, use_case: Callable[[Tx], T]) -> T:
        """Run `use_case` in one transaction, again when somebody else has changed its row in the meantime."""
        for _ in range(TRIES - 1):
            with suppress(Conflict):
                return self.store.write(use_case)
        return self.store.write(use_case)


class Changes:
    """Wakes those who wait for a request whenever a commit has changed it; costs next to nothing while nobody waits."""

    def __init__(self, store: Store) -> None:
        self._feed = store.feed()
        self._waiting: dict[int, set[asyncio.Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = threading.Event()
        self._closed = False
        store.wake.append(self._committed)

    @contextmanager
    def watch(self, request_id: int) -> Iterator[asyncio.Event]:
        """An event that is set once the request has changed; to be used in the event loop, before reading the row."""
        self._loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        if self._closed:
            changed.set()
        self._waiting.setdefault(request_id, set()).add(changed)
        try:
            yield changed
        finally:
            waiting = self._waiting[request_id]
            waiting.discard(changed)
            if not waiting:
                del self._waiting[request_id]

    @property
    def closed(self) -> bool:
        """Whether the daemon stops: nobody is to wait any more."""
        return self._closed

    def close(self) -> None:
        """Let everybody who waits go; to be called in the event loop."""
        self._closed = True
        self._look(everything=True)

    def _committed(self) -> None:
        """Called by the store in the thread that has committed."""
        if not self._waiting or self._loop is None:
            self._feed.drain()
        elif not self._scheduled.is_set():
            self._scheduled.set()
            with suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._look)

    def _look(self, *, everything: bool = False) -> None:
        self._scheduled.clear()
        records, whole = self._feed.drain()
        changed = {record.id for record in records if isinstance(record, Request)}
        for request_id, waiting in self._waiting.items():
            if everything or not whole or request_id in changed:
                for event in waiting:
                    event.set()


def _actor(http: HttpRequest) -> str:
    """The user at the other end of the socket, as the kernel says (api.server); "" when it does not."""
    return http.client.host if http.client else ""


def _page(
    cursor: Annotated[int, Query(ge=0, le=_LARGEST, description="what `next` of the page before said")] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
) -> Page:
    return Page(cursor, limit)


Actor = Annotated[str, Depends(_actor)]
Part = Annotated[Page, Depends(_page)]

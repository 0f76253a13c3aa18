"""Agents that speak at the same time are answered together: while one batch is with the door, the next one gathers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor

from nodepool.door import AgentDoor, Call, Reply
from nodepool.errors import StoreUnavailable

log = logging.getLogger("nodepool.boot")

BATCH = 256  # calls that the door gets at once


class Gathering:
    """Hands calls to the door, many at once, on a thread of `executor`; belongs to the loop that `run` runs on."""

    def __init__(self, door: AgentDoor, executor: Executor) -> None:
        self._door = door
        self._executor = executor
        self._calls: list[tuple[Call, asyncio.Future[Reply]]] = []
        self._called = asyncio.Event()

    async def answer(self, call: Call) -> Reply:
        """The door's answer to one call; raises what the door raises."""
        future = asyncio.get_running_loop().create_future()
        self._calls.append((call, future))
        self._called.set()
        reply: Reply = await future
        return reply

    async def run(self) -> None:
        """Answer calls until cancelled."""
        while True:
            await self._called.wait()
            batch, self._calls = self._calls[:BATCH], self._calls[BATCH:]
            if not self._calls:
                self._called.clear()
            await self._answer(batch)

    async def _answer(self, batch: Sequence[tuple[Call, asyncio.Future[Reply]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            calls = [call for call, _ in batch]
            replies = await loop.run_in_executor(self._executor, self._door.together, calls)
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, StoreUnavailable):
                log.exception("%d agents could not be answered together; each alone now", len(batch))
                for single in batch:
                    await self._answer([single])
                return
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), reply in zip(batch, replies, strict=True):
                if not future.done():
                    future.set_result(reply)

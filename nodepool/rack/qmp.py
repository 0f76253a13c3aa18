"""QEMU's machine protocol (QMP) over one connected socket, for asyncio.

Source: QEMU's docs/interop/qmp-spec.rst: a greeting, `qmp_capabilities`, then one JSON object per line, answers matched
by `id`, events in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

from nodepool.rack import RackError

Event = Callable[[str, Mapping[str, Any]], None]


class Qmp:
    """One monitor.  `on_event` gets each event's name and data, inside the loop."""

    def __init__(self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], on_event: Event) -> None:
        self._reader, self._writer = streams
        self._on_event = on_event
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._pump: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, connection: socket.socket, on_event: Event) -> Qmp:
        """Take over `connection`, whose other end QEMU has, and get the monitor ready for commands."""
        monitor = cls(await asyncio.open_connection(sock=connection), on_event)
        try:
            if not await monitor._reader.readline():
                raise RackError("QEMU ended before its monitor answered")
            monitor._pump = asyncio.create_task(monitor._read())
            await monitor.execute("qmp_capabilities")
        except BaseException:
            await monitor.close()
            raise
        return monitor

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and give what it returns; RackError when QEMU refuses it or is gone."""
        if self._pump is None or self._pump.done():
            raise RackError(f"QEMU is gone: {command} was not carried out")
        number = next(self._ids)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        text = json.dumps({"execute": command, "arguments": arguments, "id": number})
        try:
            self._writer.write(text.encode() + b"\n")
            return await answer
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """Close the socket; commands that wait fail."""
        if self._pump:
            self._pump.cancel()
            await asyncio.wait([self._pump])
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._take(json.loads(line))
        except (OSError, ValueError):
            pass  # the same as an end: QEMU was killed in the middle of a line
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(RackError("QEMU ended before it answered"))

    def _take(self, message: Mapping[str, Any]) -> None:
        if "event" in message:
            self._on_event(message["event"], message.get("data", {}))
            return
        waiting = self._waiting.get(message.get("id", 0))
        if waiting is None or waiting.done():
            return
        if "error" in message:
            waiting.set_exception(RackError(f"QEMU: {message['error'].get('desc')}"))
        else:
            waiting.set_result(message.get("return"))

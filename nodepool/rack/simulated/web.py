"""HTTP as a booting machine speaks it: from its own address, a connection for each request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Self
from urllib.parse import quote, unquote

import aiohttp

from nodepool.rack import RackError

CONNECT, WHOLE = 5.0, 45.0  # seconds to connect, and for a whole answer; a poll is held for 25


class WebError(RackError):
    """No answer, or not the one that is needed; `status` is 0 when there was none."""

    def __init__(self, sentence: str, status: int = 0) -> None:
        super().__init__(sentence)
        self.status = status


class Web:
    """A client whose connections come from `address`: the boot listener tells machines apart by it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(local_addr=(self._address, 0), force_close=True),
            timeout=aiohttp.ClientTimeout(total=WHOLE, sock_connect=CONNECT),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, url: str) -> str:
        """A text; WebError when it is not answered with 200."""
        try:
            async with self._session.get(url) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise WebError(f"{url}: {error or 'no answer'}") from error
        if response.status != 200:
            raise WebError(f"{url}: status {response.status}", response.status)
        return body.decode(errors="replace")

    async def pieces(self, url: str, first: int, size: int) -> AsyncIterator[bytes]:
        """The bytes of a file from `first` to its end as they come, by a Range request (RFC 9110, 14.2).

        WebError when it breaks off, has another `size`, or is not answered with 206.
        """
        try:
            async with self._session.get(url, headers={"Range": f"bytes={first}-{size - 1}"}) as response:
                if response.status != 206:
                    raise WebError(f"{url} was answered with status {response.status}", response.status)
                whole = response.headers.get("Content-Range", "").rpartition("/")[2]
                if whole != str(size):
                    raise WebError(f"{url} has {whole or 'an unknown number of'} bytes; {size} were told", 206)
                async for piece in response.content.iter_any():
                    yield piece
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise WebError(f"{url}: {error or 'no answer'}") from error

    async def post(self, url: str, lines: Mapping[str, str]) -> tuple[int, dict[str, str]]:
        """Say `lines` in the form of doc/agent-protocol.rst; status and lines of the answer, status 0 for none."""
        body = "".join(f"{key}={quote(value, safe='')}\n" for key, value in lines.items())
        try:
            async with self._session.post(url, data=body.encode(), headers={"Content-Type": "text/plain"}) as response:
                text = (await response.read()).decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            return 0, {"error": str(error) or "no answer"}
        pairs = (line.partition("=")[::2] for line in text.splitlines())
        return response.status, {key: unquote(value) for key, value in pairs}

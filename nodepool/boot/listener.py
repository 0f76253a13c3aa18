"""The boot listener: HTTP for machines that boot, for the agents on them, and for the files that both fetch.

One thread with one event loop serves every network.  The door is asked on a small pool of threads, because it may block
on the database.  A poll that finds nothing to do is held, as a future in a dictionary and nothing more,
until the door names its boot or HOLD seconds are over.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

from nodepool.boot import ipxe
from nodepool.boot.gather import Gathering
from nodepool.boot.protocol import MAX_BODY, BadMessage, parse, render
from nodepool.door import AgentDoor, Call, Lines, Reply
from nodepool.errors import StoreUnavailable

log = logging.getLogger("nodepool.boot")

HOLD = 20.0  # seconds that a poll is held at most; agents give an answer 25
GATHER = 0.05  # seconds in which wake-ups are gathered before the door is asked once for all
RETRY = 5  # seconds after which an agent asks again when the store does not answer
STOP = 1.0  # seconds that requests get to end when the listener stops
DOOR_THREADS = 4

Place = tuple[str, int]  # address and port
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T")

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Listener:
    """Serves on any number of places (address, port); `start` and `stop` it once."""

    def __init__(self, door: AgentDoor, folders: Callable[[], Mapping[str, Path]]) -> None:
        """`folders` gives where the files below /files/agent/ and /files/images/ are, by `agent` and `images`."""
        self._door = door
        self._folders = folders
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="boot-listener", daemon=True)
        self._pool = ThreadPoolExecutor(DOOR_THREADS, thread_name_prefix="boot-door")
        self._sites: dict[Place, web.TCPSite] = {}
        self._held: dict[str, set[asyncio.Future[None]]] = {}
        self._woken = asyncio.Event()
        self._calls = Gathering(door, self._pool)
        self._stopping = False
        self._runner: web.AppRunner | None = None

    def start(self) -> None:
        """Begin to run; serves nowhere yet."""
        self._loop = asyncio.new_event_loop()
        self._thread.start()
        self._call(self._begin())

    def serve(self, places: Iterable[Place]) -> dict[Place, str]:
        """Serve at exactly these places from now on; gives why not, in a sentence, for each that could not be had."""
        return self._call(self._serve(set(places)))

    def stop(self) -> None:
        """Answer the held polls, end the rest within STOP seconds, close every socket."""
        if not self._thread.is_alive():
            return
        self._call(self._end())
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def wake(self) -> None:
        """Something was committed that agents may wait for; called from any thread, at no cost."""
        if not self._woken.is_set() and self._thread.is_alive():
            with suppress(RuntimeError):  # it is being stopped: nobody waits any more
                self._loop.call_soon_threadsafe(self._woken.set)

    @property
    def held(self) -> int:
        """How many polls are being held."""
        return sum(map(len, self._held.values()))

    def _call(self, work: Awaitable[T]) -> T:
        return asyncio.run_coroutine_threadsafe(_awaited(work), self._loop).result()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            self._loop.close()

    async def _begin(self) -> None:
        app = web.Application(middlewares=[_plain_errors], client_max_size=MAX_BODY)
        app.router.add_get("/boot.ipxe", self._first_script)
        app.router.add_get("/boot/{mac}", self._script)
        app.router.add_post("/agent/v1/hello", self._hello)
        app.router.add_post("/agent/v1/poll", self._poll)
        app.router.add_get("/files/{path:.*}", self._file)
        self._runner = web.AppRunner(
            app, access_log_class=_AccessLog, access_log=log, shutdown_timeout=STOP, handle_signals=False
        )
        await self._runner.setup()
        self._tasks = [asyncio.create_task(self._answer_held()), asyncio.create_task(self._calls.run())]

    async def _end(self) -> None:
        self._stopping = True
        self._release(set(self._held))
        if self._runner:
            await self._runner.cleanup()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _serve(self, places: set[Place]) -> dict[Place, str]:
        assert self._runner is not None
        for place in set(self._sites) - places:
            await self._sites.pop(place).stop()
        refused = {}
        for place in sorted(places - set(self._sites)):
            site = web.TCPSite(self._runner, *place, backlog=1024)
            try:
                await site.start()
            except OSError as error:
                refused[place] = _why_not(place, error)
            else:
                self._sites[place] = site
        return refused

    async def _ask(self, question: Callable[..., T], *arguments: object) -> T:
        return await self._loop.run_in_executor(self._pool, question, *arguments)

    async def _first_script(self, request: web.Request) -> web.Response:
        return web.Response(text=ipxe.first(_url(request)))

    async def _script(self, request: web.Request) -> web.Response:
        mac = request.match_info["mac"].lower().replace("-", ":")
        if not _MAC.fullmatch(mac):
            raise BadMessage(f"{mac[:40]!r} is no MAC address")
        expected = await self._ask(self._door.expected_boot, mac)
        log.info("%s (%s) gets %s", mac, request.remote, "the agent" if expected else "its disk")
        return web.Response(text=ipxe.render(expected, _url(request), mac))

    async def _hello(self, request: web.Request) -> web.Response:
        lines = parse(await request.read())
        return _response(await self._calls.answer(Call("hello", lines, request.remote or "")))

    async def _poll(self, request: web.Request) -> web.Response:
        lines, peer = parse(await request.read()), request.remote or ""
        if "operation" in lines:
            return _response(await self._calls.answer(Call("poll", lines, peer)))
        return _response(await self._hold(lines, peer))

    async def _hold(self, lines: Lines, peer: str) -> Reply:
        """The answer to a poll without a report: an order as soon as there is one."""
        until = self._loop.time() + HOLD
        boot = lines.get("boot", "")
        while True:
            news = self._loop.create_future()  # made before the door is asked: what happens meanwhile is not missed
            self._held.setdefault(boot, set()).add(news)
            try:
                reply = await self._calls.answer(Call("poll", lines, peer))
                if not reply.idle or self._stopping:
                    return reply
                await asyncio.wait([news], timeout=until - self._loop.time())
                if not news.done() or self._stopping:
                    return reply
            finally:
                self._forget(boot, news)

    def _forget(self, boot: str, news: asyncio.Future[None]) -> None:
        waiting = self._held.get(boot)
        if waiting is not None:
            waiting.discard(news)
            if not waiting:
                del self._held[boot]

    def _release(self, boots: Iterable[str]) -> None:
        for boot in boots:
            for news in self._held.get(boot, ()):
                if not news.done():
                    news.set_result(None)

    async def _answer_held(self) -> None:
        """The one task that passes wake-ups on to the polls that they concern."""
        while True:
            await self._woken.wait()
            await asyncio.sleep(GATHER)
            self._woken.clear()
            try:
                changed = await self._ask(self._door.changed)
            except StoreUnavailable as error:
                log.warning("%s; agents that wait are looked after later", error)
                await asyncio.sleep(1.0)
                self._woken.set()
            except Exception:
                log.exception("cannot learn which agents have work; asking again at the next change")
            else:
                self._release(str(boot) for boot in changed)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        folder, _, name = path.partition("/")
        root = self._folders().get(folder)
        if root is None or not _FILE_NAME.fullmatch(name):
            raise web.HTTPNotFound
        if not await self._ask(self._door.may_fetch, path, request.remote or ""):
            raise web.HTTPForbidden
        if not (root / name).is_file():
            log.warning("%s asked for %s, and there is no %s", request.remote, path, root / name)
            raise web.HTTPNotFound
        return web.FileResponse(root / name, headers={"Content-Type": "application/octet-stream"})


async def _awaited(work: Awaitable[T]) -> T:
    return await work


def _url(request: web.Request) -> str:
    """The listener as this machine has reached it."""
    assert request.transport is not None
    address, port = request.transport.get_extra_info("sockname")[:2]
    return f"http://{address}:{port}"


def _response(reply: Reply) -> web.Response:
    return web.Response(status=reply.status, body=render(reply.lines), content_type="text/plain", charset="utf-8")


def _refusal(status: int, error: str, **more: str) -> web.Response:
    return _response(Reply(status, {"error": error, **more}))


_SENTENCES = {
    403: "this file is not for this machine now",
    404: "there is nothing here under this name",
    405: "this is not asked for in this way",
    413: f"the message is too long; at most {MAX_BODY} bytes are allowed",
}


@web.middleware
async def _plain_errors(request: web.Request, handler: Answer) -> web.StreamResponse:
    """Every answer that is an error has a line `error=` with a sentence for the machine's console."""
    try:
        return await handler(request)
    except BadMessage as error:
        return _refusal(400, str(error))
    except StoreUnavailable as error:
        log.warning("%s %s of %s not answered: %s", request.method, request.path, request.remote, error)
        return _refusal(503, "nodepool's database does not answer now", wait=str(RETRY))
    except web.HTTPException as error:
        return _refusal(error.status, _SENTENCES.get(error.status, error.reason))
    except Exception:
        log.exception("cannot answer %s %s of %s", request.method, request.path, request.remote)
        return _refusal(500, "nodepool failed to answer; its log says more")


class _AccessLog(AbstractAccessLogger):
    """One line per answer, for who debugs."""

    @property
    def enabled(self) -> bool:
        return self.logger.isEnabledFor(logging.DEBUG)

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        self.logger.debug("%s %s %s: %d, %.3f s", request.remote, request.method, request.path, response.status, time)


def _why_not(place: Place, error: OSError) -> str:
    address, port = place
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} of {address} is in use by another program: stop it (ss -ltnp 'sport = :{port}' names it)"
            " or give the network another `port:`"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"no interface has the address {address}: give it to the network's interface (ip address add), or set"
            " `address:` of the network to the one that it has"
        )
    if error.errno == errno.EACCES:
        return f"port {port} may only be used by root: give the network a `port:` above 1023"
    return f"cannot listen on port {port} of {address}: {error.strerror or error}"

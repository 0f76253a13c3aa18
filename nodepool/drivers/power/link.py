"""The one UDP socket to all BMCs, in one asyncio loop: what was asked, how often, and whose answer just came in.

A request is repeated until it is answered, its pauses are used up, or its caller is cancelled by a deadline.  All its
repetitions wait for the same answer, so one that comes late still counts.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from nodepool.drivers.power import rmcp

T = TypeVar("T")

Endpoint = tuple[str, int]  # as the socket calls it: numeric address (an IPv4 one may be written ::ffff:...) and port

_DRAIN = 64  # datagrams taken per turn of the loop, so that timers get theirs
_BUFFER = 4 << 20  # bytes: a sweep's answers come all at once


class Silence(Exception):
    """The pauses of a request are used up and nothing came."""


class Forbidden(Exception):
    """`may_send` says no; nothing was sent."""


@dataclass(slots=True)
class Counts:
    """Datagrams so far; strays are those that nobody waited for, or that were not what they claimed to be."""

    sent: int = 0
    resent: int = 0
    received: int = 0
    strays: int = 0


@dataclass(frozen=True, slots=True)
class _Waiter:
    future: asyncio.Future[Any]
    fits: Callable[[Any], bool]


def patient() -> Iterator[float]:
    """Seconds before each repetition, without end: the caller's deadline is the end."""
    pause = 0.5
    while True:
        yield pause
        pause = min(pause * 1.6, 4.0)


class Link:
    """Sends, repeats, and hands each answer to whoever asked.  To be used in the thread of `loop` only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, may_send: Callable[[], bool]) -> None:
        self.counts = Counts()
        self._loop, self._may_send = loop, may_send
        self._waiting: dict[Hashable, _Waiter] = {}
        self._sessions: dict[bytes, tuple[Endpoint, Callable[[rmcp.Sealed], None]]] = {}
        self._socket, self._dual = _open_socket()
        loop.add_reader(self._socket.fileno(), self._readable)

    def close(self) -> None:
        """Close the socket."""
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    async def resolve(self, host: str, port: int) -> Endpoint:
        """Return how the socket calls `host`, a name or a number; raise OSError when the name is not known."""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            family = socket.AF_UNSPEC if self._dual else socket.AF_INET
            found = await self._loop.getaddrinfo(host, port, family=family, type=socket.SOCK_DGRAM)
            known = (ipaddress.ip_address(entry[4][0]) for entry in found)
            address = min(known, key=lambda one: one.version)  # many BMCs have an IPv6 address that nothing answers on
        if address.version == 4 and self._dual:
            return f"::ffff:{address}", port
        return str(address), port

    def new_id(self) -> bytes:
        """Return a session id that is not in use, not 0, and cannot be guessed."""
        while (name := os.urandom(4)) in self._sessions or name == bytes(4):
            pass
        return name

    def attach(self, session: bytes, endpoint: Endpoint, receive: Callable[[rmcp.Sealed], None]) -> None:
        """Hand packets for `session`, unverified, to `receive`, which may raise `ProtocolError`."""
        self._sessions[session] = (endpoint, receive)

    def detach(self, session: bytes) -> None:
        """Take no more packets for `session`."""
        self._sessions.pop(session, None)

    async def ask(
        self,
        endpoint: Endpoint,
        key: Hashable,
        make: Callable[[], bytes],
        pauses: Iterable[float],
        fits: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """Send what `make` returns until somebody calls `answer` with this `key`; raise `Silence` or `Forbidden`."""
        waiter = _Waiter(self._loop.create_future(), fits)
        assert key not in self._waiting, "one request at a time per BMC"
        self._waiting[key] = waiter
        try:
            for repetition, pause in enumerate(pauses):
                self.send(make(), endpoint)
                self.counts.resent += bool(repetition)
                await asyncio.wait((waiter.future,), timeout=pause)
                if waiter.future.done():
                    result: T = waiter.future.result()
                    return result
            raise Silence
        finally:
            del self._waiting[key]

    def answer(self, key: Hashable, what: object) -> None:
        """Give `what` to whoever waits for `key`; it is a late or repeated answer when nobody does."""
        waiter = self._waiting.get(key)
        if waiter and not waiter.future.done() and waiter.fits(what):
            waiter.future.set_result(what)
        else:
            self.counts.strays += 1

    def send(self, datagram: bytes, endpoint: Endpoint) -> None:
        """Send once; raise `Forbidden` when that is so now.

        An error of the network counts as a lost packet: ports of BMCs come and go when machines are switched.
        """
        if not self._may_send():
            raise Forbidden
        self.counts.sent += 1
        try:
            self._socket.sendto(datagram, endpoint)
        except OSError:
            self.counts.strays += 1

    def tell(self, datagram: bytes, endpoint: Endpoint) -> None:
        """Send once if that is allowed, and expect nothing."""
        try:
            self.send(datagram, endpoint)
        except Forbidden:
            return

    def _readable(self) -> None:
        for _ in range(_DRAIN):
            try:
                datagram, source = self._socket.recvfrom(rmcp.LARGEST + 1)
            except OSError:  # nothing left, or an ICMP error about an earlier packet
                return
            self.counts.received += 1
            try:
                self._take(datagram, source[:2])
            except rmcp.ProtocolError:
                self.counts.strays += 1

    def _take(self, datagram: bytes, source: Endpoint) -> None:
        packet = rmcp.parse(datagram)
        if isinstance(packet, rmcp.Hello):
            self.answer((source, packet.kind), packet)
            return
        endpoint, receive = self._sessions.get(packet.session, (None, None))
        if receive is None or endpoint != source:
            raise rmcp.ProtocolError("a packet for no session of ours")
        receive(packet)


def _open_socket() -> tuple[socket.socket, bool]:
    """Return the socket and whether it speaks IPv6 besides IPv4 (a kernel may have none)."""
    try:
        opened, dual = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM), True
    except OSError:
        opened, dual = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), False
    if dual:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    opened.setblocking(False)
    opened.bind(("", 0))
    return opened, dual

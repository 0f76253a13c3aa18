"""An IPMI 2.0 BMC over RMCP+: many of them in one asyncio loop, sharing nothing but the loop.

`Bmc.receive` turns one datagram into at most one answer; `serve` puts BMCs on UDP sockets; `running` does so in a
thread, for tests and benches that are not asyncio themselves.  Faults can be changed while a BMC runs.  Whatever is
malformed is ignored, as section 13 of the specification wants it.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast
from uuid import UUID, uuid4

from nodepool.rack import RackError, chassis, wire
from nodepool.rack.chassis import Chassis, Machine, MemoryMachine
from nodepool.rack.faults import NO_FAULTS, Faults
from nodepool.rack.session import OPERATOR, Session, Sessions, User, cipher_suites

__all__ = ["Bmc", "Endpoint", "Faults", "MemoryMachine", "Server", "User", "running", "serve"]

RETRY_SECONDS = 5.0  # within this a repeated chassis control is a retry: same answer, no second action

Address = tuple[str, int]
Send = Callable[[bytes], None]

_LOGIN_STAGES = {wire.PAYLOAD_OPEN: "open", wire.PAYLOAD_RAKP1: "rakp1", wire.PAYLOAD_RAKP3: "rakp3"}


@dataclass
class Bmc:
    """One BMC.  `users` maps names to accounts; `slots` and `idle_seconds` bound its sessions."""

    machine: Machine
    users: Mapping[str, User]
    uuid: UUID = field(default_factory=uuid4)
    kg: bytes = b""
    slots: int = 16
    idle_seconds: float = 60.0
    faults: Faults = NO_FAULTS
    now: Callable[[], float] = time.monotonic
    received: Counter[str] = field(default_factory=Counter)  # open, rakp1, rakp3, and the names of commands
    actions: deque[str] = field(default_factory=lambda: deque(maxlen=1000))  # carried out, oldest first

    def __post_init__(self) -> None:
        self.chassis = Chassis(self.machine, self.uuid, self.now)
        self.sessions = Sessions(
            self.users, chassis.wire_guid(self.uuid), self.now, self.kg, self.slots, self.idle_seconds
        )
        self._power = asyncio.Lock()
        self._controls: dict[bytes, _Control] = {}  # the last one of each session
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def open_sessions(self) -> int:
        """Slots in use, logins that are under way included."""
        self.sessions.expire()
        return len(self.sessions.table)

    def forget_sessions(self) -> None:
        """What a BMC does when it reboots."""
        self.sessions.table.clear()
        self._controls.clear()

    def receive(self, datagram: bytes, send: Send) -> None:
        """Handle one datagram; answers go through `send`, at once or when the machine has done its part."""
        if self.faults.silent == "all":
            return
        try:
            self._receive(datagram, send)
        except wire.Malformed:
            self.received["malformed"] += 1

    async def close(self) -> None:
        """Wait until nothing is under way any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _receive(self, datagram: bytes, send: Send) -> None:
        pong = wire.pong(datagram)
        if pong is not None:
            send(pong)
            return
        packet = wire.parse_packet(datagram)
        if packet.payload_type in _LOGIN_STAGES:
            answer = self._login(packet)
            if answer is not None:
                send(wire.sessionless(packet, answer))
        elif packet.payload_type != wire.PAYLOAD_IPMI:
            raise wire.Malformed("no such payload type")
        elif packet.session == bytes(4):
            message = wire.parse_message(packet.payload)
            send(wire.sessionless(packet, message.answer(*self._without_session(message))))
        else:
            session = self.sessions.find(packet.session)
            clear = wire.open_payload(_keys(session), packet, datagram)
            if not session.fresh(packet.sequence):
                raise wire.Malformed("replayed")
            session.touched = self.now()
            self._in_session(session, wire.parse_message(clear), send)

    def _login(self, packet: wire.Packet) -> bytes | None:
        stage = _LOGIN_STAGES[packet.payload_type]
        self.received[stage] += 1
        if self.faults.silent == stage:
            return None
        if stage == "open":
            answer: bytes | None = self.sessions.open(packet.payload, self.faults.suites, self.faults.full)
        elif stage == "rakp1":
            answer = self.sessions.rakp1(packet.payload)
        else:
            answer = self.sessions.rakp3(packet.payload)
        if answer and answer[1] and self.faults.tag0:
            return b"\x00" + answer[1:2] + bytes(38)  # as OpenBMC answers a failed login
        if answer and stage == "rakp1" and not answer[1] and self.faults.zero_code:
            return answer[:40] + bytes(len(answer) - 40)
        return answer

    def _without_session(self, message: wire.Message) -> tuple[int, bytes]:
        """The few commands that need no session; None of them changes anything."""
        place = (message.netfn, message.command)
        if place == chassis.AUTH_CAPABILITIES:
            return self.sessions.capabilities(message.data)
        if place == chassis.CIPHER_SUITES:
            return cipher_suites(self.faults.suites, message.data)
        if place == chassis.SYSTEM_GUID:
            return self.chassis.guid(message.data)
        return chassis.PRIVILEGE, b""

    def _in_session(self, session: Session, message: wire.Message, send: Send) -> None:
        place = (message.netfn, message.command)
        name = _name(place)
        self.received[name] += 1
        silent = self.faults.silent
        if (silent == "setpriv" and name == "set-privilege") or (silent == "cmd" and name != "set-privilege"):
            return

        def answer(code: int, data: bytes = b"") -> None:
            if self.faults.silent != "answer" or name == "set-privilege":
                session.sent += 1
                text = message.answer(code, data)
                send(wire.seal_payload(_keys(session), session.console, session.sent, text))

        if name in self.faults.refuse:
            answer(self.faults.refuse[name])
        elif place == chassis.CONTROL:
            self._control(session, message, answer)
        else:
            answer(*self._command(session, message, place))

    def _command(self, session: Session, message: wire.Message, place: tuple[int, int]) -> tuple[int, bytes]:
        if place == chassis.SET_PRIVILEGE:
            return session.set_privilege(message.data)
        if place == chassis.CLOSE_SESSION:
            return self.sessions.close(message.data)
        if place not in chassis.COMMANDS:
            code, data = self._without_session(message)
            return (chassis.INVALID_COMMAND, b"") if code == chassis.PRIVILEGE else (code, data)
        _, privilege, handler = chassis.COMMANDS[place]
        if session.privilege < privilege:
            return chassis.PRIVILEGE, b""
        return handler(self.chassis, message.data)

    def _control(self, session: Session, message: wire.Message, answer: Callable[[int], None]) -> None:
        """Chassis control: one at a time; a retry of the last one gets its answer and is not carried out again."""
        if session.privilege < OPERATOR:
            answer(chassis.PRIVILEGE)
            return
        if not message.data or message.data[0] & 0x0F >= len(chassis.ACTIONS):
            answer(chassis.INVALID_FIELD if message.data else chassis.REQUEST_TOO_SHORT)
            return
        last = self._controls.get(session.managed)
        if last and last.message == message and self.now() - last.at < RETRY_SECONDS:
            if last.code is not None:
                answer(last.code)
            return
        control = _Control(message, self.now())
        self._controls = {key: value for key, value in self._controls.items() if key in self.sessions.table}
        self._controls[session.managed] = control
        task = asyncio.get_running_loop().create_task(self._carry_out(control, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, control: _Control, answer: Callable[[int], None]) -> None:
        action = control.message.data[0] & 0x0F
        async with self._power:
            if not self.faults.stuck:
                control.code = await self.chassis.control(action, self.faults.lag)
            else:
                control.code = chassis.OK
        if control.code == chassis.OK:
            self.actions.append(chassis.ACTIONS[action])
        answer(control.code)


@dataclass(slots=True)
class _Control:
    """A chassis control, and how it ended once it has."""

    message: wire.Message
    at: float
    code: int | None = None


def _keys(session: Session) -> wire.Keys:
    if session.keys is None:
        raise wire.Malformed("no such session")
    return session.keys


def _name(place: tuple[int, int]) -> str:
    """What faults and counters call a command."""
    if place in chassis.COMMANDS:
        return chassis.COMMANDS[place][0]
    special = {chassis.CONTROL: "control", chassis.SET_PRIVILEGE: "set-privilege", chassis.CLOSE_SESSION: "close"}
    return special.get(place, "other")


class _Protocol(asyncio.DatagramProtocol):
    """One BMC on one UDP socket."""

    def __init__(self, bmc: Bmc) -> None:
        self.bmc = bmc
        self.transport: asyncio.DatagramTransport | None = None
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's."""
        self.transport = cast(asyncio.DatagramTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's."""
        self.transport = None
        self.closed.set_result(exc)

    def datagram_received(self, data: bytes, addr: Address) -> None:
        """Asyncio's."""
        self.bmc.receive(data, lambda answer: self._send(answer, addr))

    def _send(self, answer: bytes, address: Address) -> None:
        faults = self.bmc.faults
        if faults.drop and random.random() < faults.drop:
            return
        for _ in range(1 + (random.random() < faults.duplicate)):
            if faults.delay:
                asyncio.get_running_loop().call_later(faults.delay, self._send_now, answer, address)
            else:
                self._send_now(answer, address)

    def _send_now(self, answer: bytes, address: Address) -> None:
        if self.transport:
            self.transport.sendto(answer, address)


class Server:
    """BMCs that answer on their sockets; `addresses` are their (host, port), in the order given."""

    def __init__(self, protocols: list[_Protocol]) -> None:
        self._protocols = protocols
        self.addresses: list[Address] = [
            protocol.transport.get_extra_info("sockname")[:2] for protocol in protocols if protocol.transport
        ]

    async def close(self) -> None:
        """Let power actions that are under way end, then close the sockets."""
        for protocol in self._protocols:
            await protocol.bmc.close()
            if protocol.transport:
                protocol.transport.close()
            await protocol.closed


async def serve(places: Iterable[tuple[Bmc, str, int]]) -> Server:
    """Put each BMC on its (host, port) over UDP; port 0 takes a free one.  RackError when a port is in use."""
    loop = asyncio.get_running_loop()
    protocols: list[_Protocol] = []
    for bmc, host, port in places:
        protocol = _Protocol(bmc)
        try:
            await loop.create_datagram_endpoint(lambda protocol=protocol: protocol, local_addr=(host, port))  # type: ignore[misc]
        except OSError as error:
            await Server(protocols).close()
            raise RackError(
                f"a BMC cannot listen on UDP {host}:{port} ({error.strerror}): stop what listens there"
            ) from error
        protocols.append(protocol)
    return Server(protocols)


@dataclass(frozen=True)
class Endpoint:
    """A BMC of `running`: where it listens, and the handle to watch and to break it (`endpoint.bmc.faults = ...`)."""

    host: str
    port: int
    bmc: Bmc
    machine: MemoryMachine


ADMIN = {"admin": User("admin")}


@contextmanager
def running(
    count: int = 1,
    users: Mapping[str, User] = ADMIN,
    faults: Faults = NO_FAULTS,
    port: int = 0,
    slots: int = 16,
) -> Iterator[list[Endpoint]]:
    """`count` BMCs with machines in memory, in a thread of their own, on 127.0.0.11 and up; gone at the end.

    Port 0 takes free ports; any other is the same port on each address.
    """
    bmcs = [Bmc(MemoryMachine(), users, faults=faults, slots=slots) for _ in range(count)]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="rack-bmcs", daemon=True)
    thread.start()
    try:
        hosts = (f"127.0.{number // 250}.{number % 250}" for number in range(11, 11 + count))
        places = [(bmc, host, port) for bmc, host in zip(bmcs, hosts, strict=True)]
        server = asyncio.run_coroutine_threadsafe(serve(places), loop).result(30)
        try:
            yield [
                Endpoint(host, number, bmc, bmc.machine)
                for (host, number), bmc in zip(server.addresses, bmcs, strict=True)
                if isinstance(bmc.machine, MemoryMachine)
            ]
        finally:
            asyncio.run_coroutine_threadsafe(server.close(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

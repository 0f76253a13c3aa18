"""The sessions of one BMC: open, RAKP 1 to 4, slots, expiry, replay window.

No I/O: each function takes a payload and gives the answering payload.  Source: IPMI 2.0 specification, sections 13.17
to 13.24 and 6.12.13 (sequence numbers).
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nodepool.rack.wire import SUITES, Keys, Malformed, Suite

USER, OPERATOR, ADMINISTRATOR = 2, 3, 4  # privilege levels

# RMCP+ status codes, table 13-15.
OK, NO_RESOURCES, INVALID_SESSION, INVALID_ROLE = 0x00, 0x01, 0x02, 0x09
UNAUTHORISED_NAME, INVALID_INTEGRITY, NO_SUITE = 0x0D, 0x0F, 0x11

TOO_SHORT = 0xC7  # completion code, table 5-2

LOGIN_SECONDS = 5.0  # a login that stops half way holds its slot for this long
WINDOW = 32


@dataclass(frozen=True, slots=True)
class User:
    """An account of a BMC: its password (up to 20 bytes) and its highest privilege (2 user, 3 operator, 4 admin)."""

    password: str = field(repr=False)
    role: int = ADMINISTRATOR


@dataclass(slots=True)
class Session:
    """One console's session, from its open request on."""

    console: bytes  # the id that the console chose
    managed: bytes  # the id that we chose
    suite: Suite
    touched: float
    console_random: bytes = b""
    bmc_random: bytes = b""
    role_byte: int = 0
    username: bytes = b""
    password: bytes = b""
    limit: int = ADMINISTRATOR
    sik: bytes = b""
    keys: Keys | None = None
    privilege: int = USER
    sent: int = 0
    highest: int = 0
    seen: int = 0  # bit n: sequence number highest - n was received

    @property
    def role_and_name(self) -> bytes:
        """The tail that all RAKP codes have in common."""
        return bytes((self.role_byte, len(self.username))) + self.username

    def set_privilege(self, data: bytes) -> tuple[int, bytes]:
        """Set Session Privilege Level (22.18): completion code and data; 0 asks for the present one."""
        if not data:
            return TOO_SHORT, b""
        wanted = data[0] & 0x0F
        if wanted > self.limit or wanted == 1:
            return 0x81, b""  # above the limit of the user or of the session
        self.privilege = wanted or self.privilege
        return OK, bytes((self.privilege,))

    def fresh(self, sequence: int) -> bool:
        """Whether `sequence` was not received before; remembers it.  Numbers far behind count as received."""
        if sequence > self.highest:
            self.seen = (self.seen << min(WINDOW, sequence - self.highest) | 1) & (1 << WINDOW) - 1
            self.highest = sequence
            return True
        behind = self.highest - sequence
        if behind >= WINDOW or self.seen >> behind & 1:
            return False
        self.seen |= 1 << behind
        return True


@dataclass
class Sessions:
    """The session table of one BMC."""

    users: Mapping[str, User]
    guid: bytes  # 16 bytes as on the wire
    now: Callable[[], float]
    kg: bytes = b""  # the BMC key; empty: the user's password serves
    slots: int = 16
    idle_seconds: float = 60.0
    table: dict[bytes, Session] = field(default_factory=dict)

    def find(self, managed: bytes) -> Session:
        """The activated session with our id `managed`; Malformed when there is none (any more)."""
        self.expire()
        session = self.table.get(managed)
        if session is None or session.keys is None:
            raise Malformed("no such session")
        return session

    def expire(self) -> None:
        """Free the slots of sessions that were silent for too long."""
        now = self.now()
        for session in list(self.table.values()):
            if now - session.touched > (self.idle_seconds if session.keys else LOGIN_SECONDS):
                self.table.pop(session.managed, None)

    def close(self, data: bytes) -> tuple[int, bytes]:
        """Close Session (22.19): completion code and data."""
        if self.table.pop(data[:4], None) is None:
            return 0x87, b""  # no such session
        return OK, b""

    def capabilities(self, data: bytes) -> tuple[int, bytes]:
        """Get Channel Authentication Capabilities (22.13): RMCP+ alone, user names needed, K_g when there is one."""
        if len(data) < 2:
            return TOO_SHORT, b""
        extended = data[0] & 0x80
        status = 0x04 | (0x20 if self.kg else 0)
        return OK, bytes((1, 0x80 if extended else 0, status, 0x02 if extended else 0, 0, 0, 0, 0))

    def open(self, payload: bytes, suites: tuple[int, ...], full: bool) -> bytes:
        """Answer an open-session request; `full` pretends that no slot is free."""
        if len(payload) < 32:
            raise Malformed("short open-session request")
        tag, console = payload[:1], payload[4:8]
        wanted = (payload[12], payload[20], payload[28])
        suite = next((SUITES[number] for number in suites if SUITES[number].algorithms == wanted), None)
        if suite is None:
            return _failure(tag, NO_SUITE, console)
        self.expire()
        if full or len(self.table) >= self.slots:
            return _failure(tag, NO_RESOURCES, console)
        managed = os.urandom(4)
        self.table[managed] = Session(console, managed, suite, self.now())
        return tag + bytes((OK, payload[1] & 0x0F or ADMINISTRATOR, 0)) + console + managed + payload[8:32]

    def rakp1(self, payload: bytes) -> bytes:
        """Answer RAKP message 1 with message 2: who the console says it is, and our proof."""
        if len(payload) < 28 or len(payload) < 28 + payload[27]:
            raise Malformed("short RAKP message 1")
        tag, session = payload[:1], self.table.get(payload[4:8])
        if session is None or session.keys:
            return _failure(tag, INVALID_SESSION, bytes(4))
        asked = (payload[8:24], payload[24], payload[28 : 28 + payload[27]])
        if asked != (session.console_random, session.role_byte, session.username):
            session.console_random, session.role_byte, session.username = asked
            session.bmc_random = os.urandom(16)  # a repeated question keeps its answer
        user = self.users.get(session.username.decode("latin-1"))
        if user is None:
            return self._end(session, tag, UNAUTHORISED_NAME)
        if session.role_byte & 0x0F > user.role:
            return self._end(session, tag, INVALID_ROLE)
        session.password = user.password.encode()
        session.limit = min(user.role, session.role_byte & 0x0F or ADMINISTRATOR)
        session.sik = session.suite.hmac(
            self.kg or session.password, session.console_random + session.bmc_random + session.role_and_name
        )
        proof = session.suite.hmac(
            session.password,
            session.console
            + session.managed
            + session.console_random
            + session.bmc_random
            + self.guid
            + session.role_and_name,
        )
        return tag + bytes((OK, 0, 0)) + session.console + session.bmc_random + self.guid + proof

    def rakp3(self, payload: bytes) -> bytes | None:
        """Answer RAKP message 3 with message 4: the console's proof opens the session."""
        if len(payload) < 8:
            raise Malformed("short RAKP message 3")
        tag, session = payload[:1], self.table.get(payload[4:8])
        if session is None or not session.bmc_random:
            return _failure(tag, INVALID_SESSION, bytes(4))
        if payload[1]:  # the console gives up; nothing is answered
            del self.table[session.managed]
            return None
        proof = session.suite.hmac(session.password, session.bmc_random + session.console + session.role_and_name)
        if not hmac.compare_digest(proof, payload[8:]):
            return self._end(session, tag, INVALID_INTEGRITY)
        session.keys = session.keys or Keys.derive(session.suite, session.sik)
        session.touched = self.now()
        ours = session.suite.hmac(session.sik, session.console_random + session.managed + self.guid)
        return tag + bytes((OK, 0, 0)) + session.console + ours[: session.suite.code_bytes]

    def _end(self, session: Session, tag: bytes, status: int) -> bytes:
        del self.table[session.managed]
        return _failure(tag, status, session.console)


def cipher_suites(numbers: tuple[int, ...], data: bytes) -> tuple[int, bytes]:
    """Get Channel Cipher Suites (22.15): standard suite records, 16 bytes of the list per index."""
    records = b""
    for number in numbers:
        authentication, integrity, confidentiality = SUITES[number].algorithms
        records += bytes((0xC0, number, authentication, 0x40 | integrity, 0x80 | confidentiality))
    start = 16 * (data[2] & 0x3F) if len(data) > 2 else 0
    return OK, b"\x01" + records[start : start + 16]


def _failure(tag: bytes, status: int, console: bytes) -> bytes:
    return tag + bytes((status, 0, 0)) + console

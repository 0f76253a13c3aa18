"""RMCP+ packets (IPMI 2.0, chapter 13), made and taken apart without any I/O.

What comes in was sent by anybody: `parse`, `unseal` and `parse_answer` raise `ProtocolError` for whatever they do not
like and nothing else.  The exchange that makes a session out of a password is in `rakp`; who waits for which packet is
`link`'s business.
"""

from __future__ import annotations

import hmac
import os
import struct
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

HEADER = b"\x06\x00\xff\x07"  # RMCP 1.0, no RMCP acknowledgement, class IPMI (13.1.3)
FORMAT = 0x06  # "authentication type" of every RMCP+ packet (13.6)
MESSAGE, CONSOLE = 0x00, 0x01  # payload types inside a session: IPMI messages, serial over LAN
OPEN_REQUEST, OPEN_ANSWER = 0x10, 0x11
RAKP1, RAKP2, RAKP3, RAKP4 = 0x12, 0x13, 0x14, 0x15
LARGEST = 2048  # bytes of a datagram that we look at; a session's payloads are far smaller

_ENCRYPTED, _AUTHENTICATED = 0x80, 0x40
_LEAST = {OPEN_ANSWER: 36, RAKP2: 40, RAKP4: 8}  # bytes of a hello that reports success (13.18, 13.21, 13.23)
_BLOCK = 16


class ProtocolError(Exception):
    """This is not a packet that we can use."""


@dataclass(frozen=True, slots=True)
class CipherSuite:
    """A row of table 22-20: the numbers of its algorithms, and what they come to here.

    All suites that we speak encrypt by AES-CBC-128; `hash` makes authentication and integrity alike, the latter cut to
    `icv` bytes.
    """

    number: int
    algorithms: tuple[int, int, int]  # authentication, integrity, confidentiality
    hash: str
    size: int  # bytes of the whole hash
    icv: int  # bytes of it that are sent as integrity check value

    def hmac(self, key: bytes, data: bytes) -> bytes:
        """The suite's keyed hash over `data`."""
        return hmac.digest(key, data, self.hash)


SUITES = {3: CipherSuite(3, (1, 1, 1), "sha1", 20, 12), 17: CipherSuite(17, (3, 4, 1), "sha256", 32, 16)}


@dataclass(frozen=True, slots=True)
class Keys:
    """What the two ends of a session share: K1 signs, the first 16 bytes of K2 encrypt (13.31, 13.32)."""

    suite: CipherSuite
    sign: bytes = field(repr=False)
    encrypt: algorithms.AES = field(repr=False)


@dataclass(frozen=True, slots=True)
class Hello:
    """An answer of the login; `session` is the id that we proposed, or zeros, as some BMCs answer errors."""

    kind: int  # OPEN_ANSWER, RAKP2 or RAKP4
    tag: int
    status: int  # of RMCP+ (table 13-15); 0 is success, and then `body` is long enough for its kind
    session: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class Sealed:
    """A packet of a session, not verified yet."""

    kind: int
    session: bytes
    sequence: int
    flags: int
    payload: bytes
    datagram: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """A response message (13.8): `function` is the request's network function, `completion` 0 for success."""

    function: int
    command: int
    sequence: int
    completion: int
    data: bytes


def parse(datagram: bytes) -> Hello | Sealed:
    """Take a datagram apart as far as that goes without keys; raise `ProtocolError`."""
    if len(datagram) < 16 or len(datagram) > LARGEST:
        raise ProtocolError(f"{len(datagram)} bytes are no RMCP+ packet")
    if datagram[0] != HEADER[0] or datagram[3] != HEADER[3] or datagram[4] != FORMAT:
        raise ProtocolError("not an RMCP+ packet of class IPMI")
    kind, size = datagram[5] & 0x3F, int.from_bytes(datagram[14:16], "little")
    payload = datagram[16 : 16 + size]
    if len(payload) != size:
        raise ProtocolError("the packet ends before its payload does")
    if kind in _LEAST:
        return _hello(kind, payload)
    if kind not in (MESSAGE, CONSOLE):
        raise ProtocolError(f"payload type {kind:#04x} is none of ours")
    return Sealed(kind, datagram[6:10], int.from_bytes(datagram[10:14], "little"), datagram[5], payload, datagram)


def _hello(kind: int, body: bytes) -> Hello:
    if len(body) < 2 or (body[1] == 0 and len(body) < _LEAST[kind]):
        raise ProtocolError("an answer of the login is too short")
    return Hello(kind, tag=body[0], status=body[1], session=body[4:8].ljust(4, b"\0"), body=body)


def hello(kind: int, body: bytes) -> bytes:
    """Make a datagram of the login: outside any session, so ids and sequence number are 0."""
    return HEADER + bytes((FORMAT, kind)) + bytes(8) + struct.pack("<H", len(body)) + body


def seal(keys: Keys, session: bytes, sequence: int, payload: bytes, kind: int = MESSAGE) -> bytes:
    """Make a datagram of a session: `payload` encrypted, all of it signed (13.6, 13.28.4, 13.29)."""
    iv = os.urandom(_BLOCK)
    pad = -(len(payload) + 1) % _BLOCK
    plain = payload + bytes(range(1, pad + 1)) + bytes((pad,))
    encryptor = Cipher(keys.encrypt, modes.CBC(iv)).encryptor()
    secret = iv + encryptor.update(plain) + encryptor.finalize()
    head = bytes((FORMAT, _ENCRYPTED | _AUTHENTICATED | kind)) + session
    signed = head + struct.pack("<IH", sequence, len(secret)) + secret
    pad = -(len(signed) + 2) % 4  # the signed part ends on four bytes; then pad length and "next header" 7
    signed += b"\xff" * pad + bytes((pad, HEADER[3]))
    return HEADER + signed + keys.suite.hmac(keys.sign, signed)[: keys.suite.icv]


def unseal(keys: Keys, packet: Sealed) -> bytes:
    """Return the payload of a packet of a session when its signature is right; raise `ProtocolError` otherwise."""
    size = keys.suite.icv
    signed, code = packet.datagram[4:-size], packet.datagram[-size:]
    if not packet.flags & _AUTHENTICATED or len(signed) < 12 + len(packet.payload) + 2:
        raise ProtocolError("a packet of the session is not signed")
    if not hmac.compare_digest(keys.suite.hmac(keys.sign, signed)[:size], code):
        raise ProtocolError("the signature is wrong")
    if not packet.flags & _ENCRYPTED:
        return packet.payload
    iv, secret = packet.payload[:_BLOCK], packet.payload[_BLOCK:]
    if not secret or len(secret) % _BLOCK:
        raise ProtocolError("the encrypted payload is not in whole blocks")
    decryptor = Cipher(keys.encrypt, modes.CBC(iv)).decryptor()
    plain = decryptor.update(secret) + decryptor.finalize()
    end = len(plain) - 1 - plain[-1]
    if end < 0:
        raise ProtocolError("the padding is longer than the payload")
    return plain[:end]


def request(function: int, command: int, data: bytes, sequence: int) -> bytes:
    """Make a request message from remote console (0x81) to BMC (0x20), LUN 0; `sequence` has 6 bits (13.8)."""
    head = bytes((0x20, function << 2))
    body = bytes((0x81, sequence << 2, command)) + data
    return head + bytes((_checksum(head),)) + body + bytes((_checksum(body),))


def parse_answer(payload: bytes) -> Answer:
    """Take a response message apart; raise `ProtocolError`.

    Its two checksums are not looked at: the packet's signature says more, and there are BMCs that get them wrong.
    """
    if len(payload) < 8 or not payload[1] & 0x04:
        raise ProtocolError("not a response message")
    return Answer((payload[1] >> 2) & 0x3E, payload[5], payload[4] >> 2, payload[6], payload[7:-1])


class ReplayWindow:
    """Tells sequence numbers that are new from those seen or too old: 32 wide, as in IPMI 2.0, 6.12.13."""

    def __init__(self) -> None:
        self._highest = 0
        self._seen = 0  # bit N: highest - N was seen

    def accept(self, sequence: int) -> bool:
        """Whether to take the packet with this number; ask only after its signature was found right."""
        if sequence == 0:  # "no sequence number": some BMCs never count
            return True
        ahead = sequence - self._highest
        if ahead > 0:
            self._seen = ((self._seen << ahead) | 1) & 0xFFFFFFFF if ahead < 32 else 1
            self._highest = sequence
            return True
        if ahead <= -32 or self._seen >> -ahead & 1:
            return False
        self._seen |= 1 << -ahead
        return True


def _checksum(data: bytes) -> int:
    return -sum(data) & 0xFF

"""Bytes of RMCP+ as a BMC sees them: packets, messages, keys.  No I/O, no state.

Source: IPMI 2.0 specification, sections 13.6 (RMCP+ packet), 13.8 (IPMI message), 13.17 to 13.32 (RAKP and the cipher
suites).  Whatever does not parse raises `Malformed`, which a BMC answers with silence.
"""

from __future__ import annotations

import hmac
import os
import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

RMCP_IPMI = b"\x06\x00\xff\x07"  # version 1.0, no RMCP acknowledge, class IPMI
RMCP_ASF = b"\x06\x00\xff\x06"
AUTH_NONE, AUTH_RMCPP = 0x00, 0x06

PAYLOAD_IPMI = 0x00
PAYLOAD_OPEN, PAYLOAD_RAKP1, PAYLOAD_RAKP3 = 0x10, 0x12, 0x14  # the answer's type is one more

BLOCK = 16


class Malformed(ValueError):
    """A datagram that no BMC would answer."""


@dataclass(frozen=True, slots=True)
class Suite:
    """A cipher suite: the three algorithm numbers of its open-session proposal, its hash, its authentication code."""

    number: int
    algorithms: tuple[int, int, int]  # authentication, integrity, confidentiality
    digest: str
    code_bytes: int

    def hmac(self, key: bytes, data: bytes) -> bytes:
        """The suite's keyed hash in full length."""
        return hmac.digest(key, data, self.digest)


SUITES = {3: Suite(3, (1, 1, 1), "sha1", 12), 17: Suite(17, (3, 4, 1), "sha256", 16)}


@dataclass(frozen=True, slots=True)
class Keys:
    """What protects one session's packets."""

    suite: Suite
    integrity: bytes  # K1
    aes: bytes  # first 16 bytes of K2

    @classmethod
    def derive(cls, suite: Suite, sik: bytes) -> Keys:
        """K1 and K2 out of the session integrity key (section 13.32)."""
        return cls(suite, suite.hmac(sik, b"\x01" * 20), suite.hmac(sik, b"\x02" * 20)[:16])


@dataclass(frozen=True, slots=True)
class Packet:
    """One datagram, its wrapper taken off; the payload is still encrypted when `encrypted`."""

    rmcpp: bool
    payload_type: int
    authenticated: bool
    encrypted: bool
    session: bytes  # 4 bytes; zeros outside a session
    sequence: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Message:
    """One IPMI request."""

    responder: int
    responder_lun: int
    requester: int
    requester_lun: int
    sequence: int
    netfn: int
    command: int
    data: bytes

    def answer(self, code: int, data: bytes = b"") -> bytes:
        """The response message: completion code, then data."""
        head = bytes((self.requester, (self.netfn | 1) << 2 | self.requester_lun))
        tail = bytes((self.responder, self.sequence << 2 | self.responder_lun, self.command, code)) + data
        return head + bytes((checksum(head),)) + tail + bytes((checksum(tail),))


def checksum(data: bytes) -> int:
    """The two's complement sum of section 13.8."""
    return -sum(data) & 0xFF


def parse_packet(datagram: bytes) -> Packet:
    """Take the RMCP and session wrappers off."""
    if len(datagram) < 14 or datagram[:4] != RMCP_IPMI:
        raise Malformed("not IPMI over RMCP")
    if datagram[4] == AUTH_NONE:
        size = datagram[13]
        if len(datagram) < 14 + size:
            raise Malformed("shorter than it says")
        sequence = int.from_bytes(datagram[5:9], "little")
        return Packet(False, PAYLOAD_IPMI, False, False, datagram[9:13], sequence, datagram[14 : 14 + size])
    if datagram[4] != AUTH_RMCPP or len(datagram) < 16:
        raise Malformed("neither session-less nor RMCP+")
    kind, session, sequence, size = struct.unpack_from("<B4sIH", datagram, 5)
    if len(datagram) < 16 + size:
        raise Malformed("shorter than it says")
    payload = datagram[16 : 16 + size]
    return Packet(True, kind & 0x3F, bool(kind & 0x40), bool(kind & 0x80), session, sequence, payload)


def parse_message(payload: bytes) -> Message:
    """An IPMI request out of a clear payload; both checksums must be right."""
    if len(payload) < 7 or checksum(payload[:2]) != payload[2] or checksum(payload[3:-1]) != payload[-1]:
        raise Malformed("no IPMI message")
    return Message(
        responder=payload[0],
        responder_lun=payload[1] & 3,
        requester=payload[3],
        requester_lun=payload[4] & 3,
        sequence=payload[4] >> 2,
        netfn=payload[1] >> 2,
        command=payload[5],
        data=payload[6:-1],
    )


def sessionless(packet: Packet, payload: bytes) -> bytes:
    """Wrap an answer to `packet`, which came outside a session, the way the question was wrapped."""
    if packet.rmcpp:
        kind = packet.payload_type + (1 if packet.payload_type else 0)
        return RMCP_IPMI + struct.pack("<BB4sIH", AUTH_RMCPP, kind, bytes(4), 0, len(payload)) + payload
    return RMCP_IPMI + bytes((AUTH_NONE,)) + bytes(8) + bytes((len(payload),)) + payload


def open_payload(keys: Keys, packet: Packet, datagram: bytes) -> bytes:
    """The clear payload of a packet of a session whose keys are `keys`; its authentication code is checked first."""
    size = keys.suite.code_bytes
    if not packet.authenticated or len(datagram) < 16 + len(packet.payload) + 2 + size:
        raise Malformed("not authenticated")
    code = keys.suite.hmac(keys.integrity, datagram[4:-size])[:size]
    if not hmac.compare_digest(code, datagram[-size:]):
        raise Malformed("wrong authentication code")
    if not packet.encrypted:
        return packet.payload
    if len(packet.payload) < 2 * BLOCK or len(packet.payload) % BLOCK:
        raise Malformed("not whole AES blocks")
    decryptor = Cipher(algorithms.AES(keys.aes), modes.CBC(packet.payload[:BLOCK])).decryptor()
    clear = decryptor.update(packet.payload[BLOCK:]) + decryptor.finalize()
    if clear[-1] >= BLOCK:
        raise Malformed("wrong padding")
    return clear[: -1 - clear[-1]]


def seal_payload(keys: Keys, session: bytes, sequence: int, payload: bytes) -> bytes:
    """Encrypt, wrap and sign an IPMI payload for the console's session id `session` (4 bytes)."""
    vector, pad = os.urandom(BLOCK), -(len(payload) + 1) % BLOCK
    padded = payload + bytes(range(1, pad + 1)) + bytes((pad,))
    encryptor = Cipher(algorithms.AES(keys.aes), modes.CBC(vector)).encryptor()
    body = vector + encryptor.update(padded) + encryptor.finalize()
    signed = struct.pack("<BB4sIH", AUTH_RMCPP, 0xC0 | PAYLOAD_IPMI, session, sequence, len(body)) + body
    pad = -(len(signed) + 2) % 4
    signed += b"\xff" * pad + bytes((pad, 0x07))  # integrity pad, its length, the reserved "next header"
    return RMCP_IPMI + signed + keys.suite.hmac(keys.integrity, signed)[: keys.suite.code_bytes]


def pong(datagram: bytes) -> bytes | None:
    """The answer to an ASF presence ping (section 13.2.3), or None when `datagram` is none."""
    if len(datagram) < 12 or datagram[:2] + datagram[3:4] != b"\x06\x00\x06" or datagram[8] != 0x80:
        return None
    enterprise = b"\x00\x00\x11\xbe"
    # type 40h, the ping's tag, 16 bytes: enterprise, OEM, "IPMI supported, ASF 1.0", no interactions, reserved
    return (
        RMCP_ASF + enterprise + b"\x40" + datagram[9:10] + b"\x00\x10" + enterprise + bytes(4) + b"\x81\x00" + bytes(6)
    )

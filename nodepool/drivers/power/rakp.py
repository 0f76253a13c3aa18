"""The login of RMCP+ (IPMI 2.0, 13.15 to 13.24), without any I/O: Open Session, then RAKP messages 1 to 4.

`Handshake` makes what is sent and judges what comes back.  Password and user are checked by both ends without either
being sent; whoever fails it says so by a status, and so does this end, in a `LoginRefused`.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers import algorithms

from nodepool.drivers.power import rmcp

OPERATOR, ADMINISTRATOR = 3, 4
PRIVILEGES = {OPERATOR: "operator", ADMINISTRATOR: "administrator"}

# Statuses of RMCP+ (table 13-15) by what can be done about them.
WRONG_CODE = 0x0F
NO_SUITE = 0x11
FULL = frozenset((0x01, 0x0B))  # no resources for a session
GONE = frozenset((0x02, 0x08))  # the BMC has forgotten the session that it has just opened: begin again
OTHER_SUITE = frozenset((0x04, 0x05, 0x06, 0x07, 0x10, NO_SUITE))
OTHER_ROLE = frozenset((0x09, 0x0A, 0x0D))  # 0x0d, unauthorized name, is also said to users that lack the role
CREDENTIALS = frozenset((0x0C, 0x0D, 0x0E, WRONG_CODE))
STATUSES = {
    0x01: "no free session",
    0x02: "unknown session",
    0x03: "unknown payload type",
    0x04: "unknown authentication algorithm",
    0x05: "unknown integrity algorithm",
    0x06: "no matching authentication payload",
    0x07: "no matching integrity payload",
    0x08: "inactive session",
    0x09: "unknown role",
    0x0A: "role not allowed",
    0x0B: "no free session for this role",
    0x0C: "wrong length of the user name",
    0x0D: "user name not allowed",
    0x0E: "GUID not allowed",
    0x0F: "wrong integrity check value",
    0x10: "unknown confidentiality algorithm",
    0x11: "no such cipher suite",
    0x12: "illegal parameter",
}


@dataclass(frozen=True, slots=True)
class Account:
    """A user of a BMC, as bytes: the name has at most 16, the password at most 20 (22.28, 22.30)."""

    username: bytes
    password: bytes = field(repr=False)


class LoginRefused(Exception):
    """One end refused the login with this `status` (table 13-15); when it was the BMC, it has freed the slot."""

    def __init__(self, status: int, *, by_bmc: bool = False, why: str = "") -> None:
        super().__init__(why or STATUSES.get(status, f"status {status:#04x}"))
        self.status, self.by_bmc = status, by_bmc


class Handshake:
    """One login: call `open_request`, `opened`, `rakp1`, `rakp2`, `rakp3`, `rakp4` in this order.

    The makers return datagrams, the judges take an answer that `fits` and raise `LoginRefused`.  `session` is the id,
    4 bytes and not 0, that we give the session, `bmc_session` the BMC's own.
    """

    def __init__(self, suite: rmcp.CipherSuite, account: Account, privilege: int, session: bytes) -> None:
        self.suite, self.session, self.bmc_session = suite, session, b""
        self.tag = 0
        self.keys: rmcp.Keys | None = None  # known from RAKP 2 on, good from RAKP 4 on
        self._account = account
        # Bit 4: look the user up by name alone.  By name and role, a BMC whose user has a lower role does not find it.
        self._role = bytes((0x10 | privilege, len(account.username))) + account.username
        self._random = os.urandom(16)
        self._bmc_random = self._guid = self._session_key = b""

    def open_request(self) -> bytes:
        """Ask for a session with the suite's three algorithms (13.17)."""
        chosen = (bytes((kind, 0, 0, 8, number, 0, 0, 0)) for kind, number in enumerate(self.suite.algorithms))
        # Role 0, "the highest that the suite allows": what is wanted of the user is said in RAKP 1.
        return self._make(rmcp.OPEN_REQUEST, bytes(4) + self.session + b"".join(chosen))

    def opened(self, answer: rmcp.Hello) -> None:
        """Take the BMC's id for the session; it must not have answered with other algorithms (13.18)."""
        _check(answer)
        self.bmc_session = answer.body[8:12]
        if (answer.body[16], answer.body[24], answer.body[32]) != self.suite.algorithms:
            raise LoginRefused(NO_SUITE)

    def rakp1(self) -> bytes:
        """Send our random number, the role that we want, and the user (13.20)."""
        body = bytes(4) + self.bmc_session + self._random + self._role[:1] + bytes(2) + self._role[1:]
        return self._make(rmcp.RAKP1, body)

    def rakp2(self, answer: rmcp.Hello) -> None:
        """See whether the BMC knows the same password (13.21), and make the keys (13.31, 13.32)."""
        _check(answer)
        suite, password = self.suite, self._account.password
        self._bmc_random, self._guid = answer.body[8:24], answer.body[24:40]
        code = answer.body[40 : 40 + suite.size]
        if code == bytes(suite.size):  # a BMC that took the suite and cannot do it
            raise LoginRefused(NO_SUITE)
        said = self.session + self.bmc_session + self._random + self._bmc_random + self._guid + self._role
        if not hmac.compare_digest(suite.hmac(password, said), code):
            raise LoginRefused(WRONG_CODE)
        self._session_key = suite.hmac(password, self._random + self._bmc_random + self._role)
        sign, encrypt = (suite.hmac(self._session_key, bytes((number,)) * 20) for number in (1, 2))
        self.keys = rmcp.Keys(suite, sign, algorithms.AES(encrypt[:16]))

    def rakp3(self) -> bytes:
        """Prove that we know the password (13.22)."""
        code = self.suite.hmac(self._account.password, self._bmc_random + self.session + self._role)
        return self._make(rmcp.RAKP3, bytes(4) + self.bmc_session + code)

    def rakp4(self, answer: rmcp.Hello) -> None:
        """See that both made the same keys (13.23): not so when the BMC has a key of its own, K_g."""
        _check(answer)
        code = self.suite.hmac(self._session_key, self._random + self.bmc_session + self._guid)[: self.suite.icv]
        if not hmac.compare_digest(code, answer.body[8 : 8 + self.suite.icv]):
            raise LoginRefused(WRONG_CODE, why="it has a key of its own, K_g, which nodepool was not given")

    def give_up(self) -> bytes:
        """Make a RAKP 3 that refuses, so that the BMC frees the slot at once (13.22)."""
        return self._make(rmcp.RAKP3, bytes((0, WRONG_CODE, 0, 0)) + self.bmc_session)

    def fits(self, answer: rmcp.Hello) -> bool:
        """Whether `answer` is to the last message made; OpenBMC's errors carry neither its tag nor the session."""
        if answer.status:
            return answer.tag in (self.tag, 0)
        return answer.tag == self.tag and answer.session == self.session

    def _make(self, kind: int, body: bytes) -> bytes:
        self.tag = (self.tag + 1) & 0xFF or 1  # never 0: that is how OpenBMC answers errors
        return rmcp.hello(kind, bytes((self.tag,)) + body[1:])


def _check(answer: rmcp.Hello) -> None:
    if answer.status:
        raise LoginRefused(answer.status, by_bmc=True)

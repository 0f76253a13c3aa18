"""One session with one BMC: how it is opened, used and closed.

A login tries suite 17, then 3, as administrator, then as operator, each only on the refusals that call for it; a wrong
password is tried once.  Inside the session one request is under way at a time; its repetitions keep the sequence number
of the request (`rqSeq`), so that a BMC which remembers it answers again without acting twice, while each packet has a
session sequence number of its own, or the BMC would take it for a replay (IPMI 2.0, 6.12.13).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import NamedTuple

from nodepool.drivers.power import Busy, OutcomeUnknown, Refused, Unreachable, rakp, rmcp
from nodepool.drivers.power.link import Endpoint, Forbidden, Link, Silence, patient

# BMCs dislike repeated RAKP messages, and some lock accounts: when one stays unanswered this many seconds, the login is
# begun again, and in the end each attempt has as long as a slow BMC may need.
RAKP_PAUSES = (0.8, 1.0, 1.2, 4.0)
FORGOTTEN = 2  # times that a login is begun again because the BMC does not know the session it has just opened
PROBE_PAUSES = (0.5, 0.8)  # a kept session that is silent for so long was forgotten by the BMC
CLOSE_PAUSES = (0.3, 0.5)
BUSY_PAUSE = 1.0  # seconds until a busy BMC is asked again, doubled each time

# Completion codes (table 5-2) that mean "not now".
BUSY_CODES = {
    0xC0: "busy",
    0xC3: "timed out inside",
    0xCF: "saw a duplicate",
    0xD1: "updating its firmware",
    0xD2: "initialising",
    0xD5: "not possible in its present state",
}
TIMED_OUT = 0xC3
_FIRMWARE = "its firmware does not do this, an update may"
REFUSALS = {  # what it means, and what can be done
    0xC1: ("unknown command", _FIRMWARE),
    0xC7: ("wrong length of the data", _FIRMWARE),
    0xC9: ("parameter out of range", _FIRMWARE),
    0xCC: ("invalid data", _FIRMWARE),
    0xD4: ("not enough privilege", "give its user the operator privilege for IPMI over LAN"),
    0xD6: ("switched off", "switch the command on in the BMC's settings"),
    0xFF: ("unspecified error", "look into the BMC's own event log"),
}


class Command(NamedTuple):
    """A request of IPMI: network function, command, what people call it, and how many bytes its answer has at least."""

    function: int
    number: int
    words: str
    least: int = 0


SET_PRIVILEGE = Command(0x06, 0x3B, "the choice of the privilege")
CLOSE = Command(0x06, 0x3C, "the end of the session")


@dataclass(slots=True)
class Progress:
    """What a call is at, for the sentence and the kind of error that its deadline ends it with."""

    bmc: str  # what people call it: "BMC HOST:PORT"
    stage: str = "an earlier command"
    verdict: type[Unreachable | Busy | OutcomeUnknown] = Busy

    def at(self, stage: str, verdict: type[Unreachable | Busy | OutcomeUnknown] = Unreachable) -> None:
        """Note what comes next."""
        self.stage, self.verdict = stage, verdict


@dataclass(frozen=True, slots=True)
class Way:
    """A way in: the cipher suite's number and the privilege."""

    suite: int = 17
    privilege: int = rakp.ADMINISTRATOR

    def other(self, status: int) -> Way | None:
        """Return the way to try after a refusal with `status`, if there is one."""
        if status in rakp.OTHER_SUITE and self.suite != 3:
            return replace(self, suite=3)
        if status in rakp.OTHER_ROLE and self.privilege != rakp.OPERATOR:
            return replace(self, privilege=rakp.OPERATOR)
        return None


class Session:
    """An open session; requests are the caller's to keep apart (one lock per BMC)."""

    def __init__(self, link: Link, endpoint: Endpoint, handshake: rakp.Handshake, progress: Progress) -> None:
        keys = handshake.keys
        assert keys is not None, "the handshake has come as far as RAKP message 2"
        self.way = Way(keys.suite.number)
        self.progress = progress  # of the call that uses the session
        self.proven = True  # the BMC has answered lately: its silence is patience's matter, not a forgotten session
        self._link, self._endpoint, self._keys = link, endpoint, keys
        self._name, self._bmc_name = handshake.session, handshake.bmc_session
        self._sequence = self._request = 0
        self._window = rmcp.ReplayWindow()
        link.attach(self._name, endpoint, self._receive)

    async def ask(
        self, command: Command, data: bytes = b"", *, changes: bool = False, fine: Collection[int] = ()
    ) -> bytes:
        """Carry out `command` and return the answer's data; a busy BMC is asked again until the deadline.

        Completion codes that are `fine` count as success.  Raises `Refused`, `Silence` when a session that is not
        proven stays silent, `Forbidden`, and `OutcomeUnknown` when that came after what `changes` something was sent.
        """
        pause = BUSY_PAUSE
        while True:
            answer = await self._exchange(command, data, patient() if self.proven else PROBE_PAUSES, changes)
            self.proven = True
            code = answer.completion
            if code in fine or (code == 0 and len(answer.data) >= command.least):
                return answer.data
            if code not in BUSY_CODES:
                raise _refusal(self.progress.bmc, command, answer)
            verdict = OutcomeUnknown if changes and code == TIMED_OUT else Busy
            self.progress.at(f"{command.words} (completion code {code:#04x}, {BUSY_CODES[code]})", verdict)
            await asyncio.sleep(pause)
            pause *= 2

    async def choose_privilege(self, privilege: int) -> None:
        """Raise the session from "user", where it begins, to `privilege`; raise `LoginRefused` when not allowed."""
        try:
            await self.ask(SET_PRIVILEGE, bytes((privilege,)))
        except Refused as refusal:
            if refusal.completion in (0x80, 0x81):  # table 22-21: not available, or above the user's limit
                raise rakp.LoginRefused(0x0A) from None
            raise
        self.way = Way(self._keys.suite.number, privilege)

    async def close(self) -> None:
        """End the session and wait a moment for the BMC to say so."""
        try:
            await self._exchange(CLOSE, self._bmc_name, CLOSE_PAUSES, changes=False)
        except (Silence, Forbidden):  # it ends by itself in a minute
            return
        finally:
            self._link.detach(self._name)

    def abandon(self) -> None:
        """End the session without waiting: the BMC is silent, or there is no time."""
        self._link.detach(self._name)
        self._link.tell(self._seal(rmcp.request(CLOSE.function, CLOSE.number, self._bmc_name, 0)), self._endpoint)

    async def _exchange(self, command: Command, data: bytes, pauses: Iterable[float], changes: bool) -> rmcp.Answer:
        self._request = (self._request + 1) & 0x3F
        message = rmcp.request(command.function, command.number, data, self._request)
        key = (self._name, command.function, command.number, self._request)
        first = self._sequence + 1
        self.progress.at(command.words, OutcomeUnknown if changes else Unreachable)
        try:
            return await self._link.ask(self._endpoint, key, lambda: self._seal(message), pauses)
        except Forbidden:
            if changes and self._sequence > first:  # the packet that was not sent has a number, too
                raise outcome_unknown(self.progress, "nodepool may send nothing more") from None
            raise

    def _seal(self, message: bytes) -> bytes:
        self._sequence += 1
        return rmcp.seal(self._keys, self._bmc_name, self._sequence, message)

    def _receive(self, packet: rmcp.Sealed) -> None:
        payload = rmcp.unseal(self._keys, packet)
        if packet.kind != rmcp.MESSAGE or not self._window.accept(packet.sequence):
            raise rmcp.ProtocolError("a packet that was seen before or that nobody asked for")
        answer = rmcp.parse_answer(payload)
        self._link.answer((self._name, answer.function, answer.command, answer.sequence), answer)


def outcome_unknown(progress: Progress, why: str) -> OutcomeUnknown:
    """Return the error for a change that was sent and not answered."""
    return OutcomeUnknown(
        f"{progress.bmc} did not answer {progress.stage} ({why}), which it may have carried out: read the state first"
    )


def _refusal(bmc: str, command: Command, answer: rmcp.Answer) -> Refused:
    code = answer.completion
    if code == 0:
        size = len(answer.data)
        return Refused(f"{bmc} gave {size} of {command.least} bytes as answer to {command.words}: update it", code)
    words, remedy = REFUSALS.get(code, ("", "IPMI 2.0, table 5-2, tells what it means"))
    return Refused(
        f"{bmc} refused {command.words} with completion code {code:#04x}{words and f' ({words})'}: {remedy}", code
    )


async def log_in(link: Link, endpoint: Endpoint, account: rakp.Account, way: Way, progress: Progress) -> Session:
    """Open a session, beginning with `way`; raise `LoginRefused` when no way is left."""
    pauses = chain(RAKP_PAUSES, repeat(RAKP_PAUSES[-1]))
    pause, forgotten = next(pauses), 0
    while True:
        handshake = rakp.Handshake(rmcp.SUITES[way.suite], account, way.privilege, link.new_id())
        try:
            session = await _shake_hands(link, endpoint, handshake, pause, progress)
            return await _at_privilege(session, way.privilege)
        except Silence:
            pause = next(pauses)
        except rakp.LoginRefused as refusal:
            forgotten += refusal.status in rakp.GONE
            other = way if refusal.status in rakp.GONE and forgotten <= FORGOTTEN else way.other(refusal.status)
            if not other:
                raise
            way = other


async def _shake_hands(
    link: Link, endpoint: Endpoint, handshake: rakp.Handshake, pause: float, progress: Progress
) -> Session:
    async def exchange(kind: int, datagram: bytes, pauses: Iterable[float], words: str) -> rmcp.Hello:
        progress.at(words)
        return await link.ask(endpoint, (endpoint, kind + 1), lambda: datagram, pauses, handshake.fits)

    proven = False  # to the BMC, which then may have opened the session although we do not know
    try:
        handshake.opened(await exchange(rmcp.OPEN_REQUEST, handshake.open_request(), patient(), "the login's request"))
        handshake.rakp2(await exchange(rmcp.RAKP1, handshake.rakp1(), (pause,), "the login's RAKP message 1"))
        proven = True
        handshake.rakp4(await exchange(rmcp.RAKP3, handshake.rakp3(), (pause,), "the login's RAKP message 3"))
    except BaseException as failure:
        by_bmc = isinstance(failure, rakp.LoginRefused) and failure.by_bmc
        if not by_bmc and proven:
            Session(link, endpoint, handshake, progress).abandon()
        if not by_bmc and handshake.bmc_session:
            link.tell(handshake.give_up(), endpoint)
        raise
    return Session(link, endpoint, handshake, progress)


async def _at_privilege(session: Session, privilege: int) -> Session:
    try:
        await session.choose_privilege(privilege)
    except (rakp.LoginRefused, Refused):
        await session.close()
        raise
    except BaseException:
        session.abandon()
        raise
    return session

"""Power by IPMI 2.0, spoken natively: one thread, one event loop and one UDP socket for all BMCs.

Callers' threads wait; everything else happens in the loop.  A BMC has one session at a time, in which one call at a
time has its turn; the session is kept for a few seconds in case of another call, and then always closed, because BMCs
have as few as four.  What a BMC turned out to want at login (cipher suite, privilege) is remembered for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from nodepool.drivers.power import (
    DEADLINE,
    Auth,
    Bmc,
    BootDevice,
    Busy,
    OutcomeUnknown,
    Power,
    Refused,
    Suite,
    Unreachable,
    Withheld,
    rakp,
    split_address,
)
from nodepool.drivers.power.link import Counts, Endpoint, Forbidden, Link, Silence
from nodepool.drivers.power.session import Command, Progress, Session, Way, log_in, outcome_unknown
from nodepool.errors import Code, Permanent, Temporary

PORT = 623
KEEP = 3.0  # seconds that a session is kept for another call

STATUS = Command(0x00, 0x01, "the question for its power state", least=1)
CONTROL = Command(0x00, 0x02, "the power command")
IDENTIFY = Command(0x00, 0x04, "the command to identify")
BOOT = Command(0x00, 0x08, "the choice of the boot device")
DEVICE = Command(0x06, 0x01, "the question for its device id", least=11)
GUID = Command(0x06, 0x37, "the question for its GUID", least=16)

# Boot option 3: do not forget option 5 after 60 s, a self test takes longer; BMCs may refuse it.  Option 5: bit 7
# valid, bit 6 persistent, bit 5 UEFI (table 28-14).
_NO_EXPIRY = bytes((3, 0x08))
_VALID, _PERSISTENT, _UEFI = 0x80, 0x40, 0x20
_SELECTORS: Mapping[BootDevice, int] = {"pxe": 0x04, "disk": 0x08}

Work = Callable[[Session], Awaitable[object]]


def open_backend(may_send: Callable[[], bool]) -> Power:
    """Open this back-end, see `nodepool.drivers.power`."""
    return NativeIpmi(may_send)


@dataclass(slots=True)
class _Line:
    """What is known about one BMC, and its session while nobody uses it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    session: Session | None = None
    account: rakp.Account | None = None  # that the session was opened with
    timer: asyncio.TimerHandle | None = None  # the session's end
    way: Way = field(default_factory=Way)


class NativeIpmi:
    """`Power` by IPMI; `keep` is how many seconds a session outlives a call."""

    def __init__(self, may_send: Callable[[], bool] = lambda: True, keep: float = KEEP) -> None:
        self._keep = keep
        self._loop = asyncio.new_event_loop()
        self._link = Link(self._loop, may_send)
        self._lines: dict[Endpoint, _Line] = {}
        self._calls: set[asyncio.Task[object]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._gate = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ipmi", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Counts:
        """Datagrams so far."""
        return self._link.counts

    def power(self, bmc: Bmc, *, deadline: float = DEADLINE) -> bool:
        """See `Power.power`."""

        async def work(session: Session) -> bool:
            return bool((await session.ask(STATUS))[0] & 1)

        return bool(self._call(bmc, deadline, work))

    def set_power(self, bmc: Bmc, *, on: bool, deadline: float = DEADLINE) -> None:
        """See `Power.set_power`."""

        async def work(session: Session) -> None:
            now = bool((await session.ask(STATUS))[0] & 1)
            # Sent even when it seems to be so: what a BMC says of its power lags by seconds.  Some refuse it then.
            fine = frozenset({0xD5}) if now == on else frozenset[int]()
            await session.ask(CONTROL, bytes((on,)), changes=True, fine=fine)

        self._call(bmc, deadline, work)

    def set_boot(
        self, bmc: Bmc, device: BootDevice, *, uefi: bool, persistent: bool = False, deadline: float = DEADLINE
    ) -> None:
        """See `Power.set_boot`."""
        flags = _VALID | _PERSISTENT * persistent | _UEFI * uefi

        async def work(session: Session) -> None:
            with contextlib.suppress(Refused):
                await session.ask(BOOT, _NO_EXPIRY)
            await session.ask(BOOT, bytes((5, flags, _SELECTORS[device], 0, 0, 0)), changes=True)

        self._call(bmc, deadline, work)

    def info(self, bmc: Bmc, *, deadline: float = DEADLINE) -> Mapping[str, str]:
        """See `Power.info`."""
        found: dict[str, str] = {}

        async def work(session: Session) -> None:
            found.update(_device(await session.ask(DEVICE)))
            found.update(suite=str(session.way.suite), privilege=rakp.PRIVILEGES[session.way.privilege])
            with contextlib.suppress(Refused):  # optional
                found["guid"] = (await session.ask(GUID))[:16].hex()

        self._call(bmc, deadline, work)
        return found

    def identify(self, bmc: Bmc, seconds: int = 15, *, deadline: float = DEADLINE) -> None:
        """See `Power.identify`."""
        if not 0 <= seconds <= 255:
            raise Permanent(f"a machine's light can blink for 0 to 255 seconds, not {seconds}", Code.CONFIG)

        async def work(session: Session) -> None:
            if not session.proven:  # so that a forgotten session is found out by a question, not by a command
                await session.ask(STATUS)
            await session.ask(IDENTIFY, bytes((seconds,)), changes=True)

        self._call(bmc, deadline, work)

    def close(self) -> None:
        """See `Power.close`."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _call(self, bmc: Bmc, deadline: float, work: Work) -> object:
        """Let the loop do `work` in a session with `bmc`, and wait for it; called in any thread but the loop's."""
        address, account = split_address(bmc.address, PORT), _account(bmc)
        with self._gate:
            if self._closed:
                raise Temporary(f"BMC {_name(address)} was not asked: the IPMI client is closed", Code.CANCELLED)
            future = asyncio.run_coroutine_threadsafe(self._bounded(address, account, deadline, work), self._loop)
        return future.result()

    async def _bounded(self, address: tuple[str, int], account: rakp.Account, deadline: float, work: Work) -> object:
        """Do `work` within `deadline`; whatever goes wrong comes out as a sentence with the BMC's address in it."""
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        progress = Progress(f"BMC {_name(address)}")
        try:
            async with asyncio.timeout(deadline):
                endpoint = await self._link.resolve(*address)
                line = self._lines.setdefault(endpoint, _Line())
                async with line.lock:
                    return await self._in_session(endpoint, line, account, progress, work)
        except TimeoutError:
            raise _late(progress, f"within {deadline:g} s") from None
        except asyncio.CancelledError:  # only `close` cancels
            if progress.verdict is OutcomeUnknown:
                raise outcome_unknown(progress, "nodepool stops") from None
            raise Temporary(f"{progress.bmc} was not waited for: nodepool stops", Code.CANCELLED) from None
        except rakp.LoginRefused as refusal:
            raise _login_refused(progress.bmc, account, refusal) from None
        except Forbidden:
            raise Withheld(f"{progress.bmc} was sent nothing (more): this daemon may not command BMCs now") from None
        except OSError as error:
            raise Unreachable(f"{progress.bmc} is not known by its name ({error}): check it and the DNS") from None
        finally:
            self._calls.discard(task)

    async def _in_session(
        self, endpoint: Endpoint, line: _Line, account: rakp.Account, progress: Progress, work: Work
    ) -> object:
        session = await self._kept(line, account)
        try:
            if session is None:
                session = await self._log_in(endpoint, line, account, progress)
            session.progress = progress
            try:
                result = await work(session)
            except Silence:  # the BMC has forgotten the kept session: nothing was carried out in it
                session.abandon()
                session = None
                session = await self._log_in(endpoint, line, account, progress)
                result = await work(session)
        except Refused:
            if session:
                self._keep_session(line, session, account)
            raise
        except BaseException:
            if session:
                session.abandon()
            raise
        self._keep_session(line, session, account)
        return result

    async def _log_in(self, endpoint: Endpoint, line: _Line, account: rakp.Account, progress: Progress) -> Session:
        try:
            session = await log_in(self._link, endpoint, account, line.way, progress)
        except rakp.LoginRefused as refusal:
            remembered, line.way = line.way, Way()
            if remembered.suite == line.way.suite or refusal.status not in rakp.OTHER_SUITE:
                raise
            session = await log_in(self._link, endpoint, account, line.way, progress)  # it wants another suite now
        line.way = session.way
        return session

    async def _kept(self, line: _Line, account: rakp.Account) -> Session | None:
        """Take the session that the last call left, if it is for the same account."""
        session, line.session = line.session, None
        if line.timer:
            line.timer.cancel()
            line.timer = None
        if session is None:
            return None
        if line.account != account:
            await session.close()
            return None
        session.proven = False
        return session

    def _keep_session(self, line: _Line, session: Session, account: rakp.Account) -> None:
        line.session, line.account = session, account
        line.timer = self._loop.call_later(self._keep, self._expire, line)

    def _expire(self, line: _Line) -> None:
        line.timer = None
        task = self._loop.create_task(self._hang_up(line))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _hang_up(self, line: _Line) -> None:
        async with line.lock:
            if line.session and line.timer is None:  # else somebody has used it in the meantime
                session, line.session = line.session, None
                await session.close()

    async def _shut(self) -> None:
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, *self._endings, return_exceptions=True)
        for line in self._lines.values():
            if line.timer:
                line.timer.cancel()
                line.timer = None
        await asyncio.gather(*(self._hang_up(line) for line in self._lines.values()))
        self._link.close()


def _account(bmc: Bmc) -> rakp.Account:
    account = rakp.Account(bmc.username.encode(), bmc.password.encode())
    for what, value, longest in (("user name", account.username, 16), ("password", account.password, 20)):
        if len(value) > longest:
            raise Permanent(
                f"BMC {bmc.address}: IPMI allows {longest} bytes for a {what}, its credentials in secure.yaml have"
                f" {len(value)}: choose a shorter one",
                Code.CONFIG,
            )
    return account


def _name(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _device(data: bytes) -> dict[str, str]:
    """Make words of the answer to Get Device ID (table 20-2)."""
    return {
        "device": str(data[0]),
        "firmware": f"{data[2] & 0x7F}.{data[3]:02x}",
        "available": "no" if data[2] & 0x80 else "yes",
        "ipmi": f"{data[4] & 0x0F}.{data[4] >> 4}",
        "manufacturer": str(int.from_bytes(data[6:9], "little") & 0xFFFFF),
        "product": str(int.from_bytes(data[9:11], "little")),
    }


def _late(progress: Progress, within: str) -> Unreachable | Busy | OutcomeUnknown:
    """Return the error for a deadline that passed."""
    if progress.verdict is OutcomeUnknown:
        return outcome_unknown(progress, within)
    if progress.verdict is Busy:
        return Busy(f"{progress.bmc} was not done with {progress.stage} {within}: it is asked again later")
    return Unreachable(
        f"{progress.bmc} did not answer {progress.stage} {within}: check its address, power and cable, that IPMI over"
        " LAN is switched on, and that no firewall is in the way of UDP"
    )


def _login_refused(bmc: str, account: rakp.Account, refusal: rakp.LoginRefused) -> Busy | Suite | Auth | Refused:
    """Return the error for a login that was refused for good."""
    if refusal.status in rakp.FULL or refusal.status in rakp.GONE:
        return Busy(
            f"{bmc} lets nobody in now ({refusal}): it is asked again later; close other sessions or restart it"
        )
    if refusal.status in rakp.OTHER_SUITE:
        return Suite(f"{bmc} has neither cipher suite 17 nor 3 ({refusal}): switch one of them on in its settings")
    user = account.username.decode()
    if refusal.status in rakp.OTHER_ROLE or refusal.status in rakp.CREDENTIALS:
        long = len(account.password) > 16
        return Auth(
            f'{bmc} refused user "{user}" or its password ({refusal}): check its credentials in secure.yaml, and that'
            " the user has at least the operator privilege for IPMI over LAN"
            + (", and whether it keeps only 16 bytes of the password" if long else "")
        )
    return Refused(f"{bmc} refused the login ({refusal}): look into its settings for IPMI over LAN", refusal.status)

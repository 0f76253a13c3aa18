"""Power and boot device of a machine, through its BMC.

A caller sees this file only: `open_power()` gives one object that is called from any thread, and the address of the BMC
picks the back-end that does the work.  Every call ends within its deadline, whatever the BMC does, either with what was
asked or with one of six kinds of error; their sentences are meant for `nodepool show`.

Commands are not states.  `set_power` says that the BMC took the command; what became of it is read by `power`, which
may lag by seconds.  Wanting a machine on means `set_power(bmc, on=True)` until `power(bmc)` says so: both are safe to
repeat, which is why cycle and reset are not offered.
"""

from __future__ import annotations

import importlib
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, Self
from urllib.parse import urlsplit

from nodepool.errors import Code, Permanent, Temporary

DEADLINE = 5.0  # seconds that a call may take when its caller does not say: the price of a dead BMC
BootDevice = Literal["pxe", "disk"]


@dataclass(frozen=True, slots=True)
class Bmc:
    """Where a BMC is (`ipmi://HOST[:PORT]`) and how it lets us in."""

    address: str
    username: str = ""
    password: str = field(default="", repr=False)


class Unreachable(Temporary):
    """The BMC did not answer, or nothing could be sent to it; a command that changes anything was not sent."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Code.BMC_UNREACHABLE)


class Busy(Temporary):
    """The BMC answers that it cannot do it now: no free session, initialising, or at work on an earlier command."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Code.BMC_BUSY, delay=15.0)


class OutcomeUnknown(Temporary):
    """A command that changes something was sent and not answered: it may have been carried out.  Read, then decide."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Code.BMC_UNKNOWN_OUTCOME)


class Withheld(Temporary):
    """`may_send` forbade it, so nothing (more) was sent."""


class Auth(Permanent):
    """The BMC does not know the user or the password is wrong.  Never tried again by itself: accounts lock."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Code.BMC_AUTH)


class Suite(Permanent):
    """The BMC and we have no cipher suite in common."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Code.BMC_SUITE)


class Refused(Permanent):
    """The BMC refused the command; `completion` is its code (IPMI 2.0 table 5-2), the status of RMCP+ at login."""

    def __init__(self, message: str, completion: int) -> None:
        super().__init__(message, Code.BMC_REFUSED)
        self.completion = completion


class Power(Protocol):
    """What a back-end can do.  Safe to call from several threads; each call blocks for at most `deadline` seconds.

    Every call raises `Unreachable`, `Busy`, `Auth`, `Suite`, `Refused` or `Withheld`, those that change something
    `OutcomeUnknown` besides, and `Permanent` with `Code.CONFIG` when address or credentials cannot be used at all.
    """

    def power(self, bmc: Bmc, *, deadline: float = DEADLINE) -> bool:
        """Whether the machine is on, as the BMC sees it now."""
        ...

    def set_power(self, bmc: Bmc, *, on: bool, deadline: float = DEADLINE) -> None:
        """Tell the BMC to switch the machine on, or off at once (no shutdown); fine when it is so already."""
        ...

    def set_boot(
        self, bmc: Bmc, device: BootDevice, *, uefi: bool, persistent: bool = False, deadline: float = DEADLINE
    ) -> None:
        """Choose the device of the next boot, or of all when `persistent`; often forgotten, so set it before each."""
        ...

    def info(self, bmc: Bmc, *, deadline: float = DEADLINE) -> Mapping[str, str]:
        """What the BMC says about itself.

        Keys: `firmware`, `ipmi` (version), `manufacturer` (IANA enterprise number), `product`, `device`, `available`
        ("no" while it initialises), `suite`, `privilege`, and `guid` (32 hex digits in the order of the wire, see
        `same_system`) where the BMC tells it.
        """
        ...

    def identify(self, bmc: Bmc, seconds: int = 15, *, deadline: float = DEADLINE) -> None:
        """Blink the machine's light for 1 to 255 `seconds`; 0 switches it off."""
        ...

    def close(self) -> None:
        """End every session and thread; calls under way end at once with an error.  May be called twice."""
        ...


def scheme_of(address: str) -> str:
    """Return the scheme of a BMC's address; raise `Permanent` when there is no back-end for it."""
    scheme, mark, _ = address.partition("://")
    if not mark or scheme not in _BACKENDS:
        known = ", ".join(f"{name}://" for name in sorted(_BACKENDS))
        raise Permanent(
            f'the BMC address "{address}" is of no known kind: write one of {known}HOST[:PORT]', Code.CONFIG
        )
    return scheme


def split_address(address: str, default_port: int) -> tuple[str, int]:
    """Split `SCHEME://HOST[:PORT]` into host and port; raise `Permanent` when it is not of that form."""
    wrong = Permanent(f'the BMC address "{address}" is not of the form ipmi://HOST or ipmi://HOST:PORT', Code.CONFIG)
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if not host or port == 0 or parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise wrong
    return host, port or default_port


def same_system(guid: str, system_uuid: str) -> bool:
    """Whether a BMC's `guid` (see `Power.info`) is the UUID that the machine's firmware tells its system.

    BMCs send it in any of three byte orders: as RFC 4122 writes it, reversed (IPMI 2.0, 20.8), or with the first three
    fields swapped (SMBIOS 3, 7.2.1).
    """
    try:
        wire, wanted = bytes.fromhex(guid), uuid.UUID(system_uuid)
    except ValueError:
        return False
    return len(wire) == 16 and wanted.bytes in (wire, wire[::-1], uuid.UUID(bytes_le=wire).bytes)


def open_power(may_send: Callable[[], bool] = lambda: True) -> OpenPower:
    """Open the power of all machines.

    `may_send` is asked right before each packet, resends included, from a thread of the back-end, so it must be quick
    and not raise: when it says no, nothing is sent and the call raises `Withheld`.
    """
    return OpenPower(may_send)


# The scheme of an address -> the module of its back-end, which has `open_backend(may_send) -> Power`.  Modules are
# imported, and back-ends opened, when the first address of theirs is used.
_BACKENDS = {"ipmi": "nodepool.drivers.power.ipmi"}


class OpenPower:
    """`Power` over all back-ends: each call goes to the one that the scheme of the address names."""

    def __init__(self, may_send: Callable[[], bool]) -> None:
        self._may_send = may_send
        self._lock = threading.Lock()
        self._open: dict[str, Power] = {}
        self._closed = False

    def power(self, bmc: Bmc, *, deadline: float = DEADLINE) -> bool:
        """See `Power.power`."""
        return self._backend(bmc).power(bmc, deadline=deadline)

    def set_power(self, bmc: Bmc, *, on: bool, deadline: float = DEADLINE) -> None:
        """See `Power.set_power`."""
        self._backend(bmc).set_power(bmc, on=on, deadline=deadline)

    def set_boot(
        self, bmc: Bmc, device: BootDevice, *, uefi: bool, persistent: bool = False, deadline: float = DEADLINE
    ) -> None:
        """See `Power.set_boot`."""
        self._backend(bmc).set_boot(bmc, device, uefi=uefi, persistent=persistent, deadline=deadline)

    def info(self, bmc: Bmc, *, deadline: float = DEADLINE) -> Mapping[str, str]:
        """See `Power.info`."""
        return self._backend(bmc).info(bmc, deadline=deadline)

    def identify(self, bmc: Bmc, seconds: int = 15, *, deadline: float = DEADLINE) -> None:
        """See `Power.identify`."""
        self._backend(bmc).identify(bmc, seconds, deadline=deadline)

    def close(self) -> None:
        """Close every back-end that was opened."""
        with self._lock:
            self._closed = True
            opened = list(self._open.values())
            self._open.clear()
        for backend in opened:
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _backend(self, bmc: Bmc) -> Power:
        module = _BACKENDS[scheme_of(bmc.address)]
        with self._lock:
            if self._closed:
                raise Temporary(f"BMC {bmc.address} was not asked: the power drivers are closed", Code.CANCELLED)
            if module not in self._open:
                self._open[module] = importlib.import_module(module).open_backend(self._may_send)
            return self._open[module]

"""The chassis behind one BMC: its power, its boot flags, its identify light, and the IPMI commands for them.

`Machine` is the port to what is powered.  Source: IPMI 2.0 specification, sections 20 (device), 28 (chassis).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from nodepool.rack.session import OPERATOR, USER

# Completion codes, table 5-2 and (80h) 28.12.
OK, NODE_BUSY, INVALID_COMMAND, REQUEST_TOO_SHORT, INVALID_FIELD = 0x00, 0xC0, 0xC1, 0xC7, 0xCC
PRIVILEGE, NOT_IN_STATE, UNSPECIFIED, PARAMETER_NOT_SUPPORTED = 0xD4, 0xD5, 0xFF, 0x80

NETFN_CHASSIS, NETFN_APP = 0x00, 0x06

OFF, ON, CYCLE, RESET, DIAGNOSTIC, SOFT = range(6)  # chassis control, table 28-4
ACTIONS = ("off", "on", "cycle", "reset", "diagnostic", "soft")

FLAGS_PARAMETER, CLEARING_PARAMETER = 5, 3
FLAGS_SECONDS = 60.0  # one-shot flags that no boot used are void after this, unless parameter 3 says otherwise
_DEVICES = {1: "pxe", 2: "disk", 3: "disk", 9: "disk"}  # 9 is what some vendors' UEFI firmware calls its disk (24h)


class Machine(Protocol):
    """What a BMC switches.

    `boot` is "pxe", "disk" or None for the machine's own order; with `once` the machine's own reboots use its own
    order again.  A call returns when the state is reached and raises OSError or RackError when it cannot be.
    """

    async def power_on(self, boot: str | None, *, once: bool = True) -> None:
        """Start; only called when off."""

    async def power_off(self) -> None:
        """Take the power away at once."""

    async def reset(self, boot: str | None, *, once: bool = True) -> None:
        """Restart without taking the power away."""

    async def press_button(self) -> None:
        """Ask the system to shut itself down (ACPI)."""

    def is_on(self) -> bool:
        """Whether there is power now."""
        ...


class MemoryMachine:
    """A machine that is only its state; `boots` lists (device, once) of each power-on and reset."""

    def __init__(self, is_on: bool = False) -> None:
        self._is_on = is_on
        self.boots: list[tuple[str | None, bool]] = []

    async def power_on(self, boot: str | None, *, once: bool = True) -> None:
        """Start."""
        self._is_on = True
        self.boots.append((boot, once))

    async def power_off(self) -> None:
        """Stop."""
        self._is_on = False

    async def reset(self, boot: str | None, *, once: bool = True) -> None:
        """Boot anew."""
        self.boots.append((boot, once))

    async def press_button(self) -> None:
        """Shut down; a machine without a system is quick at that."""
        self._is_on = False

    def is_on(self) -> bool:
        """Whether there is power."""
        return self._is_on


@dataclass(frozen=True, slots=True)
class BootFlags:
    """Parameter 5 of the boot options, decoded (table 28-14)."""

    valid: bool = False
    persistent: bool = False
    uefi: bool = False
    device: str | None = None  # pxe | disk | None: the machine's own order

    @classmethod
    def decode(cls, data: bytes) -> BootFlags:
        """Out of the parameter's 5 bytes."""
        first, second = (data + bytes(2))[:2]
        return cls(bool(first & 0x80), bool(first & 0x40), bool(first & 0x20), _DEVICES.get(second >> 2 & 0x0F))

    def __str__(self) -> str:
        """`pxe once`, `disk always (uefi)`, `default`."""
        if not self.valid or not self.device:
            return "default"
        return f"{self.device} {'always' if self.persistent else 'once'}{' (uefi)' if self.uefi else ''}"


@dataclass
class Chassis:
    """State and commands.  `now` gives seconds of a clock that never goes back."""

    machine: Machine
    uuid: UUID
    now: Callable[[], float]
    options: dict[int, bytes] = field(default_factory=lambda: {FLAGS_PARAMETER: bytes(5)})
    options_set: float = 0.0
    identify_until: float = 0.0
    lagging: bool = False  # the power that is reported until `lag_until` instead of the true one
    lag_until: float = 0.0
    last_error: str = ""

    def flags(self) -> BootFlags:
        """The boot flags in force; default ones once they have expired."""
        keep = self.options.get(CLEARING_PARAMETER, b"\x00")[-1] & 0x08
        keep |= self.options[FLAGS_PARAMETER][0] & 0x40  # persistent
        if not keep and self.now() - self.options_set > FLAGS_SECONDS:
            self.options[FLAGS_PARAMETER] = bytes(5)
        return BootFlags.decode(self.options[FLAGS_PARAMETER])

    def reported_power(self) -> bool:
        """What the status says: the true power, or an older one while the BMC lags."""
        return self.lagging if self.now() < self.lag_until else self.machine.is_on()

    async def control(self, action: int, lag: float = 0.0) -> int:
        """Carry out a chassis control and give its completion code; the status lags `lag` seconds behind."""
        before = self.machine.is_on()
        if not before and action in (CYCLE, RESET, DIAGNOSTIC, SOFT):
            return NOT_IN_STATE
        try:
            await self._act(action, before)
        except Exception as error:  # noqa: BLE001 - a BMC tells its console "unspecified" and goes on
            self.last_error = f"{ACTIONS[action]}: {error}"
            return UNSPECIFIED
        if lag:
            self.lagging, self.lag_until = before, self.now() + lag
        self.last_error = ""
        return OK

    async def _act(self, action: int, is_on: bool) -> None:
        if action == SOFT:
            await self.machine.press_button()
        if is_on and action in (OFF, CYCLE):
            await self.machine.power_off()
        if action == CYCLE or (action == ON and not is_on):
            device, once = self._take_flags()
            await self.machine.power_on(device, once=once)
        if action == RESET:
            device, once = self._take_flags()
            await self.machine.reset(device, once=once)

    def _take_flags(self) -> tuple[str | None, bool]:
        """The device and whether for this boot only; one-shot flags are used up by this."""
        flags = self.flags()
        if not flags.valid:
            return None, True
        if not flags.persistent:
            self.options[FLAGS_PARAMETER] = bytes(5)
        return flags.device, not flags.persistent

    # The commands.  Each takes the request's data and gives completion code and data.

    def device_id(self, _data: bytes) -> tuple[int, bytes]:
        """Get Device ID (20.1): IPMI 2.0, chassis device, an experimental manufacturer."""
        return OK, bytes((0x20, 0x01, 0x01, 0x00, 0x02, 0x80, 0xFF, 0xFF, 0x0F, 0x01, 0x00))

    def guid(self, _data: bytes) -> tuple[int, bytes]:
        """Get System GUID (22.14): the machine's UUID, least significant byte first (20.8)."""
        return OK, wire_guid(self.uuid)

    def capabilities(self, _data: bytes) -> tuple[int, bytes]:
        """Get Chassis Capabilities (28.1)."""
        return OK, bytes((0, 0x20, 0x20, 0x20, 0x20))

    def status(self, _data: bytes) -> tuple[int, bytes]:
        """Get Chassis Status (28.2): bit 0 of the first byte is the power, 40h says that identify is supported."""
        identify = 0x10 if self.now() < self.identify_until else 0
        return OK, bytes((int(self.reported_power()), 0, 0x40 | identify))

    def identify(self, data: bytes) -> tuple[int, bytes]:
        """Chassis Identify (28.5): seconds (15 when not given), or until further notice by bit 0 of byte 2."""
        seconds = float("inf") if len(data) > 1 and data[1] & 1 else float(data[0] if data else 15)
        self.identify_until = self.now() + seconds
        return OK, b""

    def set_options(self, data: bytes) -> tuple[int, bytes]:
        """Set System Boot Options (28.12): parameters 0 to 7 are kept; 3 and 5 have an effect."""
        if not data:
            return REQUEST_TOO_SHORT, b""
        parameter = data[0] & 0x7F
        if parameter > 7:
            return PARAMETER_NOT_SUPPORTED, b""
        if len(data) < (6 if parameter == FLAGS_PARAMETER else 2):
            return (OK, b"") if len(data) == 1 else (REQUEST_TOO_SHORT, b"")
        self.options[parameter] = data[1:6] if parameter == FLAGS_PARAMETER else data[1:]
        if parameter == FLAGS_PARAMETER:
            self.options_set = self.now()
        return OK, b""

    def get_options(self, data: bytes) -> tuple[int, bytes]:
        """Get System Boot Options (28.13)."""
        if not data:
            return REQUEST_TOO_SHORT, b""
        self.flags()  # void them when their time is over
        parameter = data[0] & 0x7F
        if parameter not in self.options:
            return PARAMETER_NOT_SUPPORTED, b""
        return OK, bytes((1, parameter)) + self.options[parameter]


CONTROL = (NETFN_CHASSIS, 0x02)
SET_PRIVILEGE, CLOSE_SESSION = (NETFN_APP, 0x3B), (NETFN_APP, 0x3C)
AUTH_CAPABILITIES, CIPHER_SUITES, SYSTEM_GUID = (NETFN_APP, 0x38), (NETFN_APP, 0x54), (NETFN_APP, 0x37)

Handler = Callable[[Chassis, bytes], tuple[int, bytes]]

# (network function, command): the name that faults and counters use, the privilege that it takes, the method
COMMANDS: dict[tuple[int, int], tuple[str, int, Handler]] = {
    (NETFN_APP, 0x01): ("device-id", USER, Chassis.device_id),
    SYSTEM_GUID: ("guid", USER, Chassis.guid),
    (NETFN_CHASSIS, 0x00): ("capabilities", USER, Chassis.capabilities),
    (NETFN_CHASSIS, 0x01): ("status", USER, Chassis.status),
    (NETFN_CHASSIS, 0x04): ("identify", OPERATOR, Chassis.identify),
    (NETFN_CHASSIS, 0x08): ("set-boot", OPERATOR, Chassis.set_options),
    (NETFN_CHASSIS, 0x09): ("get-boot", OPERATOR, Chassis.get_options),
}


def wire_guid(uuid: UUID) -> bytes:
    """A UUID as IPMI sends it: RFC 4122's bytes in reverse."""
    return uuid.bytes[::-1]

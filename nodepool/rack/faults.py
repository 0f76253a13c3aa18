"""How a BMC can misbehave, as one frozen record that may be replaced while the BMC runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from nodepool.rack import RackError, phases
from nodepool.rack.wire import SUITES

STAGES = ("", "open", "rakp1", "rakp3", "setpriv", "cmd", "answer", "all")


@dataclass(frozen=True, slots=True)
class Faults:
    """The default is a BMC without faults.

    `silent`: the stage from which on nothing is answered: open, rakp1, rakp3, setpriv, cmd (commands are dropped),
    answer (commands are carried out, their answers lost), all.  `refuse` maps names of commands (status, control,
    set-boot, get-boot, identify, device-id, guid, set-privilege, close) to completion codes.
    """

    silent: str = ""
    full: bool = False  # no free session
    suites: tuple[int, ...] = (3, 17)  # the cipher suites that are accepted
    tag0: bool = False  # a failed login is answered with tag 0 and session id 0, as OpenBMC does
    zero_code: bool = False  # RAKP message 2 proves nothing: its code is all zeros
    lag: float = 0.0  # seconds that the reported power stays behind the true one
    stuck: bool = False  # power commands are accepted and nothing happens
    refuse: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    drop: float = 0.0  # share of answers that are lost
    duplicate: float = 0.0  # share of answers that arrive twice
    delay: float = 0.0  # seconds before an answer leaves
    fail: tuple[str, ...] = ()  # phases of a simulated machine that fail; those without a report never end
    hang: tuple[str, ...] = ()  # phases of a simulated machine that make no progress

    @property
    def ails_machine(self) -> bool:
        """Whether more than the BMC is concerned; only simulated machines can be told so."""
        return bool(self.fail or self.hang)

    def described(self) -> list[str]:
        """What is not as it should be, as `NAME=VALUE`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return [f"{name}={_text(value)}" for name, value in values.items() if value != getattr(NO_FAULTS, name)]

    def with_fault(self, text: str) -> Faults:
        """This record with `NAME[=VALUE]` applied, as the command line writes it.

        Examples: `silent=rakp1`, `full`, `suites=17`, `lag=8`, `refuse=control:0xc0`, `drop=0.3`, `stuck=no`.
        Raises RackError with what is allowed.
        """
        name, _, value = text.partition("=")
        name = name.strip().replace("-", "_")
        known = {item.name for item in fields(self)}
        if name not in known:
            raise RackError(f"there is no fault {name!r}; the faults are {', '.join(sorted(known))}")
        try:
            changes: dict[str, Any] = {name: _PARSERS.get(name, _share)(value)}
            return replace(self, **changes)
        except (ValueError, KeyError):
            raise RackError(f"fault {name} does not take {value!r}; {_ALLOWED.get(name, _ALLOWED['drop'])}") from None


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{name}:{code:#x}" for name, code in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "yes" if value is True else str(value)


def _stage(value: str) -> str:
    if value not in STAGES:
        raise ValueError(value)
    return value


def _switch(value: str) -> bool:
    return {"": True, "yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}[value.lower()]


def _suites(value: str) -> tuple[int, ...]:
    return tuple(SUITES[int(word)].number for word in value.split(",") if word)


def _seconds(value: str) -> float:
    seconds = float(value)
    if not 0 <= seconds < 86400:
        raise ValueError(value)
    return seconds


def _share(value: str) -> float:
    share = float(value)
    if not 0 <= share <= 1:
        raise ValueError(value)
    return share


def _phases(value: str) -> tuple[str, ...]:
    return tuple({word: phases.DEFAULT[word] for word in value.split(",") if word})


def _codes(value: str) -> Mapping[str, int]:
    codes = {}
    for item in filter(None, value.split(",")):
        name, _, code = item.partition(":")
        codes[name] = int(code, 0) & 0xFF
    return MappingProxyType(codes)


_PARSERS: dict[str, Callable[[str], Any]] = {
    "silent": _stage,
    "full": _switch,
    "tag0": _switch,
    "zero_code": _switch,
    "stuck": _switch,
    "suites": _suites,
    "lag": _seconds,
    "delay": _seconds,
    "refuse": _codes,
    "fail": _phases,
    "hang": _phases,
}
_PHASES = f"give one or more of {', '.join(phases.DEFAULT)}"
_SWITCH, _SECONDS = "give yes or no, or nothing for yes", "give seconds, e.g. 8"
_ALLOWED = {
    "silent": "give one of " + ", ".join(STAGES[1:]),
    "full": _SWITCH,
    "tag0": _SWITCH,
    "zero_code": _SWITCH,
    "stuck": _SWITCH,
    "suites": "give 3, 17 or 3,17",
    "lag": _SECONDS,
    "delay": _SECONDS,
    "refuse": "give COMMAND:CODE, e.g. control:0xc0",
    "fail": _PHASES,
    "hang": _PHASES,
    "drop": "give a share between 0 and 1",
}

NO_FAULTS = Faults()

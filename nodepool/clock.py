"""The only source of time.

Points in time are signed 64-bit microseconds UTC since 1970 (store, events, deadlines); durations are seconds.
`SystemClock` is the machine's; `VirtualClock` stands still until somebody moves it, which is how the whole daemon runs
single-threaded in scenario tests.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol

SECOND = 1_000_000


class Clock(Protocol):
    """Tells the time."""

    def now(self) -> int:
        """Microseconds UTC."""
        ...


class SystemClock:
    """The machine's own time, which never goes back: set back while we run, ours goes on from where it was.

    Otherwise whatever was due in a minute would be due in a minute and an hour.
    """

    def __init__(self) -> None:
        self._boot = 0

    def now(self) -> int:
        """Microseconds UTC."""
        since_boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._boot = max(self._boot, time.time_ns() - since_boot)
        return (self._boot + since_boot) // 1000


class VirtualClock:
    """A time that moves only when told to."""

    def __init__(self, start: int = 1_700_000_000 * SECOND) -> None:
        self._now = start

    def now(self) -> int:
        """Microseconds UTC."""
        return self._now

    def move_to(self, when: int) -> None:
        """Go forward to `when`; never back."""
        self._now = max(self._now, when)

    def advance(self, seconds: float) -> None:
        """Go forward by `seconds`."""
        self._now += micros(seconds)


def micros(seconds: float) -> int:
    """Seconds as microseconds."""
    return int(seconds * SECOND)


def rfc3339(when: int) -> str:
    """Microseconds UTC as RFC 3339 with Z and milliseconds, e.g. `2026-11-20T04:37:11.123Z`."""
    return datetime.fromtimestamp(when / SECOND, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def seconds_between(start: int, end: int) -> float:
    """The duration from `start` to `end` in seconds."""
    return (end - start) / SECOND


def age(seconds: float) -> str:
    """A duration as upstream's Nodepool prints it: `DD:HH:MM:SS`."""
    whole = max(0, int(seconds))
    minutes, secs = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days:02d}:{hours:02d}:{minutes:02d}:{secs:02d}"

"""Running loops: each in a thread that sleeps until it is due or woken, or all in one under a virtual clock."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from nodepool.clock import SECOND, Clock, VirtualClock, seconds_between
from nodepool.errors import OutOfOffice, StoreUnavailable

log = logging.getLogger("nodepool.loops")

T = TypeVar("T")


class Loop(Protocol):
    """Something that is done again and again."""

    def pass_once(self) -> int:
        """Do what can be done now; gives when to look again (microseconds UTC), 0 when only a wake-up can bring it."""
        ...


class LoopThread:
    """A loop in a thread.  A wake-up carries nothing; many of them during one pass cause one more pass."""

    def __init__(self, name: str, loop: Loop, clock: Clock, lost_office: Callable[[], None]) -> None:
        self.name = name
        self._loop = loop
        self._clock = clock
        self._lost_office = lost_office
        self._woken = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Pass again soon."""
        self._woken.set()

    def stop(self, timeout: float) -> bool:
        """Let the pass that is under way end, and no other begin; says whether it did in time (seconds)."""
        self._stopping = True
        self._woken.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping:
            self._woken.clear()
            try:
                next_at = self._loop.pass_once()
            except OutOfOffice as error:
                log.error("%s: %s", self.name, error)  # noqa: TRY400 - a sentence is enough
                self._lost_office()
                return
            except StoreUnavailable as error:
                log.warning("%s: %s; trying again, nothing is lost", self.name, error)
                next_at = self._clock.now() + SECOND
            except Exception:
                log.exception("%s: unexpected; going on in 5 s", self.name)
                next_at = self._clock.now() + 5 * SECOND
            if self._stopping:
                return
            wait = None if not next_at else max(0.0, seconds_between(self._clock.now(), next_at))
            self._woken.wait(wait)


class ThreadedExecutor:
    """A bounded pool of worker threads."""

    def __init__(self, workers: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self._free = workers
        self._lock = threading.Lock()

    def free(self) -> int:
        """How many workers are idle."""
        return self._free

    def submit(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        """Run `work` in a worker and hand what it gives to `then` there."""
        with self._lock:
            self._free -= 1

        def run() -> None:
            result = work()
            with self._lock:
                self._free += 1
            then(result)

        self._pool.submit(run)

    def stop(self) -> None:
        """Take no more work; what runs is not waited for: it is written down and will be looked at again."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class InlineExecutor:
    """Runs everything at once, in the caller's thread: for a virtual clock, and for steps that never block."""

    def free(self) -> int:
        """Always one."""
        return 1

    def submit(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        """Run it."""
        then(work())


def run_until(
    loops: Sequence[Loop],
    clock: VirtualClock,
    done: Callable[[], bool],
    limit: float,
    settled: Callable[[], bool] | None = None,
) -> bool:
    """Run loops one after the other in this thread, moving the clock from due time to due time.

    Ends when `done` says so, or after `limit` seconds of virtual time; says which.  `settled` says whether the last
    round has written nothing: before that the clock does not move.
    """
    end = clock.now() + int(limit * SECOND)
    while not done():
        due = [next_at for loop in loops if (next_at := loop.pass_once())]
        if settled is not None and not settled():
            continue  # one of them has written what another will act on: time stands still for that
        if done():
            return True
        if clock.now() >= end:
            return False
        ahead = min((when for when in due if when > clock.now()), default=end)
        if not any(when <= clock.now() for when in due):
            clock.move_to(min(ahead, end))
    return True

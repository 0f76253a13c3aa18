"""Running loops: each in a thread that sleeps until it is due or woken, or all in one under a virtual clock."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
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

    def end(self) -> None:
        """Begin no other pass."""
        self._stopping = True
        self._woken.set()

    def stop(self, timeout: float) -> bool:
        """Let the pass that is under way end, and no other begin; says whether it did in time (seconds)."""
        self.end()
        if self._thread.ident is not None:
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
                log.debug("%s: %s", self.name, error)  # the store has said it
                next_at = self._clock.now() + SECOND
            except Exception:
                log.exception("%s: unexpected; going on in 5 s", self.name)
                next_at = self._clock.now() + 5 * SECOND
            if self._stopping:
                return
            wait = None if not next_at else max(0.0, seconds_between(self._clock.now(), next_at))
            self._woken.wait(wait)


class ThreadedExecutor:
    """A bounded pool of worker threads.

    They are daemon threads, unlike those of concurrent.futures, which the interpreter waits for when it ends: a login
    that hangs must not hold up the end of the daemon.
    """

    def __init__(self, workers: int, name: str) -> None:
        self._name = name
        self._workers = workers
        self._free = workers
        self._lock = threading.Lock()
        self._stopped = False
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def free(self) -> int:
        """How many workers are idle."""
        return self._free

    def submit(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        """Run `work` in a worker and hand what it gives to `then` there; after `stop` nothing is begun."""

        def run() -> None:
            try:
                result = work()
            finally:
                with self._lock:
                    self._free += 1
            then(result)

        with self._lock:
            if self._stopped:
                return
            self._free -= 1
            if self._workers - self._free > len(self._threads):
                name = f"{self._name}-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
                self._threads[-1].start()
        self._jobs.put(run)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._stopped:
                job()

    def stop(self, timeout: float = 0.0) -> bool:
        """Take no more work; says whether what runs has ended within `timeout` seconds.

        What has not is written down and will be looked at again.
        """
        with self._lock:
            self._stopped = True
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


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

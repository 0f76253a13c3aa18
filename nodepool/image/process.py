"""One command of a build: its output in the log, its life bounded by the build's deadline and by cancellation.

A command gets a session of its own, so that the whole family can be ended.  `sudo` puts its children into yet other
sessions (`use_pty`) and a chroot outlives the shell that made it: whoever descends from the command is remembered,
asked to end (diskimage-builder unmounts what it has mounted then) and killed when it does not.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from nodepool.errors import Code, Permanent

_LOOK = 0.25  # seconds between two looks at cancellation and deadline: an Event cannot be waited for beside a pipe
_DRAIN = 3.0  # seconds for the last output of a command that has ended
_GRACE = 15.0  # seconds to unmount and to go in peace
_HURRY = 2.0  # the same when the daemon is being stopped, which has 5 s; the next start unmounts what is left


@dataclass(frozen=True, slots=True)
class Work:
    """What bounds all commands of one build: its log, its end (`time.monotonic` seconds), and its cancellation."""

    log: Path
    deadline: float
    timeout: float
    cancelled: Event = field(default_factory=Event)

    def check(self) -> None:
        """Raise `Permanent` when the build was cancelled or has taken longer than it may."""
        if self.cancelled.is_set():
            raise Permanent("the build was cancelled", Code.CANCELLED)
        if time.monotonic() > self.deadline:
            raise Permanent(
                f"the build took longer than its build-timeout of {self.timeout:g} s; log: {self.log}", Code.IMAGE_BUILD
            )


def bounded(log: Path, timeout: float, cancelled: Event) -> Work:
    """A `Work` that may take `timeout` seconds from now."""
    return Work(log, time.monotonic() + timeout, timeout, cancelled)


def execute(
    work: Work,
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> int:
    """Run `command` to its end and return its exit status (negative: the signal that ended it).

    Both outputs go to the work's log; `on_line` sees each line of them too.  Raises `Permanent` when the command cannot
    be started, and as `Work.check` does: nothing of the command is left then.
    """
    work.check()
    with work.log.open("ab", buffering=0) as log:
        try:
            process = subprocess.Popen(  # closed and waited for below
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        except OSError as err:
            raise Permanent(f"cannot start {command[0]}: {err.strerror}", Code.IMAGE_BUILD) from err
        assert process.stdout is not None
        try:
            _follow(work, process, log.write, on_line)
        finally:
            if process.poll() is None:
                end_family(process.pid, _HURRY if work.cancelled.is_set() else _GRACE)
            process.stdout.close()
            process.wait()
    return process.returncode


def _follow(
    work: Work,
    process: subprocess.Popen[bytes],
    write: Callable[[bytes], object],
    on_line: Callable[[str], None] | None,
) -> None:
    """Copy output until the command has ended and said its last; somebody in its background may keep the pipe."""
    assert process.stdout is not None
    out = process.stdout.fileno()
    poller = select.poll()
    poller.register(out, select.POLLIN)
    rest = b""
    ended_at = 0.0
    while True:
        work.check()
        if poller.poll(_LOOK * 1000):
            chunk = os.read(out, 65536)
            if not chunk:
                break
            write(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines if on_line else ():
                on_line(line.decode(errors="replace"))  # type: ignore[misc]
        elif process.poll() is not None:
            ended_at = ended_at or time.monotonic()
            if time.monotonic() > ended_at + _DRAIN:
                break
    while process.poll() is None:
        work.check()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK)


def end_family(pid: int, grace: float = _GRACE) -> None:
    """End the process `pid` and all that descend from it: SIGTERM, and SIGKILL for who is left after `grace` s."""
    family = _family(pid)
    _signal(family, signal.SIGTERM)
    until = time.monotonic() + grace
    while time.monotonic() < until:
        family |= {item for member in family for item in _family(member[0])}
        family = {member for member in family if _started(member[0]) == member[1]}
        if not family:
            return
        time.sleep(0.05)
    _signal(family, signal.SIGKILL)


def _signal(family: set[tuple[int, int]], number: signal.Signals) -> None:
    for pid, started in family:
        if _started(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _family(pid: int) -> set[tuple[int, int]]:
    """(process id, start time) of a process and of all its descendants; the start time tells a reused id."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: set[tuple[int, int]] = set()
    todo = [pid]
    while todo:
        member = todo.pop()
        if started := _started(member):
            found.add((member, started))
        todo += children.get(member, [])
    return found


def _started(pid: int) -> int:
    """When a process was started, in ticks since boot; 0 when there is none, or only its remains (proc(5), stat)."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from `state` on; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []

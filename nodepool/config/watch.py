"""The configuration in force while the daemon runs: a changed file is taken over, a broken edit is not."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from nodepool.config.reader import load_checked
from nodepool.config.records import Config
from nodepool.errors import ConfigError

LOG = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int, int, int] | None, ...]


def stamp(*paths: Path | None) -> Stamp:
    """What tells one content of files from the next: device, inode, size, mtime and ctime in ns; None: not there.

    ctime is among them because a `chmod` is what mends a secrets file that others may read.
    """
    return tuple(_stamp(path) for path in paths if path is not None)


def _stamp(path: Path) -> tuple[int, int, int, int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class ConfigFile:
    """The last good configuration of a pair of files.

    `current` is in force; `problems` are those of the last attempt, empty when it was good.  Not safe for use by
    several threads at once: one loop calls `refresh`, others read `current`.
    """

    def __init__(self, path: Path, secure: Path | None = None, env: Mapping[str, str] = os.environ) -> None:
        """Read the files; ConfigError when they cannot be used, since there is nothing to fall back on."""
        self.path = path
        self.secure = secure
        self._env = env
        self._seen = stamp(path, secure)  # before reading: a change in between is then seen by the next look
        loaded = load_checked(path, secure, env)
        self.current: Config = loaded.config
        self.problems: tuple[str, ...] = ()
        _say_warnings(loaded.warnings)

    def refresh(self) -> Config | None:
        """The new configuration when the files have changed for good, else None; a broken edit is said once.

        Costs two stat calls while nothing changes, so that it can be called every second.
        """
        seen = stamp(self.path, self.secure)
        if seen == self._seen:
            return None
        try:
            loaded = load_checked(self.path, self.secure, self._env)
        except ConfigError as error:
            if stamp(self.path, self.secure) == seen:  # else somebody is writing at this moment: look again later
                self._seen = seen
                self._say_problems(error.problems)
            return None
        self._seen = seen
        was_broken, self.problems = bool(self.problems), ()
        if loaded.config.generation == self.current.generation:
            if was_broken:
                LOG.info("%s is good again; generation %s stays in force", self.path, self.current.generation)
            return None
        LOG.info("%s: generation %s is in force now", self.path, loaded.config.generation)
        _say_warnings(loaded.warnings)
        self.current = loaded.config
        return self.current

    def _say_problems(self, problems: tuple[str, ...]) -> None:
        if problems == self.problems:
            return
        self.problems = problems
        LOG.error(
            "the changed configuration is not used, generation %s stays in force: %d problem%s\n%s",
            self.current.generation,
            len(problems),
            "" if len(problems) == 1 else "s",
            "\n".join(problems),
        )


def _say_warnings(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        LOG.warning("%s", warning)

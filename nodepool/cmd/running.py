"""A running daemon: every part started in its order, and ended in the reverse of it."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodepool import __version__
from nodepool.api.app import create_app
from nodepool.api.server import ApiServer
from nodepool.boot.network import NetworkBoot
from nodepool.clock import SECOND, Clock, rfc3339
from nodepool.cmd.wiring import Current, Daemon, Parts, revive
from nodepool.config import ConfigFile
from nodepool.config.records import Config, DiskImage, Provider
from nodepool.coord.local import LocalReferee, Lock, file_lock, server_lock
from nodepool.drivers import fake, metal
from nodepool.drivers.power import open_power
from nodepool.drivers.step import Ports
from nodepool.errors import NodepoolError
from nodepool.image.make import ImagePaths, ImageResult, make_image
from nodepool.loops.launcher import Kit
from nodepool.loops.running import Loop, LoopThread, ThreadedExecutor
from nodepool.metrics import Metrics, NoMetrics, StatsdMetrics
from nodepool.service.agents import Desk
from nodepool.ssh import SshShell, ensure_key
from nodepool.store import open_store

log = logging.getLogger("nodepool.daemon")


class ConfigLoop:
    """Picks up an edited YAML; a broken edit keeps the one before in force."""

    EVERY = 2

    def __init__(self, file: ConfigFile, clock: Clock, put: Callable[[Config], None]) -> None:
        self.sentence = f"generation {file.current.generation} in force"
        self._in_force = file.current
        self._file = file
        self._clock = clock
        self._put = put

    def pass_once(self) -> int:
        """Look at the files."""
        self._file.refresh()
        problems = self._file.problems
        if self._file.current is not self._in_force:
            problems = problems or self._bring_into_force(self._file.current)
        in_force = f"generation {self._in_force.generation} in force"
        self.sentence = f"{in_force}; the edit since then is broken: {problems[0]}" if problems else in_force
        return self._clock.now() + self.EVERY * SECOND

    def _bring_into_force(self, config: Config) -> tuple[str, ...]:
        """Why it cannot be; then it is tried again at the next look."""
        try:
            self._put(config)
        except (NodepoolError, OSError) as error:
            if str(error) not in self.sentence:
                log.error("generation %s cannot be brought into force: %s", config.generation, error)  # noqa: TRY400
            return (str(error),)
        self._in_force = config
        return ()


class Service:
    """All parts of one daemon."""

    def __init__(self, file: ConfigFile, clock: Clock, on_fatal: Callable[[], None]) -> None:
        config = file.current
        self.lost_office = False
        self._file = file
        self._on_fatal = on_fatal
        self._started = clock.now()
        self._current = Current(config)
        self._store = open_store(config.database, clock)
        self._referee = LocalReferee(self._store, self._lock())
        self._office = self._referee.take_office()
        self._desk = Desk(self._store, self._current)
        self._world = fake.World(Desk(self._store, self._current), clock)  # each end hears of its own agents' work
        self._world.configure(config)
        revive(self._store, self._world)
        self._power = open_power(lambda: not self.lost_office)
        self._steps = ThreadedExecutor(config.launch_workers, "step")
        self._builds = ThreadedExecutor(1, "build")
        self._network = NetworkBoot(lambda: self._current().config, self._desk, config.socket.parent / "boot", clock)
        kits = {
            "metal": Kit(metal.JOBS, metal.entry, self._metal_ports),
            "fake": Kit(fake.JOBS, fake.entry, self._fake_ports, blocking=False),
        }
        to = config.statsd
        self._metrics: Metrics = StatsdMetrics(to.host, to.port, to.prefix) if to else NoMetrics()
        parts = Parts(kits, make, self._steps, self._builds, self._metrics)
        others: dict[str, Loop] = {
            "world": self._world,
            "network": self._network,
            "configuration": ConfigLoop(file, clock, self._put),
        }
        self._daemon = Daemon(self._store, self._current, parts, others)
        self._daemon.take_office(self._office)
        self._threads = {name: LoopThread(name, loop, clock, self._lose) for name, loop in self._daemon.loops.items()}
        app = create_app(self._store, self._current, lambda: self._daemon.planner.reasons, self._status)
        self._api = ApiServer(app, config.socket)

    def start(self) -> None:
        """Begin; raises NodepoolError when something that people must see to is in the way."""
        for provider in self._current().config.providers.values():
            ensure_key(provider.ssh.key)
        wakes = [thread.wake for name, thread in self._threads.items() if name != "configuration"]
        self._store.wake.extend([*wakes, self._network.wake])
        self._daemon.launcher.wake = self._threads["launcher"].wake
        self._daemon.builder.wake = self._threads["builder"].wake
        self._world.wake = self._threads["world"].wake
        self._network.start()
        self._api.start()
        for thread in self._threads.values():
            thread.start()

    def stop(self, seconds: float) -> None:
        """End within `seconds`; what runs on is written down and will be looked at again after the next start."""
        until = time.monotonic() + seconds
        for thread in self._threads.values():
            thread.end()
        self._daemon.builder.stop()
        self._api.stop()
        self._steps.stop()
        self._power.close()
        for thread in self._threads.values():
            if not thread.stop(max(0.1, until - time.monotonic())):
                log.warning("%s did not end in time", thread.name)
        self._network.stop()
        if not self._builds.stop(max(0.1, until - time.monotonic())):
            log.warning("an image build did not end in time; what it leaves is removed at the next start")
        self._metrics.close()
        self._store.close()
        self._referee.leave()

    def reload(self) -> None:
        """Look at the YAML now."""
        self._threads["configuration"].wake()

    def _put(self, config: Config) -> None:
        for provider in config.providers.values():
            ensure_key(provider.ssh.key)
        self._world.configure(config)
        self._current.put(config)
        self._network.refresh()
        for thread in self._threads.values():
            thread.wake()

    def _lose(self) -> None:
        """Somebody else is in office: nothing may be done any more."""
        self.lost_office = True
        self._on_fatal()

    def _lock(self) -> Lock:
        path = self._store.path
        return server_lock(self._store.engine) if path is None else file_lock(path.with_name(path.name + ".lock"))

    @functools.cache  # noqa: B019 - one daemon per process, a handful of providers
    def _shell(self, key: Path) -> tuple[SshShell, str]:
        return SshShell(key), ensure_key(key)

    def _metal_ports(self, provider: Provider) -> Ports:
        shell, public = self._shell(provider.ssh.key)
        return Ports(self._power, shell, public)

    def _fake_ports(self, provider: Provider) -> Ports:
        return Ports(self._world, self._world, self._shell(provider.ssh.key)[1], pace=min(1.0, provider.fake.delay))

    def _status(self) -> dict[str, Any]:
        config = self._current().config
        return {
            "version": __version__,
            "started": rfc3339(self._started),
            "generation": config.generation,
            "problems": list(self._file.problems),
            "database": self._store.trouble,
            "held_back": list(self._daemon.planner.alarms),
            "office": {"scope": self._office.scope, "epoch": self._office.epoch},
            "loops": {name: getattr(loop, "sentence", "") for name, loop in self._daemon.loops.items()},
        }


def make(
    image: DiskImage,
    build_id: str,
    config: Config,
    progress: Callable[[str, float | None], None],
    cancelled: threading.Event,
) -> ImageResult:
    """Build an image by diskimage-builder (loops.builder.Make)."""
    logs = config.build_log_dir or config.images_dir / "logs"
    paths = ImagePaths(config.images_dir, logs, config.elements_dir, config.build_log_retention)
    return make_image(image, build_id, paths, progress, cancelled)

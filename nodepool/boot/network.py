"""Network boot as a whole: the listener and a dnsmasq per network that bare machines are on, as the YAML says now."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nodepool.boot.dnsmasq import own_address
from nodepool.boot.server import Dnsmasq
from nodepool.clock import SECOND, Clock, SystemClock
from nodepool.config.records import Config, MachineSpec, Network
from nodepool.door import AgentDoor
from nodepool.errors import NodepoolError

if TYPE_CHECKING:
    from nodepool.boot.listener import Listener

log = logging.getLogger("nodepool.boot")

AGAIN, EVERY = 5, 30  # seconds between two looks: when something could not be had, and when all is well


class NetworkBoot:
    """Starts, follows and stops what machines need to boot over the network."""

    def __init__(self, config: Callable[[], Config], door: AgentDoor, folder: Path, clock: Clock | None = None) -> None:
        """`config` gives the configuration in force; each network's files are in a folder of its name in `folder`."""
        self._config = config
        self._door = door
        self._folder = folder
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()  # of what follows: `refresh` may be called from any thread
        self._listener: Listener | None = None
        self._servers: dict[str, Dnsmasq] = {}
        self._applied: Config | None = None
        self._problems: tuple[str, ...] = ()
        self._again_at = 0  # when to try again what could not be had
        self._running = False

    @property
    def sentence(self) -> str:
        """How it goes, for people."""
        servers = list(self._servers.values())
        said = [*self._problems, *(server.sentence for server in servers)]
        if self._listener is not None and not self._problems:
            said.append(f"{self._listener.held} agents wait for work")
        return "; ".join(said) or "no provider has machines that boot over the network"

    def start(self) -> None:
        """Serve the networks of the configuration.

        NodepoolError with the remedy when one cannot be served; nothing is left then.
        """
        with self._lock:
            self._running = True
            self._apply()
        if self._problems:
            self.stop()
            raise NodepoolError(self._problems[0])

    def stop(self) -> None:
        """End everything; held polls are answered first."""
        with self._lock:
            self._running = False
            if self._listener is not None:
                self._listener.stop()
                self._listener = None
            for server in self._servers.values():
                server.stop()
            self._servers = {}

    def refresh(self) -> None:
        """Serve as the configuration says now; what cannot be is said and tried again later."""
        with self._lock:
            if not self._running:
                return
            before = self._problems
            self._apply()
            for problem in self._problems:
                if problem not in before:
                    log.warning("%s", problem)

    def pass_once(self) -> int:
        """Refresh when the configuration has changed or something was missing.

        Gives when to look again (microseconds UTC).
        """
        now = self._clock.now()
        if self._config() is not self._applied or (self._problems and now >= self._again_at):
            self.refresh()
            self._again_at = now + AGAIN * SECOND
        return self._again_at if self._problems else now + EVERY * SECOND

    def wake(self) -> None:
        """Something was committed: agents that wait may have work.  Called from any thread, never blocks."""
        listener = self._listener
        if listener is not None:
            listener.wake()

    def _apply(self) -> None:
        config = self._config()
        machines = _machines(config)
        networks = {name: config.networks[name] for name in machines}
        self._problems = (*self._listen(networks), *self._run_servers(networks, machines))
        self._applied = config

    def _listen(self, networks: Mapping[str, Network]) -> list[str]:
        if self._listener is None:
            if not networks:
                return []
            from nodepool.boot.listener import Listener

            self._listener = Listener(self._door, self._folders)
            self._listener.start()
        places = {(own_address(network), network.port): name for name, network in networks.items()}
        refused = self._listener.serve(places)
        return [f"network {places[place]}: {sentence}" for place, sentence in refused.items()]

    def _folders(self) -> Mapping[str, Path]:
        config = self._config()
        return {"agent": config.agent_dir, "images": config.images_dir}

    def _run_servers(
        self, networks: Mapping[str, Network], machines: Mapping[str, tuple[MachineSpec, ...]]
    ) -> list[str]:
        managed = {name for name, network in networks.items() if network.dhcp == "managed"}
        for name in set(self._servers) - managed:
            self._servers.pop(name).stop()
        problems = []
        for name in sorted(managed):
            server = self._servers.get(name)
            try:
                if server is not None:
                    server.update(networks[name], machines[name])
                else:
                    server = Dnsmasq(networks[name], machines[name], self._folder / name)
                    server.start()
                    self._servers[name] = server
            except NodepoolError as error:
                problems.append(str(error))
        return problems


def _machines(config: Config) -> dict[str, tuple[MachineSpec, ...]]:
    """The machines on each network that a `metal` provider uses."""
    found: dict[str, tuple[MachineSpec, ...]] = {}
    for provider in config.providers.values():
        if provider.driver == "metal" and provider.network in config.networks:
            found[provider.network] = found.get(provider.network, ()) + provider.machines
    return found

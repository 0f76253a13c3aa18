"""Metrics over statsd, under upstream's names; without an address they go nowhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import statsd

from nodepool.clock import SECOND
from nodepool.model import Node, NodeState

Counts = Counter[tuple[str, str, str, NodeState]]  # provider, pool, label, state -> nodes


class Metrics(Protocol):
    """What the loops tell."""

    gauges_every: float  # seconds between two reports of the gauges; 0: never

    def launch(self, node: Node) -> None:
        """A launch has ended: the node is READY, or FAILED with its code."""
        ...

    def nodes(self, counts: Counts, limits: Iterable[tuple[str, int]]) -> None:
        """How many nodes there are; and the most that each provider may have."""
        ...

    def build(self, image: str, seconds: float, size: int, *, good: bool) -> None:
        """A build of an image has ended."""
        ...

    def close(self) -> None:
        """Tell no more."""
        ...


class NoMetrics:
    """Tells nobody."""

    gauges_every = 0.0

    def launch(self, node: Node) -> None:
        """Nothing."""

    def nodes(self, counts: Counts, limits: Iterable[tuple[str, int]]) -> None:
        """Nothing."""

    def build(self, image: str, seconds: float, size: int, *, good: bool) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class StatsdMetrics:
    """UDP to a statsd; a server that is not there is no error.

    Names (upstream's): gauges nodes.STATE, label.L.nodes.STATE, provider.P.nodes.STATE, provider.P.max_servers; timers
    and counters launch.RESULT, launch.provider.P.RESULT, launch.image.I.RESULT with RESULT ready or error.CODE; gauges
    dib_image_build.I.FORMAT.size, .status.rc, timer .status.duration.
    """

    def __init__(self, host: str, port: int, prefix: str) -> None:
        self.gauges_every = 10.0
        self._client = statsd.StatsClient(host, port, prefix=prefix or None)
        self._known: set[str] = set()  # gauges that were told: they must be told when they are down to 0

    def launch(self, node: Node) -> None:
        """Timers in milliseconds, and counters of the same name."""
        ready = node.state is NodeState.READY
        result = "ready" if ready else f"error.{node.failure_code or 'unknown'}"
        milliseconds = ((node.ready_at if ready else node.failed_at) - node.created_at) * 1000 / SECOND
        with self._client.pipeline() as pipe:
            for name in (
                f"launch.{result}",
                f"launch.provider.{_word(node.provider)}.{result}",
                f"launch.image.{_word(node.image)}.{result}",
            ):
                pipe.timing(name, milliseconds)
                pipe.incr(name)

    def nodes(self, counts: Counts, limits: Iterable[tuple[str, int]]) -> None:
        """Gauges by state, label and provider."""
        gauges: Counter[str] = Counter()
        for (provider, _pool, label, state), count in counts.items():
            for prefix in ("", f"label.{_word(label)}.", f"provider.{_word(provider)}."):
                gauges[f"{prefix}nodes.{state}"] += count
        for provider, limit in limits:
            gauges[f"provider.{_word(provider)}.max_servers"] += limit
        with self._client.pipeline() as pipe:
            for name in self._known | gauges.keys():
                pipe.gauge(name, gauges[name])
        self._known |= gauges.keys()

    def build(self, image: str, seconds: float, size: int, *, good: bool) -> None:
        """Size in bytes, duration in milliseconds, rc as a program's exit status."""
        name = f"dib_image_build.{_word(image)}"
        with self._client.pipeline() as pipe:
            if good:
                pipe.gauge(f"{name}.raw.size", size)
            pipe.gauge(f"{name}.status.rc", 0 if good else 1)
            pipe.timing(f"{name}.status.duration", seconds * 1000)

    def close(self) -> None:
        """Close the socket."""
        self._client.close()


def _word(name: str) -> str:
    """A name as one part of a metric's path."""
    return name.replace(".", "_").replace(":", "_").replace(" ", "_")

"""What the network side asks of the service, as a Protocol: boot knows no use cases, and the use cases no sockets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

Lines = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Expected:
    """A boot that is expected of a machine: it is to start the agent with this token."""

    machine: str
    token: str
    console: str = "ttyS0"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to an agent: an HTTP status and `key=value` lines."""

    status: int
    lines: Lines = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether it tells the agent to wait: the listener may hold such an answer until there is work."""
        return self.status == 200 and "wait" in self.lines


class AgentDoor(Protocol):
    """Implemented by `service.agents.Desk`; every method may block on the database and is safe to call from threads."""

    def expected_boot(self, mac: str) -> Expected | None:
        """The boot that is expected of the machine with this MAC; None: it is to boot its disk."""
        ...

    def hello(self, lines: Lines, peer: str) -> Reply:
        """An agent introduces itself."""
        ...

    def poll(self, lines: Lines, peer: str) -> Reply:
        """An agent reports, and asks what to do."""
        ...

    def may_fetch(self, path: str, peer: str) -> bool:
        """Whether a machine at this address has a use for this file now."""
        ...

    def changed(self) -> set[int]:
        """The boots for whose agents there may be work since the last call."""
        ...

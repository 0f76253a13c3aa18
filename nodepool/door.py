"""What the network side asks of the service, as a Protocol: boot knows no use cases, and the use cases no sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Call:
    """What an agent says, and from which address."""

    verb: str  # hello or poll
    lines: Lines
    peer: str


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

    def together(self, calls: Sequence[Call]) -> list[Reply]:
        """Several calls at the price of one; each is answered as if it had come alone."""
        ...

    def may_fetch(self, path: str, peer: str) -> bool:
        """Whether a machine at this address has a use for this file now."""
        ...

    def changed(self) -> set[int]:
        """The boots for whose agents there may be work since the last call."""
        ...

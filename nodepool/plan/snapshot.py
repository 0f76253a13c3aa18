"""The Snapshot: an index over the rows, folded from those that changed, so that a pass costs what changed.

Folding rows as they change, again or late, ends in the same index as building it anew from the last version of every
row; a property test holds it to that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from nodepool.errors import Code, Fault
from nodepool.lifecycle import FINAL
from nodepool.model import Build, BuildState, Machine, MachineState, Node, NodeState, Record, Request, Status
from nodepool.plan.guard import FREEZE

PoolKey = tuple[str, str]  # provider, pool
_K = TypeVar("_K")


@dataclass
class Trouble:
    """Failures since the last success, of a label or of an image."""

    last_success: int = 0
    failures: dict[int | str, int] = field(default_factory=dict)  # row id -> when

    def succeeded(self, when: int) -> None:
        """Forget what failed before `when`."""
        self.last_success = max(self.last_success, when)
        self.failures = {key: at for key, at in self.failures.items() if at > self.last_success}

    def failed(self, key: int | str, when: int) -> None:
        """Remember a failure, unless something has succeeded since."""
        if when > self.last_success:
            self.failures[key] = when

    @property
    def last_failure(self) -> int:
        """When it failed last; 0 when it works."""
        return max(self.failures.values(), default=0)


@dataclass
class Snapshot:
    """What there is.  Only `fold` changes it; `plan` reads it."""

    machines: dict[int, Machine] = field(default_factory=dict)
    machine_ids: dict[str, int] = field(default_factory=dict)
    nodes: dict[int, Node] = field(default_factory=dict)  # that are not deleted
    requests: dict[int, Request] = field(default_factory=dict)  # that are not over
    builds: dict[str, Build] = field(default_factory=dict)  # that are not over
    machines_in: dict[MachineState, set[int]] = field(default_factory=lambda: {state: set() for state in MachineState})
    nodes_in: dict[NodeState, set[int]] = field(default_factory=lambda: {state: set() for state in NodeState})
    free: dict[str, set[int]] = field(default_factory=dict)  # label -> READY nodes that nobody was promised
    counts: Counter[tuple[str, str, str, NodeState]] = field(default_factory=Counter)  # provider, pool, label, state
    servers: Counter[PoolKey] = field(default_factory=Counter)  # nodes that are not deleted
    building: Counter[str] = field(default_factory=Counter)  # label -> nodes being built
    label_trouble: dict[str, Trouble] = field(default_factory=dict)
    image_trouble: dict[str, Trouble] = field(default_factory=dict)
    frozen: str = ""  # why nothing is to be given out or wiped until an operator has looked
    let_go: str = ""  # the generation of the YAML that may lose any number of nodes at once

    @classmethod
    def of(cls, records: Iterable[Record]) -> Snapshot:
        """Build the index anew."""
        snapshot = cls()
        snapshot.fold(records)
        return snapshot

    def fold(self, records: Iterable[Record]) -> bool:
        """Take in rows that changed; says whether any of them mattered to the planner."""
        mattered = False
        for record in records:
            if isinstance(record, Machine):
                self._fold_machine(record)
            elif isinstance(record, Node):
                self._fold_node(record)
            elif isinstance(record, Request):
                self._fold_request(record)
            elif isinstance(record, Build):
                self._fold_build(record)
            elif isinstance(record, Status) and record.id == FREEZE:
                self.frozen, self.let_go = record.text, str(record.data.get("let_go", ""))
            else:
                continue
            mattered = True
        return mattered

    def machine(self, name: str) -> Machine | None:
        """The machine of this name."""
        found = self.machine_ids.get(name)
        return None if found is None else self.machines[found]

    def _fold_machine(self, machine: Machine) -> None:
        old = self.machines.get(machine.id)
        if old is not None:
            if old.version > machine.version:
                return
            self.machines_in[old.state].discard(old.id)
        self.machines[machine.id] = machine
        self.machine_ids[machine.name] = machine.id
        self.machines_in[machine.state].add(machine.id)

    def _fold_node(self, node: Node) -> None:
        old = self.nodes.get(node.id)
        if old is not None and old.version > node.version:
            return
        if old is not None:
            self._count(old, -1)
            self.nodes_in[old.state].discard(old.id)
            self.free.get(old.label, set()).discard(old.id)
            del self.nodes[old.id]
        if node.ready_at:
            self.label_trouble.setdefault(node.label, Trouble()).succeeded(node.ready_at)
        if node.failed_at and node.failure_code and Code(node.failure_code).fault not in (Fault.MACHINE, Fault.USER):
            self.label_trouble.setdefault(node.label, Trouble()).failed(node.id, node.failed_at)
        if node.state is NodeState.DELETED:
            return
        self.nodes[node.id] = node
        self._count(node, 1)
        self.nodes_in[node.state].add(node.id)
        if node.state is NodeState.READY and node.request_id is None:
            self.free.setdefault(node.label, set()).add(node.id)

    def _count(self, node: Node, change: int) -> None:
        _add(self.counts, (node.provider, node.pool, node.label, node.state), change)
        _add(self.servers, (node.provider, node.pool), change)
        if node.state is NodeState.BUILDING:
            _add(self.building, node.label, change)

    def _fold_request(self, request: Request) -> None:
        old = self.requests.get(request.id)
        if old is not None and old.version > request.version:
            return
        self.requests.pop(request.id, None)
        if request.state not in FINAL["request"]:
            self.requests[request.id] = request

    def _fold_build(self, build: Build) -> None:
        old = self.builds.get(build.id)
        if old is not None and old.version > build.version:
            return
        self.builds.pop(build.id, None)
        if build.finished_at and build.sha256:
            self.image_trouble.setdefault(build.image, Trouble()).succeeded(build.finished_at)
        if build.state is BuildState.FAILED:
            self.image_trouble.setdefault(build.image, Trouble()).failed(build.id, build.finished_at)
        if build.state not in FINAL["build"]:
            self.builds[build.id] = build

    def builds_of(self, image: str) -> list[Build]:
        """The builds of an image that are not over, newest first."""
        found = [build for build in self.builds.values() if build.image == image]
        return sorted(found, key=lambda build: (build.created_at, build.id), reverse=True)

    def newest_ready(self, image: str) -> Build | None:
        """The build that new nodes of `image` are made from."""
        return next((build for build in self.builds_of(image) if build.state is BuildState.READY), None)


def _add(counter: Counter[_K], key: _K, change: int) -> None:
    """Count, and forget a key that is down to nothing: an index built anew would not have it."""
    counter[key] += change
    if not counter[key]:
        del counter[key]

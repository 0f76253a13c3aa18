"""The Board: what the launcher and the agents' desk need to know of each machine, folded from rows as they change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nodepool.model import (
    IDLE,
    Boot,
    Build,
    BuildState,
    Machine,
    MachineState,
    Node,
    NodeState,
    Operation,
    Record,
    Request,
    RequestState,
    Status,
)
from nodepool.plan.guard import FREEZE

HAND_OVER = "ready"  # the job of putting the requestor's keys on a READY node
AUTHORIZED = "authorized"  # the step of a READY node whose keys are on


@dataclass
class Board:
    """The latest rows, by machine."""

    machines: dict[int, Machine] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)  # of machines, by name
    nodes: dict[int, Node] = field(default_factory=dict)  # that are not deleted
    boots: dict[int, Boot] = field(default_factory=dict)  # the newest of each machine, by machine
    operations: dict[int, Operation] = field(default_factory=dict)  # the newest of each machine, by machine
    requests: dict[int, Request] = field(default_factory=dict)  # that are being handed over
    builds: dict[str, Build] = field(default_factory=dict)  # that are ready
    frozen: str = ""  # why no step may be run; "": it may

    def fold(self, records: Iterable[Record]) -> set[int]:
        """Take in rows that changed; gives the machines that they concern."""
        touched: set[int] = set()
        for record in records:
            if isinstance(record, Machine):
                if _newer(self.machines.get(record.id), record):
                    self.machines[record.id] = record
                    self.ids[record.name] = record.id
                touched.add(record.id)
            elif isinstance(record, Node):
                self._fold_node(record)
                touched.add(record.machine_id)
            elif isinstance(record, (Boot, Operation)):
                self._fold_latest(record)
                touched.add(record.machine_id)
            else:
                self._fold_other(record)
        return touched

    def _fold_latest(self, record: Boot | Operation) -> None:
        latest: dict[int, Any] = self.boots if isinstance(record, Boot) else self.operations
        held = latest.get(record.machine_id)
        if held is None or (held.id, held.version) <= (record.id, record.version):
            latest[record.machine_id] = record

    def _fold_other(self, record: Record) -> None:
        if isinstance(record, Request):
            self.requests.pop(record.id, None)
            if record.state is RequestState.PENDING:
                self.requests[record.id] = record
        elif isinstance(record, Build):
            self.builds.pop(record.id, None)
            if record.state is BuildState.READY:
                self.builds[record.id] = record
        elif isinstance(record, Status) and record.id == FREEZE:
            self.frozen = record.text

    def _fold_node(self, node: Node) -> None:
        if node.state is NodeState.DELETED:
            self.nodes.pop(node.id, None)
        elif _newer(self.nodes.get(node.id), node):
            self.nodes[node.id] = node

    def named(self, name: str) -> Machine | None:
        """The machine of this name."""
        return self.machines.get(self.ids.get(name, 0))

    def node_of(self, machine: Machine) -> Node | None:
        """The node that lives on a machine."""
        return None if machine.node_id is None else self.nodes.get(machine.node_id)

    def job_of(self, machine: Machine) -> str:
        """What is to be done on a machine now: the state that the job belongs to, or nothing ("")."""
        if machine.state in {MachineState.INSPECTING, MachineState.CLEANING}:
            return str(machine.state)
        if machine.state is MachineState.AVAILABLE and machine.work != IDLE:
            return str(machine.state)  # it is being switched off
        node = self.node_of(machine)
        if machine.state is not MachineState.OCCUPIED or node is None:
            return ""
        if node.state in {NodeState.BUILDING, NodeState.DELETING}:
            return str(node.state)
        handing = node.state is NodeState.READY and node.request_id is not None and node.work.step != AUTHORIZED
        return HAND_OVER if handing else ""


def _newer(held: Machine | Node | None, record: Machine | Node) -> bool:
    return held is None or held.version <= record.version

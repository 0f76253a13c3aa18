"""Machines, as operators act on them."""

from __future__ import annotations

from nodepool.errors import Refused
from nodepool.lifecycle import MachineEvent
from nodepool.model import Machine, MachineState
from nodepool.service.moves import move, started
from nodepool.store import Tx

_LOOKED_AT = frozenset({MachineState.ENROLLED, MachineState.INSPECTED, MachineState.BROKEN})


def inspect(tx: Tx, machine: Machine, actor: str) -> Machine:
    """Have a machine looked at again now; one that is being inspected stays as it is.

    Raises Refused while something else is done with the machine.
    """
    if machine.state is MachineState.INSPECTING:
        return machine
    if machine.state not in _LOOKED_AT:
        raise Refused(
            f"{machine.name} is {machine.state}: only a machine that is broken or waits to be accepted"
            " is inspected again"
        )
    return move(tx, machine, MachineEvent.INSPECT, "asked for", actor, work=started(tx.now))

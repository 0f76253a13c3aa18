"""Machines, as operators act on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from nodepool.errors import Refused
from nodepool.lifecycle import MachineEvent
from nodepool.model import Machine, MachineState
from nodepool.plan import Catalog
from nodepool.service.moves import move, note, started
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


def accept(tx: Tx, machine: Machine, actor: str, seen: str = "") -> Machine:
    """Let all disks of a machine be wiped, from now on; the planner begins to use it.  Again changes nothing.

    `seen` is the digest of the facts that whoever accepts was shown ("": not said).  Raises Refused for a machine that
    nobody has looked at yet, that the YAML does not have any more, or that has other facts by now.
    """
    if machine.retired:
        raise Refused(f"the YAML does not have {machine.name} any more: declare it there first")
    if not machine.facts:
        raise Refused(
            f"nodepool has not seen {machine.name} yet (it is {machine.state}): wait until it was inspected,"
            " so that its facts can be shown before its disks are wiped"
        )
    if seen and seen != facts_id(machine.facts):
        raise Refused(f"{machine.name} has told other facts since they were shown: look at them again")
    if machine.accepted:
        return machine
    machine = tx.put(replace(machine, accepted=True, accepted_by=actor or "nobody", accepted_at=tx.now))
    note(tx, machine, "accepted", "its disks may be wiped", actor)
    return machine


def withdraw(tx: Tx, machine: Machine, catalog: Catalog, actor: str) -> Machine:
    """Take back what `accept` has given: a node that lives there goes on, afterwards the machine is not used.

    Raises Refused when it was not accepted by command: what the YAML says is changed there.
    """
    if not machine.accepted_by:
        there = "accept: true in the YAML is changed there" if machine.accepted else "it is not accepted"
        raise Refused(f"nobody has accepted {machine.name} by command: {there}")
    spec = catalog.machines.get(machine.name)
    still = spec is not None and spec.accept
    machine = tx.put(replace(machine, accepted=still, accepted_by="", accepted_at=0))
    note(tx, machine, "acceptance withdrawn", "the YAML accepts it still" if still else "", actor)
    return machine


def facts_id(facts: Mapping[str, str]) -> str:
    """A digest of what an agent has told about its machine; "" when none has."""
    told = "\n".join(f"{key}={facts[key]}" for key in sorted(facts))
    return hashlib.sha256(told.encode()).hexdigest()[:16] if facts else ""

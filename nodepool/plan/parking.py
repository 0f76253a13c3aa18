"""Parking: how long the agent of an available machine waits, warm, for a node that is wanted.

A warm machine saves a self test of minutes; it also burns power.  It waits for `park-for` seconds, and of the machines
of one rack at most `park-max` wait at once: beyond that the one that has waited longest is switched off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nodepool.clock import micros
from nodepool.config.records import Provider
from nodepool.model import IDLE, Machine, MachineState
from nodepool.plan.actions import SwitchOff

if TYPE_CHECKING:
    from nodepool.plan.planner import Draft


def switch_off(draft: Draft, used: set[int]) -> None:
    """Switch off what has waited long enough; `used` are machines that this plan has just given to nodes."""
    racks: dict[tuple[str, str], list[Machine]] = {}
    for machine_id in draft.snapshot.machines_in[MachineState.AVAILABLE] - used:
        machine = draft.snapshot.machines[machine_id]
        spec = draft.catalog.machines.get(machine.name)
        if machine.boot_id is not None and machine.work == IDLE and spec is not None:
            racks.setdefault((machine.provider, spec.rack), []).append(machine)
    for (name, rack), waiting in racks.items():
        provider = draft.catalog.provider(name)
        if provider is not None:
            _of_rack(draft, provider, rack, sorted(waiting, key=lambda machine: (machine.since, machine.name)))


def _of_rack(draft: Draft, provider: Provider, rack: str, waiting: list[Machine]) -> None:
    """The machines of one rack that wait warm, the longest wait first."""
    too_many = 0 if provider.park_max is None else len(waiting) - provider.park_max
    for number, machine in enumerate(waiting):
        until = machine.since + micros(provider.park_for)
        if number < too_many:
            where = f"rack {rack}" if rack else f"provider {provider.name}"
            draft.actions.append(SwitchOff(machine.id, f"{len(waiting)} machines of {where} wait warm (park-max)"))
        elif until <= draft.now:
            draft.actions.append(
                SwitchOff(machine.id, f"nobody has wanted it for {provider.park_for:.0f} s (park-for)")
            )
        else:
            draft.again_at(until)

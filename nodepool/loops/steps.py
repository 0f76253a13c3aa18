"""What becomes of the rows when a step was begun, waits, is done or has failed.

Everything here runs inside a transaction and touches the rows of one machine: the machine, its node, its boot and the
operation that stands for the step.  The subject of a job is the row that carries its `Work`: the node while one is
being built, taken down or handed over, the machine otherwise.
"""

from __future__ import annotations

import logging
import random
import secrets
from dataclasses import dataclass, replace

from nodepool.clock import micros, seconds_between
from nodepool.config.records import Provider
from nodepool.drivers.step import Context, Done, Step, Wait, firmware_of, model_of
from nodepool.errors import Code, Fault, Permanent, StepError, Temporary
from nodepool.lifecycle import Backoff, MachineEvent, NodeEvent
from nodepool.model import (
    IDLE,
    Boot,
    BootState,
    Build,
    Machine,
    MachineState,
    Node,
    NodeState,
    Operation,
    OperationState,
    Work,
)
from nodepool.plan.board import HAND_OVER
from nodepool.service import requests
from nodepool.service.moves import move, note
from nodepool.store import Tx, tables

log = logging.getLogger("nodepool.launcher")

RETRY = Backoff(first=5, limit=300)
LONGEST = 600.0  # seconds: no retry is put off for longer, so a later one was written by a clock that was set back
_OPEN = frozenset({OperationState.PENDING, OperationState.RUNNING})


@dataclass(frozen=True, slots=True)
class Item:
    """The rows of one machine at the time when its step was run."""

    job: str
    steps: tuple[Step, ...]
    provider: Provider
    machine: Machine
    node: Node | None = None
    boot: Boot | None = None
    operation: Operation | None = None

    @property
    def subject(self) -> Machine | Node:
        """The row that carries the job's Work."""
        if self.job in {MachineState.INSPECTING, MachineState.CLEANING, MachineState.AVAILABLE}:
            return self.machine
        assert self.node is not None
        return self.node

    def step(self, name: str) -> Step | None:
        """The step of this name."""
        return next((step for step in self.steps if step.name == name), None)

    def timeout(self, step: Step) -> float:
        """Seconds without progress that a step may take."""
        return self.provider.boot_timeout if step.timeout is None else step.timeout


def begin(tx: Tx, item: Item, first: str) -> None:
    """Take up a job at the step `first`; what was being done on the machine before is over."""
    if item.operation is not None and item.operation.state in _OPEN:
        _close(tx, item.operation, OperationState.FAILED, "given up for another job", Code.CANCELLED)
    enter(tx, item, first, item.subject.work.attempt)


def enter(tx: Tx, item: Item, name: str, attempt: int, delay: float = 0.0) -> None:
    """Write the step `name` down, to be run after `delay` seconds; its operation is the intent."""
    step = item.step(name)
    assert step is not None, f"job {item.job} has no step {name}"
    tx.add_later(
        Operation(
            id=0,
            machine_id=item.machine.id,
            kind=step.name,
            state=OperationState.PENDING,
            created_at=tx.now + micros(delay),
            node_id=item.machine.node_id,
            boot_id=item.machine.boot_id,
            job=item.job,
            attempt=attempt,
            by_agent=False,  # until `issue` has given it its parameters
            changed_at=tx.now,
        )
    )
    next_at = tx.now + micros(delay)
    work = Work(
        step=step.name,
        since=tx.now,
        deadline=next_at + micros(item.timeout(step)),
        attempt=attempt,
        next_at=next_at,
        error=item.subject.work.error,
        code=item.subject.work.code,
    )
    tx.put(replace(item.subject, work=work))


def issue(tx: Tx, item: Item, params: dict[str, str]) -> None:
    """Give the operation of an agent's step its parameters: from here on the agent sees it."""
    assert item.operation is not None
    tx.put(replace(item.operation, by_agent=True, params=params, boot_id=item.machine.boot_id, changed_at=tx.now))


def waits(tx: Tx, item: Item, answer: Wait, *, progress: bool) -> None:
    """Keep what the step waits for; progress pushes the deadline."""
    subject = item.subject
    work = replace(subject.work, waiting=answer.why)
    if progress:
        step = item.step(work.step)
        assert step is not None
        work = replace(work, deadline=tx.now + micros(item.timeout(step)))
    if isinstance(subject, Machine):
        subject = _observed(tx, subject, answer.power)
        tx.put(replace(subject, work=work))
    else:
        tx.put(replace(subject, work=work))
        if answer.power and answer.power != item.machine.power_observed:
            tx.put(_observed(tx, item.machine, answer.power))


def resumed_at(work: Work, now: int) -> int:
    """When a step is next run: as was written, or now when a clock that was set back since then has written it."""
    return work.next_at if work.next_at <= now + micros(LONGEST) else now


def attended(tx: Tx, item: Item) -> None:
    """Somebody looks after the step again: its patience begins anew, or when it is next run."""
    work = item.subject.work
    step = item.step(work.step)
    assert step is not None
    next_at = resumed_at(work, tx.now)
    deadline = max(next_at, tx.now) + micros(item.timeout(step))
    tx.put(replace(item.subject, work=replace(work, next_at=next_at, deadline=deadline)))


def done(tx: Tx, item: Item, answer: Done) -> None:
    """Close the step and enter the next one, or end the job."""
    if item.operation is not None and item.operation.state in _OPEN:
        _close(tx, item.operation, OperationState.DONE)
    machine = _observed(tx, item.machine, answer.power)
    if answer.machine:
        machine = replace(machine, **answer.machine)
    if answer.mint or answer.end_boot:
        if item.boot is not None and item.boot.state in {BootState.EXPECTED, BootState.UP}:
            tx.put(replace(item.boot, state=BootState.ENDED, ended_at=tx.now))
        boot = _mint(tx, machine) if answer.mint else None
        machine = replace(
            machine, boot_id=boot.id if boot else None, power_wanted="on" if boot else machine.power_wanted
        )
    node = replace(item.node, **answer.node) if item.node is not None and answer.node else item.node
    if machine is not item.machine:
        machine = tx.put(machine)
    if node is not None and node is not item.node:
        node = tx.put(node)
    item = replace(item, machine=machine, node=node)
    names = [step.name for step in item.steps]
    following = names.index(item.subject.work.step) + 1
    if following < len(names):
        enter(tx, item, names[following], item.subject.work.attempt)
    else:
        _finish(tx, item)


def failed(tx: Tx, item: Item, error: StepError, rng: random.Random) -> None:
    """A look at the step failed; when it cannot or may not be repeated, this attempt at the job has failed."""
    work = item.subject.work
    if isinstance(error, Temporary) and tx.now + micros(error.delay) < work.deadline:
        next_at = tx.now + micros(error.delay)
        tx.put(replace(item.subject, work=replace(work, next_at=next_at, error=str(error), code=str(error.code))))
        return
    if item.operation is not None and item.operation.state in _OPEN:
        _close(tx, item.operation, OperationState.FAILED, str(error), error.code)
    note(tx, item.subject, "attempt-failed", _sentence(work, error), code=str(error.code), data={"step": work.step})
    if item.job == HAND_OVER:
        _lost(tx, item, error)
        return
    if error.code is Code.KEXEC_FAILED:
        _never_again_by_kexec(tx, item)
    machine, strikes = item.machine, item.machine.strikes + (error.code.fault is Fault.MACHINE)
    hopeless = error.code.fault in {Fault.USER, Fault.IMAGE}
    if hopeless or work.attempt >= item.provider.launch_retries or strikes >= item.provider.strikes:
        _give_up(tx, item, error, strikes)
        return
    if strikes != machine.strikes:
        machine = tx.put(replace(machine, strikes=strikes))
    delay = RETRY.seconds(work.attempt, rng)
    subject_work = replace(work, error=_sentence(work, error), code=str(error.code))
    item = replace(item, machine=machine)
    if isinstance(item.subject, Machine):
        item = replace(item, machine=replace(item.machine, work=subject_work))
    else:
        assert item.node is not None
        item = replace(item, node=replace(item.node, work=subject_work))
    enter(tx, item, item.steps[0].name, work.attempt + 1, delay)


def timed_out(item: Item, now: int) -> Permanent:
    """The failure of a step that made no progress before its deadline."""
    work = item.subject.work
    step = item.step(work.step)
    assert step is not None
    waited = seconds_between(work.deadline, now) + item.timeout(step)
    by_kexec = step.kexec_code is not None and item.node is not None and item.node.started_by == "kexec"
    code = step.kexec_code if by_kexec and step.kexec_code else step.code
    return Permanent(f"no progress for {waited:.0f} s: {work.waiting or 'it did not answer'}", code)


def _never_again_by_kexec(tx: Tx, item: Item) -> None:
    """Remember that this build does not start by kexec on this model: the next attempt reboots."""
    build = tx.find(Build, item.node.build_id) if item.node is not None else None
    if build is not None:
        known = {*build.starts.get("no_kexec", ()), model_of(item.machine)}
        tx.put(replace(build, starts={**build.starts, "no_kexec": sorted(known)}))


def _loader_is_proven(tx: Tx, node: Node, machine: Machine) -> None:
    """A node that came up by firmware has proven the loader of its build for that kind of firmware."""
    build = tx.find(Build, node.build_id) if node.started_by == "reboot" else None
    known = set(build.starts.get("proven", ())) if build is not None else set()
    if build is not None and firmware_of(machine) not in known:
        tx.put(replace(build, starts={**build.starts, "proven": sorted(known | {firmware_of(machine)})}))


def _sentence(work: Work, error: StepError) -> str:
    return f"{work.step or 'taking it up'} (attempt {work.attempt}): {error}"


def _finish(tx: Tx, item: Item) -> None:
    machine, node = item.machine, item.node
    if item.job == NodeState.BUILDING:
        assert node is not None
        move(tx, node, NodeEvent.PROVEN, "logged in with its proven host key", ready_at=tx.now)
        _loader_is_proven(tx, node, machine)
        if machine.strikes:
            tx.put(replace(machine, strikes=0))
    elif item.job == NodeState.DELETING:
        assert node is not None
        move(tx, node, NodeEvent.GONE, f"the agent is up on {machine.name}")
        move(tx, machine, MachineEvent.VACATE, f"node {node.id} is gone", node_id=None)
    elif item.job == MachineState.INSPECTING:
        if node is not None:
            _node_gone_after_repair(tx, node, machine)
        cleared = {"failure": "", "failure_code": "", "failure_phase": ""}
        move(tx, machine, MachineEvent.INSPECTED, _facts_in_short(machine), node_id=None, **cleared)
    elif item.job == MachineState.CLEANING:
        move(tx, machine, MachineEvent.CLEANED, "no old byte can be read from its disks")
    elif item.job == MachineState.AVAILABLE:
        tx.put(replace(machine, work=IDLE))
    else:
        assert node is not None
        requests.authorized(tx, node)


def _node_gone_after_repair(tx: Tx, node: Node, machine: Machine) -> None:
    if node.state is not NodeState.DELETING:
        node = move(tx, node, NodeEvent.DELETE, "its machine was broken")
    move(tx, node, NodeEvent.GONE, f"the agent is up on {machine.name}")


def _facts_in_short(machine: Machine) -> str:
    facts = machine.facts
    memory = _number(facts.get("fact.memory")) / 2**30
    sizes = [_number(value) / 1e9 for key, value in facts.items() if key.startswith("disk.") and key.endswith(".size")]
    return (
        f"{facts.get('fact.cpus', '?')} CPUs, {memory:.1f} GiB, {len(sizes)} disks ({sum(sizes):.1f} GB),"
        f" {facts.get('fact.firmware', 'unknown')} firmware"
    )


def _number(fact: object) -> int:
    """A fact as a number: it comes from outside, and may be anything."""
    text = str(fact)
    return int(text) if text.isascii() and text.isdecimal() else 0


def _give_up(tx: Tx, item: Item, error: StepError, strikes: int) -> None:
    work, machine = item.subject.work, item.machine
    failure = {"failure": str(error), "failure_code": str(error.code), "failure_phase": work.step}
    if item.job == NodeState.BUILDING:
        assert item.node is not None
        move(tx, item.node, NodeEvent.FAIL, _sentence(work, error), failed_at=tx.now, **failure)
        fault = error.code.fault
        if fault is Fault.IMAGE and _proven_elsewhere(tx, item.node):
            fault, strikes = Fault.MACHINE, strikes + 1
        if fault not in {Fault.MACHINE, Fault.USER}:
            return
        if fault is Fault.MACHINE and strikes < item.provider.strikes:
            tx.put(replace(machine, strikes=strikes))
            return
    retry_at = tx.now + micros(item.provider.retry_broken)
    broken = Work(
        since=tx.now, next_at=retry_at, waiting="to be inspected again", error=str(error), code=str(error.code)
    )
    move(tx, machine, MachineEvent.BREAK, _sentence(work, error), work=broken, strikes=0, **failure)


def _proven_elsewhere(tx: Tx, node: Node) -> bool:
    """Whether another machine was READY with the same build: what fails here is not the image's fault then."""
    c = tables.nodes.c
    return bool(tx.select(Node, c.build_id == node.build_id, c.machine_id != node.machine_id, c.ready_at > 0, limit=1))


def _lost(tx: Tx, item: Item, error: StepError) -> None:
    """A READY node could not be handed over: it is taken down and the request goes back to the queue."""
    node = item.node
    assert node is not None
    work = Work(since=tx.now, next_at=tx.now, waiting="to be taken up", error=str(error), code=str(error.code))
    node = move(tx, node, NodeEvent.DELETE, f"hand-over failed: {error}", work=work)
    requests.node_left(tx, node, f"node {node.id} could not be handed over: {error}")


def _mint(tx: Tx, machine: Machine) -> Boot:
    return tx.add(
        Boot(
            id=0,
            machine_id=machine.id,
            token=secrets.token_hex(16),
            state=BootState.EXPECTED,
            minted_at=tx.now,
            node_id=machine.node_id,
        )
    )


def _observed(tx: Tx, machine: Machine, power: str) -> Machine:
    if not power or power == machine.power_observed:
        return machine
    return replace(machine, power_observed=power, power_seen_at=tx.now)


def _close(tx: Tx, operation: Operation, state: OperationState, error: str = "", code: Code | str = "") -> None:
    tx.put(replace(operation, state=state, error=error, code=str(code), changed_at=tx.now, finished_at=tx.now))


def run(step: Step, ctx: Context) -> Done | Wait | StepError | dict[str, str]:
    """Run one look at a step; whatever it raises comes back as a StepError, an order to be issued as its parameters."""
    try:
        if step.order is not None and not ctx.operation.by_agent:
            return step.order(ctx)
        return step.run(ctx)
    except StepError as error:
        return error
    except Exception as error:
        log.exception("step %s of %s", step.name, ctx.machine.name)
        return Temporary(f"unexpected {type(error).__name__}: {error}", Code.UNEXPECTED, delay=30)

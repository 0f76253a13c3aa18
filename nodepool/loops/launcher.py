"""The launcher: takes up the jobs of machines, runs their steps when they are due, and writes down what came of them.

It holds no state that matters: the rows say what is to be done, the due heap only when to look.  One machine has at
most one step running, whoever wants something of it.
"""

from __future__ import annotations

import heapq
import logging
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from nodepool.clock import SECOND, Clock, micros
from nodepool.config.records import Config, PoolLabel, Provider
from nodepool.drivers.power import Bmc
from nodepool.drivers.step import Context, Done, Jobs, Ports, Step, Wait
from nodepool.errors import Code, Conflict, OutOfOffice, Permanent, StepError, StoreUnavailable
from nodepool.loops import steps
from nodepool.loops.steps import Item
from nodepool.metrics import Metrics
from nodepool.model import Boot, BootState, Machine, Node, NodeState, OperationState
from nodepool.plan import Catalog
from nodepool.plan.board import HAND_OVER, Board
from nodepool.service import loading
from nodepool.store import Office, Store, Tx
from nodepool.store.engine import each

log = logging.getLogger("nodepool.launcher")

ABSENCE = 30.0  # seconds without a pass after which nobody is charged for the time
BATCH = 512  # results that are written in one transaction

Entry = Callable[[str, Boot | None, int, int], str]
Result = Done | Wait | StepError | dict[str, str]


T = TypeVar("T")


class Executor(Protocol):
    """Where work that may block runs: a pool of threads, or right here when the clock is virtual."""

    def free(self) -> int:
        """How much more can run at once."""
        ...

    def submit(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        """Run `work` and hand what it gives to `then`, from whatever thread."""
        ...


@dataclass(frozen=True)
class Kit:
    """A driver, wired: its jobs, where they start, what the steps of a provider act on, and whether they may block."""

    jobs: Jobs
    entry: Entry
    ports: Callable[[Provider], Ports]
    blocking: bool = True


class Launcher:
    """One pass looks at what changed, writes results, and starts what is due."""

    def __init__(
        self,
        store: Store,
        catalog: Callable[[], Catalog],
        kits: Mapping[str, Kit],
        executor: Executor,
        metrics: Metrics,
    ) -> None:
        self.office: Office | None = None
        self._store = store
        self._clock: Clock = store.clock
        self._catalog = catalog
        self._kits = kits
        self._executor = executor
        self._metrics = metrics
        self._feed = store.feed()
        self._board = Board()
        self._due: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []
        self._signs: dict[int, object] = {}
        self._marks: dict[int, str] = {}
        self._running: set[int] = set()
        self._results: deque[tuple[int, Item, Result]] = deque()
        self._last_pass = 0
        self._thawing = False
        self._rng = random.Random()
        self.wake: Callable[[], None] = lambda: None

    def pass_once(self) -> int:
        """Do what can be done now; gives when to look again (microseconds UTC), 0 when only a change can bring more."""
        now = self._clock.now()
        try:
            self._fold()
            if self._board.frozen:
                return self._stand_still()
            if now - self._last_pass > micros(ABSENCE):
                self._attend(now)
            self._last_pass = now
            while self._write_results() or self._start(now):
                self._fold()
        except StoreUnavailable as error:
            log.debug("%s", error)  # the store has said it
            self._last_pass = 0  # agents cannot report while nothing can be written: that time is charged to nobody
            return now + SECOND
        next_at = self._heap[0][0] if self._heap and self._executor.free() > 0 else 0  # a result wakes us
        self._last_pass = max(now, next_at)
        return next_at

    @property
    def sentence(self) -> str:
        """What it is at."""
        return f"{len(self._signs)} machines at work, {len(self._running)} steps running"

    def _stand_still(self) -> int:
        """While nodepool is frozen what runs is written down and nothing begun; nobody is charged for the time."""
        while self._write_results():
            self._fold()
        self._last_pass = 0
        self._thawing = True
        return 0

    def _fold(self) -> None:
        changes, whole = self._store.follow(self._feed, loading.board)
        if not whole:
            self._board = Board()
            self._signs.clear()  # whatever was missed meanwhile: every job is looked at
        touched: set[int] = set()
        for record in changes:
            if isinstance(record, Node):
                self._measure(self._board.nodes.get(record.id), record)
            touched |= self._board.fold((record,))
        for machine_id in touched:
            self._notice(machine_id)

    def _measure(self, old: Node | None, new: Node) -> None:
        """Tell of a launch that has ended, after it was stored."""
        if old is not None and old.state is NodeState.BUILDING and new.state in {NodeState.READY, NodeState.FAILED}:
            self._metrics.launch(new)

    def _notice(self, machine_id: int) -> None:
        """Look at a machine again when something about its job has changed."""
        machine = self._board.machines.get(machine_id)
        if machine is None:
            return
        job = self._board.job_of(machine)
        subject = self._subject(machine, job)
        if subject is None:
            self._signs.pop(machine_id, None)
            self._due.pop(machine_id, None)
            return
        boot, operation = self._board.boots.get(machine_id), self._board.operations.get(machine_id)
        sign = (
            job,
            subject.id,
            subject.work.step,
            subject.work.attempt,
            boot and boot.state,
            operation and (operation.id, operation.state, operation.by_agent, operation.done, operation.phase_now),
        )
        if self._signs.get(machine_id) != sign:
            self._signs[machine_id] = sign
            self._look_at(machine_id, subject.work.next_at)

    def _subject(self, machine: Machine, job: str) -> Machine | Node | None:
        if not job:
            return None
        node = self._board.node_of(machine)
        return node if node is not None and job in {NodeState.BUILDING, NodeState.DELETING, HAND_OVER} else machine

    def _look_at(self, machine_id: int, when: int) -> None:
        self._due[machine_id] = when
        heapq.heappush(self._heap, (when, machine_id))

    def _attend(self, now: int) -> None:
        """After a start or an absence: no deadline has run while nobody was there."""

        def go_on(item: Item) -> Callable[[Tx], None]:
            if self._boots_in_vain(item, now):
                return lambda tx: steps.begin(tx, item, item.steps[0].name)
            return lambda tx: steps.attended(tx, item)

        found = [item for machine in self._board.machines.values() if (item := self._item(machine)) is not None]
        begun = [item for item in found if item.step(item.subject.work.step) is not None]
        if begun:
            log.info("%d jobs go on where they were; nobody is charged for the time without a daemon", len(begun))
            each(self._store, [go_on(item) for item in begun], self.office)
            self._fold()
            for item in begun:
                self._look_at(item.machine.id, steps.resumed_at(item.subject.work, now))
        self._thawing = False

    def _boots_in_vain(self, item: Item, now: int) -> bool:
        """Whether the machine was switched on and met nobody who would have given it the agent."""
        if item.boot is None or item.boot.state is not BootState.EXPECTED or not item.steps:
            return False
        return self._thawing or now - item.boot.minted_at > micros(item.provider.boot_timeout)

    def _start(self, now: int) -> bool:
        """Begin or run what is due, as much as there are workers for; says whether there are results already."""
        begun: dict[int, Callable[[Tx], None]] = {}
        while self._heap and self._heap[0][0] <= now and self._executor.free() > 0:
            when, machine_id = heapq.heappop(self._heap)
            if self._due.get(machine_id) != when or machine_id in self._running:
                continue
            del self._due[machine_id]
            item = self._item(self._board.machines[machine_id])
            if item is None:
                continue
            step = item.step(item.subject.work.step)
            if step is None or not _matches(item, step) or item.machine.name not in self._catalog().machines:
                begun[machine_id] = self._begin(item, now)
            else:
                self._run(item, step, now)
        if begun:
            self._write_begun(begun, now)
        return bool(begun or self._results)

    def _write_begun(self, begun: Mapping[int, Callable[[Tx], None]], now: int) -> None:
        """Write down what is begun; what could not be written is due again, since nothing else would bring it up."""
        try:
            outcome = each(self._store, list(begun.values()), self.office)
        except StoreUnavailable:
            for machine_id in begun:
                self._look_at(machine_id, now)
            raise
        for machine_id, written in zip(begun, outcome, strict=True):
            if isinstance(written, Conflict):
                self._look_at(machine_id, now + SECOND)

    def _begin(self, item: Item, now: int) -> Callable[[Tx], None]:
        kit = self._kits.get(item.provider.driver)
        if kit is None or item.machine.name not in self._catalog().machines:
            gone = Permanent(f"the YAML does not have {item.machine.name} any more", Code.CONFIG)
            first = Step("configuration", lambda _: Wait(0, ""), 60, Code.CONFIG)
            item = replace(item, steps=(first,))
            return lambda tx: steps.failed(tx, item, gone, self._rng)
        entry = kit.entry(item.job, item.boot, item.subject.work.attempt, now)
        return lambda tx: steps.begin(tx, item, entry)

    def _run(self, item: Item, step: Step, now: int) -> None:
        machine_id = item.machine.id
        context = self._context(item, now)
        if context is None:
            self._look_at(machine_id, now + 10 * SECOND)
            return
        self._running.add(machine_id)

        def then(result: Result) -> None:
            self._results.append((machine_id, item, result))
            self.wake()

        if self._kits[item.provider.driver].blocking:
            self._executor.submit(lambda: steps.run(step, context), then)
        else:
            then(steps.run(step, context))

    def _item(self, machine: Machine) -> Item | None:
        job = self._board.job_of(machine)
        if not job:
            return None
        provider = self._catalog().provider(machine.provider) or Provider(machine.provider, "")
        kit = self._kits.get(provider.driver)
        return Item(
            job=job,
            steps=kit.jobs[job] if kit else (),
            provider=provider,
            machine=machine,
            node=self._board.node_of(machine),
            boot=self._board.boots.get(machine.id) if machine.boot_id is not None else None,
            operation=self._board.operations.get(machine.id),
        )

    def _context(self, item: Item, now: int) -> Context | None:
        catalog = self._catalog()
        spec = catalog.machines.get(item.machine.name)
        if spec is None or item.operation is None:
            return None
        config, node = catalog.config, item.node
        request = self._board.requests.get(node.request_id) if node and node.request_id else None
        return Context(
            now=now,
            machine=item.machine,
            spec=spec,
            provider=item.provider,
            ports=self._kits[item.provider.driver].ports(item.provider),
            bmc=_bmc(config, spec.bmc or f"fake://{spec.name}", spec.credentials),
            operation=item.operation,
            node=node,
            boot=item.boot,
            build=self._board.builds.get(node.build_id) if node else None,
            network=config.networks.get(item.provider.network),
            offer=_offer(catalog, node) if node else None,
            keys=request.ssh_keys if request else (),
        )

    def _write_results(self) -> bool:
        """Write what the steps have answered; says whether there was anything."""
        batch: list[tuple[int, Item, Result]] = []
        while self._results and len(batch) < BATCH:
            batch.append(self._results.popleft())
        if not batch:
            return False
        try:
            self._write(batch)
        except StoreUnavailable:
            self._results.extendleft(reversed(batch))
            raise
        for machine_id, _, result in batch:
            self._running.discard(machine_id)
            if isinstance(result, Wait):
                self._marks[machine_id] = result.mark
        self._fold()
        for machine_id, item, result in batch:
            self._next_look(machine_id, item, result)
        return True

    def _write(self, batch: Sequence[tuple[int, Item, Result]]) -> None:
        """Write results in one transaction; one that cannot be written fails its own machine and no other."""
        writes = [self._digest(machine_id, item, result) for machine_id, item, result in batch]
        try:
            each(self._store, [write for write in writes if write is not None], self.office)
        except (StoreUnavailable, OutOfOffice):
            raise
        except Exception as error:
            if len(batch) > 1:
                for result in batch:
                    self._write([result])
                return
            item = batch[0][1]
            log.exception("what %s of %s has come to cannot be stored", item.subject.work.step, item.machine.name)
            trouble = Permanent(f"unexpected {type(error).__name__}: {error}", Code.UNEXPECTED)
            each(self._store, [lambda tx: steps.failed(tx, item, trouble, self._rng)], self.office)

    def _digest(self, machine_id: int, item: Item, result: Result) -> Callable[[Tx], None] | None:
        if isinstance(result, Done):
            return lambda tx: steps.done(tx, item, result)
        if isinstance(result, StepError):
            return lambda tx: steps.failed(tx, item, result, self._rng)
        if isinstance(result, dict):
            return lambda tx: steps.issue(tx, item, result)
        work, now = item.subject.work, self._clock.now()
        progress = bool(result.mark) and result.mark != self._marks.get(machine_id)
        if not progress and now >= work.deadline:
            return lambda tx: steps.failed(tx, item, steps.timed_out(item, now), self._rng)
        if progress or result.why != work.waiting or (result.power and result.power != item.machine.power_observed):
            return lambda tx: steps.waits(tx, item, result, progress=progress)
        return None

    def _next_look(self, machine_id: int, item: Item, result: Result) -> None:
        """After a wait, look again when it asked to, and at the deadline at the latest; otherwise as the rows say."""
        machine = self._board.machines[machine_id]
        subject = self._subject(machine, self._board.job_of(machine))
        if subject is None:
            return
        same = subject.work.step == item.subject.work.step and subject.work.attempt == item.subject.work.attempt
        if isinstance(result, Wait) and same:
            wanted = self._clock.now() + micros(result.seconds)
            when = min(wanted, max(subject.work.deadline, self._clock.now()))
            if machine_id in self._due:  # something has changed while the step ran: look at once
                when = min(when, self._due[machine_id])
            self._look_at(machine_id, when)
        elif same or machine_id not in self._due:
            self._look_at(machine_id, subject.work.next_at)
        else:
            self._look_at(machine_id, self._due[machine_id])


def _matches(item: Item, step: Step) -> bool:
    """Whether the machine's newest operation is the row of this step."""
    operation = item.operation
    if operation is None or operation.kind != step.name or operation.job != item.job:
        return False
    return step.order is not None or operation.state is OperationState.PENDING


def _bmc(config: Config, address: str, credentials: str) -> Bmc:
    found = config.credentials.get(credentials)
    return Bmc(address, found.username if found else "", found.password if found else "")


def _offer(catalog: Catalog, node: Node) -> PoolLabel | None:
    offers = catalog.offers.get(node.label, ())
    return next((offer for pool, offer in offers if (pool.provider, pool.name) == (node.provider, node.pool)), None)

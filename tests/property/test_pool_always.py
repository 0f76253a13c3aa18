"""Whatever people do and whatever breaks, in whatever order: what must always hold of a pool."""

import re
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_story import Story, yaml_of

from nodepool.clock import micros
from nodepool.errors import Refused, UseCaseError
from nodepool.lifecycle import FINAL, WAY_OUT
from nodepool.model import (
    Machine,
    MachineState,
    Node,
    NodeState,
    Operation,
    OperationState,
    Request,
    RequestNode,
    RequestState,
)
from nodepool.plan import Snapshot, plan
from nodepool.service import loading, nodes

PHASES = ["", "power-on", "agent", "erase", "write", "login", "authorize"]
COUNTS_NOT = {NodeState.DELETED}


class Pool(RuleBasedStateMachine):
    @initialize(machines=st.integers(1, 4), min_ready=st.integers(0, 2), max_servers=st.integers(1, 4))
    def begin(self, machines, min_ready, max_servers):
        self.folder = tempfile.TemporaryDirectory()
        self.kinds = {
            "machines": machines,
            "max_servers": max_servers,
            "min_ready": min(min_ready, max_servers, machines),
        }
        self.limit = max_servers
        self.story = Story(Path(self.folder.name), **self.kinds)

    def teardown(self):
        if hasattr(self, "story"):
            try:
                self.in_the_end_everything_has_come_to_something()
            finally:
                self.story.die()
                self.folder.cleanup()

    def in_the_end_everything_has_come_to_something(self):
        """Once every machine is mended and everybody gives back what they got, nothing is left waiting."""
        story = self.story
        for machine in story.world.machines.values():
            machine.failing = ""
        for held in story.nodes("hold"):
            story.store.write(lambda tx, node_id=held.id: nodes.unhold(tx, node_id, "tester"))
        story.run(limit=3 * 3600)
        for _ in range(len(story.all(Request)) + 1):
            for request in story.all(Request):
                if request.state is RequestState.FULFILLED:
                    story.release(request.id)
            story.run(limit=600)
        assert {request.state for request in story.all(Request)} <= FINAL["request"]
        living = {node.state for node in story.all(Node)} - {NodeState.DELETED}
        assert living <= {NodeState.READY}
        machines = {m.name: m.state for m in story.all(Machine) if m.name in story.current().machines}
        assert set(machines.values()) <= {MachineState.AVAILABLE, MachineState.OCCUPIED}, machines
        at_work = [o for o in story.all(Operation) if o.state in {OperationState.PENDING, OperationState.RUNNING}]
        assert at_work == []
        ready = [node for node in story.nodes("ready") if node.request_id is None]
        assert len(ready) >= min(self.kinds["min_ready"], self.kinds["max_servers"])

    @rule(seconds=st.sampled_from([0.1, 1, 3, 10, 60, 4000]))
    def time_passes(self, seconds):
        self.story.run(limit=seconds)

    @rule(count=st.integers(1, 3), keys=st.booleans())
    def somebody_asks(self, count, keys):
        try:
            self.story.request(count, ssh_keys=("ssh-ed25519 AAAAuser me",) if keys else ())
        except Refused:
            assert count > self.story.current().capacity("small")

    @rule(which=st.integers(0, 5))
    def somebody_releases(self, which):
        found = self.story.all(Request)
        if found:
            try:
                self.story.release(found[which % len(found)].id)
            except UseCaseError:
                assert found[which % len(found)].state in {RequestState.EXPIRED, RequestState.FAILED}

    @rule(which=st.integers(0, 5))
    def somebody_deletes(self, which):
        found = self.story.nodes("building", "ready", "in-use")
        if found:
            self.story.delete(found[which % len(found)].id)

    @rule(which=st.integers(0, 5), seconds=st.sampled_from([0, 5, 600]))
    def somebody_holds(self, which, seconds):
        found = self.story.nodes("ready", "in-use", "used", "failed", "hold")
        if found:
            until = self.story.clock.now() + micros(seconds) if seconds else 0
            self.story.store.write(lambda tx: nodes.hold(tx, found[which % len(found)].id, "tester", "why", until))

    @rule(which=st.integers(0, 5))
    def somebody_ends_a_hold(self, which):
        found = self.story.nodes("hold")
        if found:
            self.story.store.write(lambda tx: nodes.unhold(tx, found[which % len(found)].id, "tester"))

    @rule(which=st.integers(0, 3), phase=st.sampled_from(PHASES))
    def a_machine_breaks_or_is_mended(self, which, phase):
        found = list(self.story.world.machines.values())
        found[which % len(found)].failing = phase

    @rule(min_ready=st.integers(0, 3), max_servers=st.integers(1, 4))
    def the_yaml_is_edited(self, min_ready, max_servers):
        self.kinds |= {"max_servers": max_servers, "min_ready": min(min_ready, max_servers, self.kinds["machines"])}
        self.limit = max(max_servers, len(self.taking_servers()))
        self.story.reload(yaml_of(**self.kinds))

    @rule(which=st.integers(0, 3))
    def a_machine_leaves_the_yaml_or_all_are_back(self, which):
        names = sorted(self.story.world.machines)
        self.kept = [name for name in names if name != names[which % len(names)]]
        yaml = yaml_of(**self.kinds)
        if len(self.kept) < self.kinds["min_ready"] or not self.kept:
            self.kept = names
        else:
            yaml = re.sub("count: .*", f"machines: [{', '.join(f'{{name: {name}}}' for name in self.kept)}]", yaml)
        self.limit = max(self.limit, len(self.taking_servers()))
        self.story.reload(yaml)

    @rule()
    def the_daemon_is_killed_and_started_again(self):
        self.story.restart()

    @precondition(lambda self: hasattr(self, "story"))
    @invariant()
    def never_above_max_servers(self):
        assert len(self.taking_servers()) <= max(self.limit, self.kinds["max_servers"])

    @precondition(lambda self: hasattr(self, "story"))
    @invariant()
    def no_machine_has_two_nodes_and_no_node_two_requests(self):
        living = [node for node in self.story.all(Node) if node.state not in COUNTS_NOT]
        assert max(Counter(node.machine_id for node in living).values(), default=1) == 1
        assert max(Counter(row.node_id for row in self.story.all(RequestNode)).values(), default=1) == 1

    @precondition(lambda self: hasattr(self, "story"))
    @invariant()
    def a_request_has_all_of_its_nodes_or_none(self):
        for request in self.story.all(Request):
            nodes = self.story.nodes_of(request.id)
            if request.state is RequestState.REQUESTED:
                assert nodes == []
            if request.state is RequestState.FULFILLED:
                assert [node.label for node in nodes] == list(request.labels)
                assert all(node.state is not NodeState.READY for node in nodes)

    @precondition(lambda self: hasattr(self, "story"))
    @invariant()
    def folding_equals_building_anew(self):
        self.story.daemon.planner.pass_once()
        anew = Snapshot.of(self.story.store.read(loading.snapshot))
        folded = self.story.daemon.planner.snapshot
        for name in (
            "machines",
            "nodes",
            "requests",
            "builds",
            "machines_in",
            "nodes_in",
            "counts",
            "servers",
            "building",
        ):
            assert getattr(folded, name) == getattr(anew, name), name
        assert {k: v for k, v in folded.free.items() if v} == {k: v for k, v in anew.free.items() if v}
        assert folded.label_trouble == anew.label_trouble
        assert folded.image_trouble == anew.image_trouble

    @precondition(lambda self: hasattr(self, "story"))
    @invariant()
    def a_plan_that_was_applied_leaves_nothing_to_plan(self):
        self.story.daemon.planner.pass_once()
        assert plan(self.story.current(), self.story.daemon.planner.snapshot, self.story.clock.now()).actions == ()

    @precondition(lambda self: hasattr(self, "story"))
    @invariant()
    def every_working_row_has_a_time_at_which_it_is_looked_at(self):
        broken = {machine.id for machine in self.story.all(Machine) if machine.state is MachineState.BROKEN}
        rows = [*self.story.all(Machine), *self.story.all(Node), *self.story.all(Request)]
        for row in rows:
            if row.state in WAY_OUT[type(row).__name__.lower()] and getattr(row, "machine_id", 0) not in broken:
                assert row.work.next_at > 0, row

    def taking_servers(self):
        broken = {machine.id for machine in self.story.all(Machine) if machine.state is MachineState.BROKEN}
        return [n for n in self.story.all(Node) if n.state not in COUNTS_NOT and n.machine_id not in broken]


TestPool = Pool.TestCase
TestPool.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False
)

"""What could leave a machine, a node or a request with nobody looking at it any more."""

import re
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
from sqlalchemy import event

from nodepool.clock import SECOND
from nodepool.cmd.wiring import revive
from nodepool.coord.local import SCOPE
from nodepool.drivers import fake
from nodepool.drivers.step import Done
from nodepool.errors import OutOfOffice
from nodepool.model import Build, BuildState, Event, Machine, MachineState, NodeState, Operation, OperationState, Owner
from nodepool.service import images
from nodepool.store import engine


@pytest.fixture
def locked(monkeypatch):
    """`with locked(story)`: another process holds the database; whoever writes gives up at once."""

    @contextmanager
    def lock(story):
        with monkeypatch.context() as patch, closing(sqlite3.connect(story.folder / "nodepool.db")) as other:
            patch.setattr(engine, "PATIENCE", 0)
            other.execute("BEGIN IMMEDIATE")
            yield
            other.rollback()

    return lock


def change(story, machine, **fields):
    story.store.write(lambda tx: tx.put(replace(tx.get(Machine, machine.id), **fields)))


def test_jobs_that_could_not_be_begun_while_the_database_was_locked_are_begun_after_it(tell, locked):
    story = tell(machines=2, min_ready=2)
    story.daemon.planner.pass_once()
    assert set(story.states().values()) == {"inspecting"}
    with locked(story):
        story.daemon.launcher.pass_once()
    assert story.run(story.ready(2), limit=600)


def test_a_job_whose_machine_changes_at_the_moment_it_is_begun_is_begun_all_the_same(tell, monkeypatch):
    story, meddled = None, []

    def entry(*looked_at):
        if not meddled:
            meddled.append(story.all(Machine)[0])
            change(story, meddled[0], power_wanted="on")  # as another thread does it
        return fake.JOBS[looked_at[0]][0].name

    monkeypatch.setattr(fake, "entry", entry)
    story = tell(machines=1)
    assert story.run(story.ready(1), limit=600)


class Braggart:
    """A door through which every agent tells the same strange fact."""

    def __init__(self, door, **facts):
        self.door = door
        self.facts = facts

    def __getattr__(self, name):
        return getattr(self.door, name)

    def together(self, calls):
        return self.door.together(
            [replace(c, lines={**c.lines, **self.facts}) if c.verb == "hello" else c for c in calls]
        )


def test_a_fact_that_is_no_number_stops_nobody(tell):
    story = tell(machines=2, min_ready=2)
    story.world.meet(Braggart(story.desk, **{"fact.memory": "plenty", "disk.9.size": "4²"}))
    assert story.run(story.ready(2), limit=600)


def test_a_result_that_cannot_be_stored_fails_its_own_machine_and_no_other(tell, monkeypatch):
    def check(ctx):
        return Done(machine={"no such field": 1} if ctx.machine.name == "lab-01" else {})

    *others, last = fake.JOBS[MachineState.INSPECTING]
    jobs = {**fake.JOBS, MachineState.INSPECTING: (*others, replace(last, run=check))}
    monkeypatch.setattr(fake, "JOBS", jobs)
    story = tell(machines=3, min_ready=2)
    assert story.run(story.ready(2), limit=600)
    assert story.run(lambda: story.states()["lab-01"] == "broken", limit=7200)
    assert "no such field" in story.machine("lab-01").failure


def test_a_loop_whose_office_was_taken_over_says_so_and_does_nothing_more(tell):
    story = tell(machines=1)
    story.daemon.planner.pass_once()
    story.store.write(lambda tx: tx.put(replace(tx.get(Owner, SCOPE), epoch=99, holder="somebody else")))
    before = story.states()
    for loop in (story.daemon.launcher, story.daemon.janitor):
        with pytest.raises(OutOfOffice):
            loop.pass_once()
    assert story.states() == before


def without(story, name):
    """The YAML with machines of their own names, less one."""
    others = [f"{{name: {machine}}}" for machine in story.world.machines if machine != name]
    return re.sub("count: .*", f"machines: [{', '.join(others)}]", story.path.read_text())


@pytest.mark.parametrize("state", ["inspecting", "cleaning", "available", "building", "ready", "in-use", "deleting"])
def test_a_machine_that_leaves_the_yaml_leaves_nothing_behind_whatever_it_is_at(tell, state):
    story = tell(machines=2, min_ready=0 if state == "available" else 1, max_servers=2)
    if state in {"in-use", "deleting"}:
        wants = story.request(1, ssh_keys=("ssh-ed25519 AAAAuser me",))
        story.run(lambda: story.state_of(wants) == "fulfilled")
    if state == "deleting":
        story.release(wants)
    assert story.run(lambda: state in {story.states().get("lab-01"), *(str(n.state) for n in on(story, "lab-01"))})
    story.reload(without(story, "lab-01"))
    if state == "in-use":
        story.run(limit=600)
        assert story.state_of(wants) == "fulfilled"
        story.release(wants)
    story.run(limit=1800)
    assert on(story, "lab-01") == []
    assert story.machine("lab-01").retired
    assert story.machine("lab-01").node_id is None
    still_open = [o for o in story.all(Operation) if o.state in {OperationState.PENDING, OperationState.RUNNING}]
    assert still_open == []
    assert len(story.nodes("ready")) == (state != "available")


def on(story, name):
    """The nodes on a machine that are not gone."""
    return [node for node in story.nodes() if node.machine == name and node.state is not NodeState.DELETED]


def test_a_promised_node_whose_machine_leaves_the_yaml_is_replaced(tell):
    story = tell(machines=2, min_ready=1, max_servers=2)
    story.run(story.ready(1))
    assert on(story, "lab-01")
    wants = story.request(1, ssh_keys=("ssh-ed25519 AAAAuser me",))
    story.daemon.planner.pass_once()
    assert story.state_of(wants) == "pending"
    story.reload(without(story, "lab-01"))
    assert story.run(lambda: story.state_of(wants) == "fulfilled", limit=600)
    assert story.nodes_of(wants)[0].machine == "lab-02"


def failed_attempts(story):
    return [told.message for told in story.all(Event) if told.type == "attempt-failed"]


def test_time_without_a_daemon_is_charged_to_nobody(tell):
    story = tell(machines=1, failures={"lab-01": "agent"})
    story.run(lambda: story.states() and story.machine("lab-01").work.step == "agent")
    story.die()
    story.clock.advance(850)
    story.start()
    story.run(limit=600)
    assert failed_attempts(story) == []


def test_time_in_which_the_database_was_locked_is_charged_to_nobody(tell, locked):
    story = tell(machines=1, delay=30)
    story.run(lambda: story.states() and story.machine("lab-01").work.step == "erase")
    with locked(story):
        for _ in range(20):
            story.clock.advance(30)
            story.daemon.launcher.pass_once()
    assert story.run(story.ready(1), limit=1800)
    assert failed_attempts(story) == []


def test_jobs_go_on_after_a_start_with_a_clock_that_was_set_back(tell):
    story = tell(machines=1)
    story.run(lambda: story.states() and story.machine("lab-01").work.step == "erase")
    row = story.machine("lab-01").work
    ahead = replace(row, next_at=row.next_at + 86400 * SECOND, deadline=row.deadline + 86400 * SECOND)
    change(story, story.machine("lab-01"), work=ahead)
    story.restart()
    assert story.run(story.ready(1), limit=1800)


def test_a_build_whose_files_cannot_be_removed_holds_up_no_other(tell):
    story = tell(min_ready=0)
    story.run(lambda: story.builds("ready"))
    [build] = story.builds("ready")
    in_the_way = story.folder / "a folder"
    in_the_way.mkdir()
    story.store.write(lambda tx: tx.put(replace(build, files={"raw": str(in_the_way)})))
    story.store.write(lambda tx: images.delete(tx, build.id, "tester"))
    wants = story.request()
    assert story.run(lambda: story.state_of(wants) == "fulfilled", limit=600)
    in_the_way.rmdir()
    assert story.run(lambda: story.builds("deleted"), limit=600)


def test_a_build_that_nobody_is_at_work_on_is_replaced(tell):
    story = tell(min_ready=1)
    story.daemon.builder.pass_once()
    lost = Build("ab" * 16, "debian", BuildState.BUILDING, story.clock.now(), story.clock.now())
    story.store.write(lambda tx: tx.add(lost))
    assert story.run(story.ready(1), limit=600)
    assert [build.id for build in story.builds("cancelled")] == [lost.id]


def test_what_is_old_is_swept_now_and_then_and_not_at_every_commit(tell):
    story, sweeps = tell(machines=3, min_ready=3), []

    def count(_connection, _cursor, statement, *_):
        if statement.startswith("DELETE FROM events"):
            sweeps.append(statement)

    event.listen(story.store.engine, "before_cursor_execute", count)
    story.run(story.ready(3))
    assert len(sweeps) == 1
    story.run(limit=2 * 3600 + 60)
    assert len(sweeps) == 3


@pytest.mark.parametrize("step", ["power-on", "agent", "erase", "write", "configure", "start", "login"])
def test_machines_of_thin_air_outlive_a_kill_at_any_step(tell, step):
    story = tell(machines=1, delay=2)
    assert story.run(lambda: step in [row.work.step for row in (*story.all(Machine), *story.nodes())])
    story.die()
    story.world = None
    story.start()
    revive(story.store, story.world)
    assert story.run(story.ready(1), limit=120)


def test_what_agents_say_while_the_database_is_locked_is_said_again(tell, locked):
    story = tell(machines=1, delay=10)
    story.run(lambda: story.states() and story.machine("lab-01").work.step == "agent")
    with locked(story):
        story.clock.advance(20)
        story.world.pass_once()
    assert story.run(lambda: story.machine("lab-01").state != "inspecting", limit=60)


def test_who_knocks_with_any_number_of_tokens_does_not_fill_the_memory(tell):
    story = tell(machines=1)
    for number in range(1200):
        story.desk.hello({"version": "1", "token": "x", "nonce": "n" * 16}, f"192.0.2.{number}")
    assert 0 < sum(story.desk.refused.values()) <= 1000


def test_a_machine_whose_systems_never_answer_does_not_keep_the_pool_from_the_others(tell):
    story = tell(machines=2, min_ready=1, failures={"lab-01": "login"})
    assert story.run(story.ready(1), limit=3600)


def test_a_machine_on_which_a_proven_image_does_not_start_is_broken_in_the_end(tell):
    story = tell(machines=2, min_ready=1, failures={"lab-01": "login"})
    story.run(story.ready(1), limit=3600)
    story.request()
    assert story.run(lambda: story.states()["lab-01"] == "broken", limit=4 * 3600)
    assert story.machine("lab-01").failure_code == "login-silent"


def test_a_machine_that_is_accepted_no_more_is_not_wiped_again(tell):
    story = tell(machines=2, min_ready=0, max_servers=2)
    story.run(lambda: set(story.states().values()) == {"available"})
    declared = "machines: [{name: lab-01, accept: false}, {name: lab-02}]"
    story.reload(re.sub("count: .*", declared, story.path.read_text()).replace("min-ready: 0", "min-ready: 2"))
    story.run(limit=600)
    assert story.states() == {"lab-01": "available", "lab-02": "occupied"}
    assert "1 waiting to be accepted" in " ".join(story.daemon.planner.reasons["small"])


def test_a_broken_machine_is_looked_at_again_as_soon_as_its_yaml_changes(tell):
    story = tell(machines=1, failures={"lab-01": "agent"})
    assert story.run(lambda: story.states().get("lab-01") == "broken", limit=7200)
    mended = story.path.read_text().replace("{'lab-01': 'agent'}", "{}")
    story.reload(mended)
    story.run(limit=60)
    assert story.states()["lab-01"] == "broken"  # nothing about this machine has changed
    story.reload(mended.replace("count: 1", "machines: [{name: lab-01, rack: other}]"))
    assert story.run(story.ready(1), limit=120)


@pytest.mark.parametrize("phase", ["agent", "erase", "write"])
def test_a_power_cut_while_an_agent_is_waited_for_is_seen_and_costs_no_strike(tell, phase):
    story = tell(machines=1, max_servers=1, delay=10)

    def at_it():
        found = [o for o in story.all(Operation) if o.kind == phase]
        return bool(found) and found[-1].finished_at == 0

    assert story.run(at_it)
    machine = story.world.machines["lab-01"]
    machine.on, machine.life, machine.running, machine.boot_id = False, machine.life + 1, "", 0
    began = story.clock.now()
    assert story.run(story.ready(1), limit=300)
    assert story.machine("lab-01").strikes == 0
    assert [o.code for o in story.all(Operation) if o.code] == ["power-lost"]
    assert story.clock.now() - began < 180 * 1_000_000

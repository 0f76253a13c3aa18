"""What could leave a machine, a node or a request with nobody looking at it any more."""

import sqlite3
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from nodepool.coord.local import SCOPE
from nodepool.drivers import fake
from nodepool.drivers.step import Done
from nodepool.errors import OutOfOffice
from nodepool.model import Machine, MachineState, Owner
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

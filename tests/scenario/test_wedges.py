"""What could leave a machine, a node or a request with nobody looking at it any more."""

import sqlite3
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from nodepool.drivers import fake
from nodepool.model import Machine
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

"""What goes wrong with the service itself: nobody is charged, nothing is wiped or given out without looking."""

import logging
import re
import shutil
import sqlite3
from contextlib import closing, suppress

import pytest
from story import yaml_of

from nodepool.api.app import create_app
from nodepool.api.server import ApiServer
from nodepool.clock import SECOND
from nodepool.cmd.cli import main
from nodepool.errors import StoreUnavailable
from nodepool.model import Boot, BootState, Event, Machine, Operation, OperationState
from nodepool.service import freezing
from nodepool.store import tables as t

HOUR = 3600


@pytest.fixture
def nodepool(capsys):
    """A command against the story's store, over the real API; gives what it prints."""

    def run(story, *words):
        status = {"loops": {}, "held_back": list(story.daemon.planner.alarms)}
        app = create_app(story.store, story.current, lambda: story.daemon.planner.reasons, lambda: status)
        server = ApiServer(app, story.folder / "np.sock")
        server.start()
        try:
            assert main(["--url", str(story.folder / "np.sock"), *words]) == 0
        finally:
            server.stop()
        return " ".join(capsys.readouterr().out.split())

    return run


def copy_of(story):
    """A backup of the database, made while the daemon runs."""
    path = story.folder / "backup.db"
    with closing(sqlite3.connect(story.folder / "nodepool.db")) as live, closing(sqlite3.connect(path)) as backup:
        live.backup(backup)
    return path


def restore(story, path):
    story.die()
    for name in ("nodepool.db", "nodepool.db-wal", "nodepool.db-shm"):
        (story.folder / name).unlink(missing_ok=True)
    shutil.copy(path, story.folder / "nodepool.db")
    story.start()


def begun(story):
    """The steps that were ever begun."""
    return {operation.id for operation in story.all(Operation)}


# -- away for an hour --


def test_after_an_hour_away_no_job_is_charged_and_no_ready_node_thrown_away(tell):
    story = tell(machines=8, min_ready=6, max_servers=8, max_ready_age=7200)
    assert story.run(story.ready(6))
    ready = {node.id for node in story.nodes("ready")}
    story.request(1)
    assert story.run(lambda: story.nodes("building") and story.nodes("in-use"))
    story.die()
    story.clock.advance(HOUR)
    story.start()
    assert story.run(story.ready(6), limit=60)
    assert len(ready & {node.id for node in story.nodes("ready")}) == 5
    assert story.all(Event, t.events.c.type == "attempt-failed") == []
    assert {machine.strikes for machine in story.all(Machine)} == {0}


def test_a_hand_over_goes_on_after_an_hour_away_with_the_same_nodes(tell):
    story = tell(machines=2, min_ready=2, max_servers=2)
    assert story.run(story.ready(2))
    request = story.request(2, ssh_keys=("ssh-ed25519 AAAAuser me",))
    story.daemon.planner.pass_once()
    assert story.state_of(request) == "pending"
    promised = [node.id for node in story.nodes_of(request)]
    story.die()
    story.clock.advance(HOUR)
    story.start()
    assert story.run(lambda: story.state_of(request) == "fulfilled", limit=60)
    assert [node.id for node in story.nodes_of(request)] == promised


def test_a_back_off_is_over_after_an_hour_away(tell):
    story = tell(machines=1, max_servers=1, failures={"lab-01": "write"})
    assert story.run(lambda: story.states().get("lab-01") == "broken")
    story.die()
    story.clock.advance(HOUR)
    story.write(yaml_of(machines=1, max_servers=1))
    story.start()
    assert story.run(story.ready(1), limit=120)


def test_a_machine_that_was_switched_on_and_met_nobody_is_switched_on_again_and_not_charged(tell):
    story = tell(machines=1, max_servers=1, delay=5)
    assert story.run(lambda: any(boot.state is BootState.EXPECTED for boot in story.all(Boot)))
    story.die()
    story.world._events.clear()  # it asked for its boot script while nobody was there
    story.clock.advance(HOUR)
    story.start()
    assert story.run(story.ready(1), limit=120)
    assert story.all(Event, t.events.c.type == "attempt-failed") == []
    assert len(story.all(Boot)) == 2


def test_a_machine_that_boots_while_the_daemon_is_restarted_is_not_switched_off_again(tell):
    story = tell(machines=1, max_servers=1, delay=5)
    assert story.run(lambda: any(boot.state is BootState.EXPECTED for boot in story.all(Boot)))
    story.restart()
    assert story.run(story.ready(1), limit=120)
    assert len(story.all(Boot)) == 1


# -- nodes that are too old --


def test_nodes_that_are_too_old_all_at_once_are_exchanged_some_at_a_time(tell):
    story = tell(machines=10, min_ready=10, max_servers=10, max_ready_age=7200)
    assert story.run(story.ready(10))
    old = {node.id for node in story.nodes("ready")}
    story.die()
    story.clock.advance(3 * HOUR)
    story.start()
    fewest = [10]

    def exchanged():
        ready = {node.id for node in story.nodes("ready")}
        fewest[0] = min(fewest[0], len(ready))
        return len(ready) == 10 and not ready & old

    assert story.run(exchanged, limit=600)
    assert fewest[0] == 5


# -- the brake --


def test_a_yaml_that_loses_most_of_the_machines_costs_no_node_until_somebody_lets_it(tell, nodepool):
    story = tell(machines=8, min_ready=8, max_servers=8)
    assert story.run(story.ready(8))
    story.reload(yaml_of(machines=2, min_ready=2, max_servers=2))
    story.run(limit=HOUR)
    assert len(story.nodes("ready")) == 8
    for _ in range(3):
        story.request(1, ssh_keys=("ssh-ed25519 AAAAuser me",))
    story.run(limit=HOUR)
    assert len(story.nodes("in-use")) == 2, "those that are held back are given to nobody"
    assert len(story.nodes("ready")) == 6
    told = "pool lab/main would lose 6 of its 8 nodes at once, because the YAML has their machines no more"
    assert told in nodepool(story, "status")
    assert told in nodepool(story, "explain", "small")
    nodepool(story, "thaw")
    assert story.run(story.ready(0), limit=60)
    assert len(story.nodes("in-use")) == 2
    assert story.daemon.planner.alarms == ()


def test_a_mended_yaml_ends_the_alarm_by_itself(tell, caplog):
    story = tell(machines=8, min_ready=8, max_servers=8)
    assert story.run(story.ready(8))
    nodes = {node.id for node in story.nodes("ready")}
    with caplog.at_level(logging.ERROR, "nodepool.planner"):
        story.reload(re.sub("small", "smoll", yaml_of(machines=8, min_ready=8, max_servers=8)))
        story.run(limit=HOUR)
    told = [record.getMessage() for record in caplog.records if record.name == "nodepool.planner"]
    assert [sentence.split(" at once")[0] for sentence in told] == ["pool lab/main would lose 8 of its 8 nodes"]
    story.reload(yaml_of(machines=8, min_ready=8, max_servers=8))
    story.run(limit=HOUR)
    assert story.daemon.planner.alarms == ()
    assert {node.id for node in story.nodes("ready")} == nodes


def test_what_was_let_go_holds_for_that_yaml_only(tell, nodepool):
    story = tell(machines=8, min_ready=8, max_servers=8)
    assert story.run(story.ready(8))
    nodepool(story, "thaw")
    story.reload(yaml_of(machines=2, min_ready=2, max_servers=2))
    story.run(limit=HOUR)
    assert len(story.nodes("ready")) == 8


def test_what_an_operator_deletes_is_not_held_back(tell):
    story = tell(machines=8, min_ready=8, max_servers=8)
    assert story.run(story.ready(8))
    for node in story.nodes("ready"):
        story.delete(node.id)
    assert len(story.nodes("deleting")) == 8
    assert story.daemon.planner.alarms == ()


# -- an old copy of the database --


def test_a_database_restored_from_an_old_copy_wipes_and_gives_out_nothing_until_somebody_has_looked(tell, nodepool):
    story = tell(machines=3, min_ready=2, max_servers=3)
    assert story.run(story.ready(2))
    backup = copy_of(story)
    request = story.request(2)  # what the copy will not know of: its nodes look free there
    assert story.run(lambda: story.state_of(request) == "fulfilled")
    story.run(limit=60)
    restore(story, backup)
    steps, free = begun(story), {node.id for node in story.nodes("ready")}
    other = story.request(1)
    story.run(limit=HOUR)
    assert story.state_of(other) == "requested"
    assert begun(story) == steps
    assert {node.id for node in story.nodes("ready")} == free
    assert "frozen: the database is older than it was: restored from a copy" in nodepool(story, "status")
    assert "nodepool is frozen: the database is older" in nodepool(story, "explain", "small")
    story.restart()
    story.run(limit=HOUR)
    assert story.state_of(other) == "requested", "a restart is no look"
    assert "it goes on; it was frozen: the database is older" in nodepool(story, "thaw")
    assert story.run(lambda: story.state_of(other) == "fulfilled", limit=60)
    story.restart()
    assert story.store.read(freezing.frozen) == "", "what was looked at is not told again"


def test_a_new_database_where_there_was_another_wipes_nothing_until_somebody_has_looked(tell):
    story = tell(machines=2, min_ready=1, max_servers=2)
    assert story.run(story.ready(1))
    story.die()
    for path in story.folder.glob("nodepool.db*"):
        path.unlink()
    story.start()
    story.run(limit=HOUR)
    assert set(story.states().values()) == {"enrolled"}
    assert begun(story) == set()
    story.store.write(lambda tx: freezing.thaw(tx, story.current(), "me"))
    assert story.run(story.ready(1))


def test_a_machine_that_boots_while_nodepool_is_frozen_boots_its_disk(tell):
    story = tell(machines=1, max_servers=1, delay=30)
    mac = story.world.machines["lab-01"].mac
    assert story.run(lambda: story.desk.expected_boot(mac) is not None)
    story.store.write(lambda tx: freezing.freeze(tx, "a test"))
    assert story.desk.expected_boot(mac) is None
    story.store.write(lambda tx: freezing.thaw(tx, story.current(), "me"))
    assert story.desk.expected_boot(mac) is not None


@pytest.mark.parametrize("seconds", [0.5, 1, 3, 6, 9, 12])
def test_frozen_in_the_middle_of_the_work_nobody_is_charged_for_the_time(tell, seconds):
    story = tell(machines=2, min_ready=2, max_servers=2, delay=2)
    story.run(limit=seconds)
    story.store.write(lambda tx: freezing.freeze(tx, "a test"))
    story.run(limit=HOUR)
    assert not story.nodes("ready") or seconds > 9
    assert [o for o in story.all(Operation) if o.state is OperationState.FAILED] == []
    story.store.write(lambda tx: freezing.thaw(tx, story.current(), "me"))
    assert story.run(story.ready(2), limit=300)
    assert story.all(Event, t.events.c.type == "attempt-failed") == []


def test_an_idle_pool_that_has_forgotten_its_old_events_is_not_taken_for_an_old_copy(tell):
    story = tell(machines=1, max_servers=1)
    assert story.run(story.ready(1))
    story.clock.advance(90 * 24 * HOUR)
    story.run(limit=2 * HOUR)
    story.restart()
    assert story.store.read(freezing.frozen) == ""


# -- no room --


def pages(story, most):
    """Let the database grow to `most` pages; None: as it likes.  Gives how many it has."""
    with story.store.engine.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {most or 2**30}")
        return connection.exec_driver_sql("PRAGMA page_count").scalar()


def test_a_full_disk_is_told_and_waited_for_and_when_there_is_room_it_goes_on(tell, caplog):
    story = tell(machines=6, min_ready=6, max_servers=6)
    story.run(limit=3)
    pages(story, pages(story, None))
    for _ in range(60):
        for loop in story.daemon.loops.values():
            with suppress(StoreUnavailable):  # as a loop's thread does
                loop.pass_once()
        story.clock.advance(1)
    assert len([record for record in caplog.records if "disk is full" in record.getMessage()]) == 1
    assert not story.ready(6)()
    pages(story, None)
    assert story.run(story.ready(6), limit=600)
    assert {machine.strikes for machine in story.all(Machine)} == {0}
    assert story.all(Event, t.events.c.type == "attempt-failed") == []


# -- the clock --


def jump(story, seconds):
    """The clock is set, as it can be found after a restart (while it runs the daemon's never goes back)."""
    story.die()
    story.clock._now += seconds * SECOND
    ahead = [(when + min(0, seconds) * SECOND, *happening) for when, *happening in story.world._events]
    story.world._events[:] = ahead  # the machines have no part in it
    story.start()


@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.parametrize("after", [3, 12, 25])
def test_a_clock_that_jumps_costs_nobody_anything(tell, hours, after):
    story = tell(machines=4, min_ready=3, max_servers=4, max_ready_age=2 * HOUR, delay=5)
    story.run(limit=after)
    jump(story, hours * HOUR)
    assert story.run(story.ready(3), limit=300)
    assert story.all(Event, t.events.c.type == "attempt-failed") == []
    nodes = {node.id for node in story.nodes("ready")}
    request = story.request(2, ssh_keys=("ssh-ed25519 AAAAuser me",))
    story.daemon.planner.pass_once()
    assert story.state_of(request) == "pending"
    jump(story, hours * HOUR)
    assert story.run(lambda: story.state_of(request) == "fulfilled", limit=60)
    assert nodes >= {node.id for node in story.nodes_of(request)}


@pytest.mark.parametrize("after", [3, 12, 25])
def test_a_clock_that_is_set_forward_under_a_running_daemon_costs_nobody_anything(tell, after):
    story = tell(machines=4, min_ready=3, max_servers=4, max_ready_age=2 * HOUR, delay=5)
    story.run(limit=after)
    story.clock.advance(HOUR)
    assert story.run(story.ready(3), limit=300)
    assert story.all(Event, t.events.c.type == "attempt-failed") == []


def test_a_clock_set_back_puts_off_no_second_try(tell):
    story = tell(machines=1, max_servers=1, failures={"lab-01": "write"})
    assert story.run(lambda: story.states().get("lab-01") == "broken")
    story.write(yaml_of(machines=1, max_servers=1))
    jump(story, -10 * HOUR)
    assert story.run(story.ready(1), limit=300)


def test_a_clock_set_back_puts_off_no_build_of_an_image_that_failed(tell):
    story = tell(machines=1, max_servers=1)
    story.broken_images.add("debian")
    assert story.run(lambda: len(story.builds("failed")) == 3)
    story.broken_images.clear()
    jump(story, -10 * HOUR)
    assert story.run(story.ready(1), limit=300)

"""Machines that the YAML does not accept, accepted by command: what they have on their disks goes only then."""

import pytest
from story import yaml_of

from nodepool.errors import Refused
from nodepool.model import Machine, Node
from nodepool.service import machines

DECLARED = "machines: [{name: lab-01, accept: false}, {name: lab-02, accept: false}]"


@pytest.fixture
def unaccepted(tell):
    """Two machines that were inspected and wait for somebody to accept them."""
    story = tell(yaml=yaml_of(machines=2, min_ready=1, max_servers=2).replace("count: 2", DECLARED))
    story.run(limit=600)
    assert set(story.states().values()) == {"inspected"}
    return story


def do(story, use_case, *words):
    return story.store.write(lambda tx: use_case(tx, *words))


def accept(story, name):
    return do(story, machines.accept, story.machine(name), "alice")


def test_a_machine_that_was_accepted_by_command_is_wiped_and_used(unaccepted):
    accept(unaccepted, "lab-01")
    assert unaccepted.run(unaccepted.ready(1))
    assert unaccepted.states() == {"lab-01": "occupied", "lab-02": "inspected"}
    found = unaccepted.machine("lab-01")
    assert (found.accepted, found.accepted_by, found.accepted_at > 0) == (True, "alice", True)


def test_an_acceptance_by_command_outlives_edits_of_the_yaml(unaccepted):
    accept(unaccepted, "lab-01")
    unaccepted.run(unaccepted.ready(1))
    yaml = unaccepted.path.read_text()
    unaccepted.reload(yaml.replace("lab-01, accept: false", "lab-01, accept: false, rack: other"))
    unaccepted.restart()
    unaccepted.delete(unaccepted.nodes("ready")[0].id)
    assert unaccepted.run(lambda: len(unaccepted.all(Node)) == 2 and unaccepted.ready(1)())
    assert unaccepted.machine("lab-01").accepted_by == "alice"


def test_an_acceptance_by_command_ends_when_the_machine_leaves_the_yaml(unaccepted):
    accept(unaccepted, "lab-01")
    unaccepted.run(unaccepted.ready(1))
    yaml = unaccepted.path.read_text()
    unaccepted.reload(yaml.replace("{name: lab-01, accept: false}, ", "").replace("min-ready: 1", "min-ready: 0"))
    unaccepted.run(limit=600)
    unaccepted.reload(yaml)
    unaccepted.run(limit=600)
    found = unaccepted.machine("lab-01")
    assert (found.retired, found.accepted, found.accepted_by) == (False, False, "")


def test_an_acceptance_by_command_can_be_withdrawn(unaccepted):
    accept(unaccepted, "lab-01")
    unaccepted.run(unaccepted.ready(1))
    do(unaccepted, machines.withdraw, unaccepted.machine("lab-01"), unaccepted.current(), "bob")
    unaccepted.delete(unaccepted.nodes("ready")[0].id)
    unaccepted.run(limit=600)
    assert unaccepted.states() == {"lab-01": "available", "lab-02": "inspected"}
    assert not unaccepted.machine("lab-01").accepted


def test_a_machine_is_not_accepted_before_it_was_looked_at(tell):
    story = tell(machines=1)
    story.run(lambda: bool(story.all(Machine)))
    with pytest.raises(Refused, match="nodepool has not seen lab-01 yet"):
        do(story, machines.accept, story.store.read(lambda tx: tx.select(Machine))[0], "alice")

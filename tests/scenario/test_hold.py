"""Nodes that somebody holds: left alone by everything, until they are let go."""

import pytest

from nodepool.clock import micros
from nodepool.errors import Refused
from nodepool.model import Node, NodeState
from nodepool.service import nodes


@pytest.fixture
def used(tell):
    """A story with one machine whose node is in use, the request's id, the node's id, and what may be done to it."""
    story = tell(machines=2, min_ready=0, max_servers=1)
    wants = story.request()
    assert story.run(lambda: story.state_of(wants) == "fulfilled")
    return story, wants, story.nodes_of(wants)[0].id


def do(story, use_case, *words):
    return story.store.write(lambda tx: use_case(tx, *words))


def hold(story, node_id, seconds=0.0):
    until = story.clock.now() + micros(seconds) if seconds else 0
    return do(story, nodes.hold, node_id, "alice", "the disk looks odd", until)


def node(story, node_id):
    return story.store.read(lambda tx: tx.get(Node, node_id))


def test_a_held_node_is_left_alone_when_its_request_is_released(used):
    story, wants, held = used
    hold(story, held)
    assert story.state_of(wants) == "fulfilled"
    story.release(wants)
    story.run(limit=48 * 3600)
    assert (story.state_of(wants), str(node(story, held).state)) == ("released", "hold")
    assert node(story, held).comment == "the disk looks odd"


def test_a_held_node_is_left_alone_when_it_is_given_back_itself(used):
    story, wants, held = used
    hold(story, held)
    do(story, nodes.release, held, "ci")
    story.run(limit=3600)
    assert (story.state_of(wants), str(node(story, held).state)) == ("released", "hold")


def test_a_held_node_whose_request_is_over_is_wiped_once_it_is_let_go(used):
    story, wants, held = used
    hold(story, held)
    story.release(wants)
    do(story, nodes.unhold, held, "alice")
    assert story.run(lambda: set(story.states().values()) == {"available"})
    assert node(story, held).state is NodeState.DELETED


def test_a_held_node_whose_request_goes_on_is_back_in_use_once_it_is_let_go(used):
    story, wants, held = used
    hold(story, held)
    do(story, nodes.unhold, held, "alice")
    story.run(limit=3600)
    found = node(story, held)
    assert (str(found.state), found.held_by, found.comment, found.hold_until) == ("in-use", "", "", 0)
    story.release(wants)
    assert story.run(lambda: node(story, held).state is NodeState.DELETED)


def test_a_hold_ends_when_its_time_is_over_and_not_before(used):
    story, wants, held = used
    hold(story, held, 7200)
    story.release(wants)
    story.run(limit=7199)
    assert node(story, held).state is NodeState.HOLD
    assert story.run(lambda: node(story, held).state is NodeState.DELETED, limit=60)


def test_a_hold_outlives_the_daemon_and_its_yaml(used):
    story, _, held = used
    hold(story, held)
    story.restart()
    story.reload(story.path.read_text().replace("min-ready: 0", "min-ready: -1"))
    story.run(limit=3600)
    assert node(story, held).state is NodeState.HOLD


def test_holding_again_changes_until_when(used):
    story, _, held = used
    hold(story, held, 60)
    hold(story, held)
    story.run(limit=3600)
    assert node(story, held).state is NodeState.HOLD


def test_a_held_ready_node_is_replaced_and_never_given_out(tell):
    story = tell(machines=2, min_ready=1, max_servers=2)
    story.run(story.ready(1))
    [first] = story.nodes("ready")
    hold(story, first.id)
    assert story.run(story.ready(1))
    wants = story.request()
    assert story.run(lambda: story.state_of(wants) == "fulfilled")
    assert [found.id for found in story.nodes_of(wants)] != [first.id]


def test_a_node_that_was_being_handed_over_is_held_and_its_request_gets_another(tell):
    story = tell(machines=2, min_ready=1, max_servers=2)
    story.run(story.ready(1))
    [first] = story.nodes("ready")
    wants = story.request(ssh_keys=("ssh-ed25519 AAAAuser me",))
    story.daemon.planner.pass_once()
    assert story.state_of(wants) == "pending"
    hold(story, first.id)
    assert story.run(lambda: story.state_of(wants) == "fulfilled")
    assert (str(node(story, first.id).state), node(story, first.id).request_id) == ("hold", None)


def test_what_was_given_back_before_it_was_held_does_not_come_back_to_its_request(tell):
    story = tell(machines=2, min_ready=0, max_servers=2)
    wants = story.request(2)
    story.run(lambda: story.state_of(wants) == "fulfilled")
    first = story.nodes_of(wants)[0].id
    do(story, nodes.release, first, "ci")
    hold(story, first)
    do(story, nodes.unhold, first, "alice")
    assert story.run(lambda: node(story, first).state is NodeState.DELETED)
    assert story.state_of(wants) == "fulfilled"


def test_a_held_node_can_be_deleted(used):
    story, wants, held = used
    hold(story, held)
    story.delete(held)
    assert story.run(lambda: node(story, held).state is NodeState.DELETED)
    assert story.state_of(wants) == "released"


def test_what_cannot_be_held_says_what_can(tell):
    story = tell(machines=1, min_ready=1)
    story.run(lambda: bool(story.nodes("building")))
    with pytest.raises(Refused, match="node 1 is building: what can be held is failed, in-use, ready, used"):
        hold(story, 1)


def test_a_hold_until_a_time_that_is_over_is_refused(used):
    story, _, held = used
    with pytest.raises(Refused, match="is over already"):
        do(story, nodes.hold, held, "alice", "why", story.clock.now())

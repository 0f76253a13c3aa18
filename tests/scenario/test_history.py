"""What is remembered of the past, and for how long."""

from story import yaml_of

from nodepool.model import Boot, Event, Node, Operation, Request, RequestNode
from nodepool.service import views


def rounds(story, count):
    """Let the machine go through so many lives, an hour each."""
    for _ in range(count):
        story.run(story.ready(1))
        story.run(limit=3600)
        story.delete(story.nodes("ready")[0].id)
    story.run(story.ready(1))


def test_events_are_kept_for_the_time_that_the_yaml_sets(tell):
    story = tell(yaml=yaml_of(machines=1, max_servers=1).replace("version: 1", "version: 1\nevent-retention: 3h"))
    rounds(story, 8)
    story.run(limit=2 * 3600)
    oldest = min(event.time for event in story.all(Event))
    assert 2 * 3600 < (story.clock.now() - oldest) / 1e6 <= 4 * 3600  # the janitor sweeps hourly
    ended = [operation.finished_at for operation in story.all(Operation) if operation.finished_at]
    assert all(story.clock.now() - end <= 4 * 3600e6 for end in ended)
    assert len(story.all(Boot)) < 8


def test_nodes_that_are_gone_and_requests_that_are_over_are_forgotten_in_the_end(tell):
    story = tell(yaml=yaml_of(machines=1, max_servers=1).replace("version: 1", "version: 1\nevent-retention: 8h"))
    wants = story.request()
    story.run(lambda: story.state_of(wants) == "fulfilled")
    story.release(wants)
    rounds(story, 4)
    assert story.state_of(wants) == "released"
    story.run(limit=10 * 3600)
    assert (story.all(Request), story.all(RequestNode)) == ([], [])
    assert [str(node.state) for node in story.all(Node)] == ["ready"]


def test_a_node_that_is_gone_is_remembered_as_long_as_its_request(tell):
    story = tell(yaml=yaml_of(machines=2, max_servers=2).replace("version: 1", "version: 1\nevent-retention: 1h"))
    wants = story.request(2)
    story.run(lambda: story.state_of(wants) == "fulfilled")
    first = story.nodes_of(wants)[0].id
    story.delete(first)
    story.run(limit=24 * 3600)
    assert story.nodes_of(wants)[0].id == first
    story.restart()
    story.release(wants)
    assert story.run(story.ready(1), limit=600)


def test_what_goes_on_is_kept_however_old_it_is(tell):
    story = tell(yaml=yaml_of(machines=1, max_servers=1).replace("version: 1", "version: 1\nevent-retention: 1h"))
    wants = story.request()
    story.run(lambda: story.state_of(wants) == "fulfilled")
    story.run(limit=24 * 3600)
    assert story.state_of(wants) == "fulfilled"
    story.release(wants)
    assert story.run(story.ready(1), limit=600)


def test_a_node_whose_events_are_forgotten_can_still_be_shown(tell):
    story = tell(yaml=yaml_of(machines=1, max_servers=1).replace("version: 1", "version: 1\nevent-retention: 1h"))
    story.run(story.ready(1))
    story.run(limit=24 * 3600)
    [node] = story.nodes("ready")
    shown = story.store.read(lambda tx: views.node_in_full(tx, story.current(), tx.get(Node, node.id)))
    assert [phase["state"] for phase in shown["timeline"]] == ["forgotten", "ready"]
    assert shown["events"] == []

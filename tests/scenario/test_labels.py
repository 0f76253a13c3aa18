"""Several labels in one pool."""

import pytest

from nodepool.errors import Refused
from nodepool.model import Node, Wanted
from nodepool.service import requests
from nodepool.service.requests import Wish

YAML = """
version: 1
diskimages: [{name: debian, release: bookworm, elements: [debian-minimal]}]
labels: [{name: small, min-ready: %(small)s}, {name: big, min-ready: %(big)s}]
providers:
  - name: lab
    driver: fake
    count: %(machines)s
    delay: 1
    pools:
      - name: main
        max-servers: %(max_servers)s
        labels: [{name: small, diskimage: debian}, {name: big, diskimage: debian}]
"""


def yaml_of(machines, small=0, big=0, max_servers=9):
    return YAML % {"machines": machines, "small": small, "big": big, "max_servers": max_servers}


def ask(story, **wanted):
    wish = Wish(tuple(Wanted(label, count) for label, count in wanted.items()))
    return story.store.write(lambda tx: requests.create(tx, story.current(), wish)).id


@pytest.mark.parametrize("max_servers", [9, 2], ids=["machines are scarce", "slots are scarce"])
def test_nodes_that_nobody_wants_make_room_for_a_request_of_another_label(tell, max_servers):
    story = tell(yaml=yaml_of(machines=2 if max_servers == 9 else 4, small=2, max_servers=max_servers))
    assert story.run(story.ready(2))
    wants = ask(story, big=1)
    assert story.run(lambda: story.state_of(wants) == "fulfilled", limit=600)
    assert [node.label for node in story.nodes("ready")] == ["small"]
    story.run(limit=600)
    assert [node.label for node in story.nodes("ready")] == ["small"]


def test_what_gives_way_to_a_request_is_not_taken_by_min_ready_meanwhile(tell):
    story = tell(yaml=yaml_of(machines=8, big=2, max_servers=4))
    assert story.run(lambda: len(story.nodes("ready")) == 2, limit=600)
    first = ask(story, small=2)
    assert story.run(lambda: story.state_of(first) == "fulfilled", limit=600)
    wants = ask(story, small=2)
    assert story.run(lambda: story.state_of(wants) == "fulfilled", limit=600)
    made = [node.label for node in story.all(Node)]
    assert made.count("big") == 2, "a node was made for min-ready in a slot that was freed for the request"


def test_what_is_kept_beyond_min_ready_makes_room_first(tell):
    story = tell(yaml=yaml_of(machines=3, small=3))
    story.run(story.ready(3))
    story.reload(yaml_of(machines=3, small=1, big=1))
    story.run(limit=60)
    wants = ask(story, big=2)
    assert story.run(lambda: story.state_of(wants) == "fulfilled", limit=600)
    assert [node.label for node in story.nodes("ready")] == ["small"]


def test_no_node_is_taken_down_for_a_request_that_free_machines_can_serve(tell):
    story = tell(yaml=yaml_of(machines=4, small=2))
    story.run(story.ready(2))
    before = {node.id for node in story.nodes("ready")}
    wants = ask(story, big=2)
    assert story.run(lambda: story.state_of(wants) == "fulfilled", limit=600)
    assert {node.id for node in story.nodes("ready")} == before


def test_min_ready_alone_takes_nothing_from_another_label(tell):
    story = tell(yaml=yaml_of(machines=2, small=2))
    story.run(story.ready(2))
    before = {node.id for node in story.nodes("ready")}
    story.reload(yaml_of(machines=2, small=2, big=1))
    story.run(limit=600)
    assert {node.id for node in story.nodes("ready")} == before


def test_a_request_whose_labels_never_fit_together_is_refused(tell):
    story = tell(yaml=yaml_of(machines=3))
    with pytest.raises(Refused, match="2 of small and 2 of big are more than their pools can ever have"):
        ask(story, small=2, big=2)
    wants = ask(story, small=1, big=2)
    assert story.run(lambda: story.state_of(wants) == "fulfilled", limit=600)


def test_a_request_that_no_longer_fits_fails_and_does_not_hold_up_the_queue(tell):
    story = tell(yaml=yaml_of(machines=4))
    large = ask(story, small=2, big=2)
    story.reload(yaml_of(machines=3))
    small = ask(story, small=1)
    assert story.run(lambda: story.state_of(small) == "fulfilled", limit=600)
    assert story.state_of(large) == "failed"

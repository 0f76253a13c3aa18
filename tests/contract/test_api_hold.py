"""Holding nodes and accepting machines over the API, and the history that remembers it."""

import getpass
from dataclasses import replace

import pytest
from api_pool import served
from test_api import problem

from nodepool.clock import micros, rfc3339
from nodepool.model import Event, Machine, MachineState, Operation
from nodepool.store import tables as t


@pytest.fixture
def used(tmp_path):
    """A pool whose node 1 is in use, by request 1."""
    with served(tmp_path) as pool:
        pool.until("ready")
        pool.request("small")
        pool.settle()
        yield pool


@pytest.fixture
def unaccepted(tmp_path):
    """A pool whose machine lab-01 was inspected and waits to be accepted."""
    with served(tmp_path) as pool:
        pool.until("ready")
        machine = pool.store.read(lambda tx: tx.select(Machine))[0]
        pool.store.write(lambda tx: tx.put(replace(machine, state=MachineState.INSPECTED, accepted=False)))
        yield pool


def test_a_held_node_says_who_holds_it_why_and_until_when(used):
    until = rfc3339(used.clock.now() + micros(7200))
    answer = used.post("/nodes/1/hold", {"reason": "odd disk", "seconds": 7200})
    assert (answer.status, answer.body["state"], answer.body["request_id"]) == (200, "hold", "1")
    node = used.get("/nodes/1").body
    me = getpass.getuser()
    assert (node["held_by"], node["comment"], node["hold_until"]) == (me, "odd disk", until)
    assert node["at"] == f"held by {me} until {until}: odd disk"


def test_a_hold_may_end_at_a_time_of_any_zone(used):
    answer = used.post("/nodes/1/hold", {"reason": "x", "until": "2033-05-18T05:33:20+02:00"})
    assert answer.body["hold_until"] == "2033-05-18T03:33:20.000Z"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "reason"),
        ({"reason": ""}, "reason"),
        ({"reason": "x", "seconds": 0}, "seconds"),
        ({"reason": "x", "until": "2033-05-18T05:33:20"}, "until"),
        ({"reason": "x", "until": "2033-05-18T05:33:20Z", "seconds": 1}, "give until or seconds, not both"),
    ],
)
def test_what_makes_no_hold_is_said(used, body, said):
    assert said in problem(used.post("/nodes/1/hold", body), 422, "invalid")


def test_a_hold_until_a_time_that_is_over_is_refused(used):
    answer = used.post("/nodes/1/hold", {"reason": "x", "until": "2001-01-01T00:00:00Z"})
    assert "is over already" in problem(answer, 409, "refused")


def test_a_hold_is_ended_once(used):
    used.post("/nodes/1/hold", {"reason": "x"})
    answer = used.delete("/nodes/1/hold")
    assert (answer.status, answer.body["state"], answer.body["held_by"]) == (202, "in-use", "")
    assert "it is not held" in problem(used.delete("/nodes/1/hold"), 409, "refused")


def test_releasing_a_request_leaves_its_held_node_held(used):
    used.post("/nodes/1/hold", {"reason": "x"})
    assert used.delete("/requests/1").body["state"] == "released"
    assert used.get("/nodes/1").body["state"] == "hold"


def test_explain_names_the_nodes_that_are_held(used):
    used.post("/nodes/1/hold", {"reason": "odd disk"})
    [held] = used.get("/labels/small/explain").body["held"]
    assert (held["id"], held["machine"], held["reason"], held["until"]) == ("1", "lab-01", "odd disk", None)


def test_the_life_of_a_node_has_every_second_of_it_and_who_did_what(used):
    used.clock.advance(10)
    used.post("/nodes/1/hold", {"reason": "odd disk"})
    used.clock.advance(30)
    used.delete("/requests/1")
    used.delete("/nodes/1/hold")
    used.run(lambda: used.get("/nodes/1").body["state"] == "deleted")
    node = used.get("/nodes/1").body
    spent = {}
    for phase in node["timeline"]:
        spent[phase["state"]] = spent.get(phase["state"], 0) + phase["seconds"]
    assert (spent["in-use"], spent["hold"]) == (10, 30)
    assert sum(spent.values()) == pytest.approx(node["total_seconds"], abs=0.2)
    told = [(event["type"], event["actor"]) for event in node["events"]]
    me = getpass.getuser()
    assert ("hold", me) in told
    assert told.index(("hold", me)) < told.index(("given-back", me)) < told.index(("release", me))
    assert node["events"][-1]["seconds"] == node["total_seconds"]


def test_a_machine_says_how_long_it_was_in_each_state(used):
    used.clock.advance(1000)
    spent = used.get("/machines/lab-01").body["spent"]
    assert next(iter(spent)) == "occupied"
    assert spent["occupied"] >= 1000
    assert {"enrolled", "inspecting", "cleaning", "available"} <= spent.keys()


def test_what_was_before_the_events_that_are_kept_is_said_to_be_forgotten(used):
    used.clock.advance(1000)
    used.post("/nodes/1/hold", {"reason": "odd disk"})
    before = used.clock.now()
    used.store.write(lambda tx: (tx.remove(Event, t.events.c.time < before), tx.remove(Operation)))
    used.clock.advance(30)
    node = used.get("/nodes/1").body
    assert [phase["state"] for phase in node["timeline"]] == ["forgotten", "hold"]
    assert sum(phase["seconds"] for phase in node["timeline"]) == pytest.approx(node["total_seconds"])


def test_a_machine_is_accepted_with_the_facts_that_were_shown(unaccepted):
    shown = unaccepted.get("/machines/lab-01").body
    assert (shown["accepted"], shown["accepted_by"], bool(shown["facts_id"])) == (False, "", True)
    answer = unaccepted.post("/machines/lab-01/accept", {"facts_id": shown["facts_id"]})
    assert (answer.status, answer.body["accepted"], answer.body["accepted_by"]) == (202, True, getpass.getuser())
    unaccepted.settle()
    assert unaccepted.get("/machines/lab-01").body["state"] == "cleaning"


def test_a_machine_with_other_facts_than_were_shown_is_not_accepted(unaccepted):
    answer = unaccepted.post("/machines/lab-01/accept", {"facts_id": "0123456789abcdef"})
    assert "has told other facts since they were shown" in problem(answer, 409, "refused")


def test_an_acceptance_by_command_is_withdrawn_by_command(unaccepted):
    unaccepted.post("/machines/lab-01/accept")
    answer = unaccepted.delete("/machines/lab-01/accept")
    assert (answer.status, answer.body["accepted_by"], answer.body["accepted_at"]) == (200, "", None)


def test_what_the_yaml_accepts_is_not_withdrawn_by_command(used):
    assert "is changed there" in problem(used.delete("/machines/lab-01/accept"), 409, "refused")

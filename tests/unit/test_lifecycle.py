"""The tables: whole, closed, and the only way from state to state."""

import itertools

import pytest

from nodepool import lifecycle as lc
from nodepool import model as m
from nodepool.errors import IllegalTransition

STATES = {"node": m.NodeState, "machine": m.MachineState, "request": m.RequestState, "build": m.BuildState}
EVENTS = {"node": lc.NodeEvent, "machine": lc.MachineEvent, "request": lc.RequestEvent, "build": lc.BuildEvent}
PAIRS = [(kind, s, e) for kind in STATES for s, e in itertools.product(STATES[kind], EVENTS[kind])]


def record(kind, state):
    work = m.Work(step="somewhere", attempt=2)
    if kind == "node":
        return m.Node(1, "l", "p", "q", 1, "m", "i", "b", "g", state, 5, 5, work=work)
    if kind == "machine":
        return m.Machine(1, "m", "p", state, 5, 5, work=work)
    if kind == "request":
        return m.Request(1, "t", (m.Wanted("l"),), state, 5, 5, work=work)
    return m.Build("b", "i", state, 5, 5, work=work)


@pytest.mark.parametrize(("kind", "state", "event"), PAIRS)
def test_an_event_either_leads_where_the_table_says_or_raises_and_changes_nothing(kind, state, event):
    before = record(kind, state)
    target = lc.TABLES[kind].get((state, event))
    if target is None:
        with pytest.raises(IllegalTransition, match=f"is {state}"):
            lc.advance(before, event, 9)
        assert before == record(kind, state)
    else:
        after = lc.advance(before, event, 9)
        assert (after.state, after.since, after.work) == (target, 9, m.IDLE)


@pytest.mark.parametrize("kind", STATES)
def test_every_state_is_final_or_waits_for_people_or_has_a_way_out_by_time(kind):
    for state in STATES[kind]:
        assert (state in lc.FINAL[kind]) + (state in lc.WAITING[kind]) + (state in lc.WAY_OUT[kind]) == 1, state


@pytest.mark.parametrize("kind", STATES)
def test_every_state_that_is_not_final_can_be_left(kind):
    leaving = {state for state, _ in lc.TABLES[kind]}
    assert leaving == {state for state in STATES[kind] if state not in lc.FINAL[kind]}


@pytest.mark.parametrize("kind", STATES)
def test_a_way_out_is_an_event_that_the_state_has(kind):
    for state in STATES[kind]:
        event = lc.WAY_OUT[kind].get(state)
        if event is None or isinstance(event, lc.MachineEvent) != (kind == "machine"):
            continue
        assert (state, event) in lc.TABLES[kind]


def test_a_node_that_cannot_be_deleted_breaks_its_machine():
    assert lc.WAY_OUT["node"][m.NodeState.DELETING] is lc.MachineEvent.BREAK
    assert (m.MachineState.OCCUPIED, lc.MachineEvent.BREAK) in lc.MACHINE


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 5), (2, 10), (3, 20), (7, 300), (1000, 300)])
def test_backoff_doubles_up_to_its_limit(attempt, seconds):
    assert lc.Backoff(first=5, limit=300).seconds(attempt) == seconds

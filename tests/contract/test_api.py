"""The REST API over a real socket: nodes, machines, images, labels, events, and its errors."""

import getpass
from dataclasses import replace

import pytest
from api_pool import served

from nodepool.model import Boot, Machine, MachineState, NodeState


@pytest.fixture
def pool(tmp_path):
    with served(tmp_path) as pool:
        yield pool


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """A pool that no test changes."""
    with served(tmp_path_factory.mktemp("idle")) as pool:
        yield pool


@pytest.fixture
def failing(tmp_path):
    """A pool whose first machine fails at `write` for ever."""
    with served(tmp_path, failures="{lab-01: write}") as pool:
        yield pool


def problem(answer, status, code):
    """The sentence of a problem that has this status and code."""
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status, answer.body["status"], answer.body["code"]) == (status, status, code)
    return answer.body["detail"]


def report(pool, **lines):
    """What the agent of lab-01 reports on its operation."""
    boot = pool.store.read(lambda tx: tx.select(Boot))[0]
    order = pool.desk.poll({"boot": str(boot.id), "nonce": boot.nonce}, boot.address).lines
    lines = {"boot": str(boot.id), "nonce": boot.nonce, "operation": order["operation"], **lines}
    return pool.desk.poll(lines, boot.address)


def test_a_pool_without_nodes_lists_none(idle):
    answer = idle.get("/nodes")
    assert (answer.status, answer.body) == (200, {"items": [], "next": None})


def test_a_ready_node_is_listed_with_its_machine_and_its_age(pool):
    pool.until("ready")
    pool.clock.advance(90)
    (node,) = pool.get("/nodes").items
    assert node | {"since": ""} == {
        "id": "1",
        "label": "small",
        "provider": "lab",
        "pool": "main",
        "machine": "lab-01",
        "address": "198.18.0.1",
        "state": "ready",
        "since": "",
        "age": 90.0,
        "locked": False,
        "at": "",
        "failure": "",
    }


def test_the_detailed_list_has_what_is_needed_to_log_in(pool):
    pool.until("ready")
    (node,) = pool.get("/nodes?detail=true").items
    assert node["host_key"].startswith("ssh-ed25519 ")
    assert (node["username"], node["port"], node["request_id"]) == ("root", 22, None)


@pytest.mark.parametrize(
    ("query", "count"),
    [("label=small", 1), ("label=large", 0), ("state=ready", 1), ("state=building", 0), ("provider=lab", 1)],
)
def test_nodes_are_filtered(pool, query, count):
    pool.until("ready")
    assert len(pool.get(f"/nodes?{query}").items) == count


def test_a_long_list_comes_in_pages(tmp_path):
    with served(tmp_path, min_ready=3) as pool:
        pool.until("ready", "ready", "ready")
        first = pool.get("/nodes?limit=2")
        assert ([node["id"] for node in first.items], first.body["next"]) == (["1", "2"], "2")
        second = pool.get(f"/nodes?limit=2&cursor={first.body['next']}")
        assert ([node["id"] for node in second.items], second.body["next"]) == (["3"], None)


def test_a_list_shows_how_far_the_agent_is(pool):
    pool.run(lambda: pool.nodes() and pool.nodes()[0].work.step == "write")
    report(pool, state="running", done="430", total="1000", phase="readback")
    assert pool.get("/nodes").items[0]["at"] == "write 43% (readback)"


def test_the_timeline_of_a_node_accounts_for_every_second(pool):
    pool.until("ready")
    pool.clock.advance(30)
    pool.post("/nodes/1/release")
    answer = pool.get("/nodes/1")
    phases = [item["phase"] for item in answer.body["timeline"]]
    assert phases == ["write", "configure", "start", "login", "ready"]
    assert sum(item["seconds"] for item in answer.body["timeline"]) == pytest.approx(answer.body["total_seconds"])
    assert answer.body["ready_seconds"] == pytest.approx(answer.body["total_seconds"] - 30)
    assert answer.headers["etag"].strip('"').isdecimal()


def test_a_node_that_is_gone_keeps_its_timeline(pool):
    pool.until("ready")
    pool.delete("/nodes/1")
    pool.run(lambda: pool.get("/nodes/1").body["state"] == "deleted")
    pool.clock.advance(1000)
    body = pool.get("/nodes/1").body
    assert [item["phase"] for item in body["timeline"]][-3:] == ["power-off", "power-on", "agent"]
    assert sum(item["seconds"] for item in body["timeline"]) == pytest.approx(body["total_seconds"])
    assert [node["id"] for node in pool.get("/nodes?state=deleted").items] == ["1"]


def test_a_failure_is_told_with_phase_reason_fault_and_what_happens_next(failing):
    failing.run(lambda: failing.nodes() and failing.nodes()[0].work.attempt == 2)
    trouble = failing.get("/nodes/1").body["trouble"]
    assert trouble["phase"] == "write"
    assert trouble["reason"] == "disk vda: input/output error at byte 4194304"
    assert (trouble["code"], trouble["fault"]) == ("disk-write", "machine")
    assert trouble["next"].startswith("attempt 2 of 3 goes on in ")


def test_a_broken_machine_says_why_and_when_it_is_looked_at_again(failing):
    failing.run(lambda: failing.get("/machines/lab-01").body["state"] == "broken")
    body = failing.get("/machines/lab-01").body
    assert body["trouble"]["phase"] == "write"
    assert "inspected again in 60 min" in body["trouble"]["next"]
    assert "nodepool machine-inspect lab-01" in body["trouble"]["next"]
    assert [life["failure"] for life in body["lives"]] == ["disk vda: input/output error at byte 4194304"]
    stuck = failing.get("/nodes/1").body
    assert stuck["trouble"]["reason"] == body["trouble"]["reason"]


def test_an_operator_has_a_broken_machine_looked_at_again_now(failing):
    failing.run(lambda: failing.get("/machines/lab-01").body["state"] == "broken")
    answer = failing.post("/machines/lab-01/inspect")
    assert (answer.status, answer.body["state"]) == (202, "inspecting")
    again = failing.post("/machines/lab-01/inspect")
    assert (again.status, again.body["state"]) == (202, "inspecting")
    failing.run(lambda: failing.get("/machines/lab-01").body["state"] == "available")


def test_a_machine_in_use_is_not_inspected(pool):
    pool.until("ready")
    detail = problem(pool.post("/machines/lab-01/inspect"), 409, "refused")
    assert detail.startswith("lab-01 is occupied: only a machine that is broken")


def test_machines_are_listed_by_name_with_what_they_are_at(pool):
    pool.until("ready")
    items = pool.get("/machines").items
    assert [item["name"] for item in items] == ["lab-01", "lab-02", "lab-03"]
    assert [item["state"] for item in items] == ["occupied", "available", "available"]
    assert items[0]["at"] == "node 1 is ready"


def test_a_machine_shows_facts_steps_and_lives(pool):
    pool.until("ready")
    body = pool.get("/machines/lab-01").body
    assert body["facts"]["fact.cpus"] == "4"
    assert [item["phase"] for item in body["timeline"]] == ["write", "configure", "start", "login"]
    assert [(life["id"], life["state"]) for life in body["lives"]] == [("1", "ready")]


def test_a_machine_that_nobody_accepted_says_so(pool):
    pool.settle()
    machine = pool.store.read(lambda tx: tx.select(Machine))[0]
    pool.store.write(lambda tx: tx.put(replace(machine, state=MachineState.INSPECTED, accepted=False)))
    assert "waits to be accepted (nodepool machine-accept lab-01, or" in pool.get("/machines/lab-01").body["at"]


def test_a_node_in_use_is_released_and_a_second_time_changes_nothing(pool):
    pool.until("ready")
    pool.request("small")
    pool.run(lambda: pool.get("/nodes/1").body["state"] == "in-use")
    answer = pool.post("/nodes/1/release")
    assert (answer.status, answer.body["state"]) == (202, "used")
    again = pool.post("/nodes/1/release")
    assert (again.status, again.headers["etag"]) == (202, answer.headers["etag"])


def test_a_node_that_nobody_uses_is_not_released(pool):
    pool.until("ready")
    assert problem(pool.post("/nodes/1/release"), 409, "refused").startswith("node 1 is ready: only a node in use")


def test_a_node_is_deleted_in_any_state(pool):
    pool.run(lambda: bool(pool.nodes()))
    answer = pool.delete("/nodes/1")
    assert (answer.status, answer.body["state"]) == (202, str(NodeState.DELETING))


def test_events_name_the_user_at_the_socket(pool):
    pool.until("ready")
    pool.delete("/nodes/1")
    events = pool.get("/events?subject=node:1").items
    assert (events[0]["type"], events[0]["actor"]) == ("delete", getpass.getuser())
    assert (events[0]["from"], events[0]["to"]) == ("ready", "deleting")
    assert events[-1]["type"] == "create"


def test_events_come_newest_first_in_pages(pool):
    pool.until("ready")
    first = pool.get("/events?limit=3")
    second = pool.get(f"/events?limit=3&cursor={first.body['next']}")
    ids = [int(event["id"]) for event in first.items + second.items]
    assert ids == sorted(ids, reverse=True)
    assert len(set(ids)) == 6


def test_images_show_where_a_build_is_published(pool):
    pool.until("ready")
    (copy,) = pool.get("/images").items
    assert (copy["image"], copy["provider"], copy["state"], copy["build_state"]) == ("debian", "lab", "ready", "ready")
    (build,) = pool.get("/builds").items
    assert (build["id"], build["formats"]) == (copy["build_id"], ["raw"])
    assert pool.get(f"/builds/{build['id']}").body["sha256"] == build["sha256"]


def test_a_build_that_is_asked_for_is_listed_before_it_is_published(pool):
    pool.until("ready")
    answer = pool.post("/images/debian/builds")
    assert (answer.status, answer.body["state"]) == (202, "requested")
    assert answer.headers["location"] == f"/api/v1/builds/{answer.body['id']}"
    pending = [item for item in pool.get("/images").items if item["id"] is None]
    assert [(item["build_id"], item["state"]) for item in pending] == [(answer.body["id"], "requested")]
    assert "is being built already" in problem(pool.post("/images/debian/builds"), 409, "refused")


def test_a_build_is_deleted(pool):
    pool.until("ready")
    (build,) = pool.get("/builds").items
    answer = pool.delete(f"/builds/{build['id']}")
    assert (answer.status, answer.body["state"]) == (202, "deleting")


def test_a_failed_build_says_why(pool):
    pool.broken_images.add("debian")
    pool.settle()
    (build,) = pool.get("/builds").items
    assert build["state"] == "failed"
    assert (build["trouble"]["reason"], build["trouble"]["fault"]) == ("debootstrap: no such suite", "image")


def test_labels_count_what_is_wanted_and_what_there_is(pool):
    pool.until("ready")
    (label,) = pool.get("/labels").items
    assert (label["label"], label["wanted"], label["free"], label["have"]) == ("small", 1, 1, {"ready": 1})


def test_explain_says_that_nothing_is_missing(pool):
    pool.until("ready")
    body = pool.get("/labels/small/explain").body
    assert body["summary"] == "small: 1 of 1 wanted are ready; nothing is missing"
    assert body["pools"][0]["machines"] == {"available": 2, "occupied": 1}


def test_explain_follows_a_node_that_is_built(pool):
    pool.run(lambda: bool(pool.nodes()))
    body = pool.get("/labels/small/explain").body
    assert [node["machine"] for node in body["building"]] == ["lab-01"]
    assert body["summary"] == "small: 0 of 1 wanted are ready, 1 being built"


def test_explain_tells_of_an_image_that_cannot_be_built_and_of_the_next_try(pool):
    pool.broken_images.add("debian")
    pool.run(lambda: pool.get("/machines/lab-01").body["state"] == "available")
    body = pool.get("/labels/small/explain").body
    (image,) = body["images"]
    assert image["ready"] is None
    assert image["trouble"]["reason"] == "debootstrap: no such suite"
    assert "the next try is " in image["trouble"]["next"]
    assert "image debian is not built yet" in body["reasons"]


def test_explain_tells_who_waits_and_that_machines_are_used_up(pool):
    pool.until("ready")
    for _ in range(4):
        pool.request("small")
    pool.until("in-use", "in-use", "in-use")
    body = pool.get("/labels/small/explain").body
    assert [request["id"] for request in body["requests"]] == ["4"]
    assert any("has all of its 3 servers in use" in reason for reason in body["reasons"])
    assert "has all of its 3 servers in use" in body["summary"]


def test_status_has_what_the_daemon_says_and_counts(pool):
    pool.until("ready")
    body = pool.get("/status").body
    assert (body["version"], body["nodes"], body["builds"]) == ("0", {"ready": 1}, {"ready": 1})
    assert body["machines"] == {"available": 2, "occupied": 1}


def test_status_lists_machines_that_nobody_declared(pool):
    pool.desk.expected_boot("52:54:00:99:99:99")
    assert [item["mac"] for item in pool.get("/status").body["unknown_machines"]] == ["52:54:00:99:99:99"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nodes/9"),
        ("POST", "/nodes/9/release"),
        ("DELETE", "/nodes/9"),
        ("GET", "/machines/nobody"),
        ("POST", "/machines/nobody/inspect"),
        ("POST", "/images/nothing/builds"),
        ("GET", "/builds/0123"),
        ("DELETE", "/builds/0123"),
        ("GET", "/requests/9"),
        ("DELETE", "/requests/9"),
        ("POST", "/requests/9/release"),
        ("GET", "/labels/none/explain"),
    ],
)
def test_what_is_not_there_is_not_found(idle, method, path):
    assert problem(idle.ask(method, path), 404, "not-found").startswith("there is no ")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/nodes/abc", "path.node_id"),
        ("/nodes/0", "path.node_id"),
        ("/nodes/99999999999999999999", "path.node_id"),
        ("/nodes?state=foo", "'building', 'ready'"),
        ("/nodes?limit=0", "query.limit"),
        ("/events?subject=12", "query.subject"),
    ],
)
def test_what_makes_no_sense_is_told_where(idle, path, said):
    assert said in problem(idle.get(path), 422, "invalid")


def test_an_unknown_path_and_a_wrong_method_are_problems_too(idle):
    assert "openapi.json" in problem(idle.get("/nothing"), 404, "not-found")
    assert "there is no DELETE /api/v1/nodes" in problem(idle.delete("/nodes"), 405, "method-not-allowed")


def test_a_transition_that_the_lifecycle_does_not_have_is_refused(pool):
    pool.broken_images.add("debian")
    pool.settle()
    (build,) = pool.get("/builds").items
    assert "'delete' cannot happen" in problem(pool.delete(f"/builds/{build['id']}"), 409, "illegal-transition")


def test_a_database_that_is_gone_is_said_with_when_to_try_again(pool):
    (pool.folder / "nodepool.db").rename(pool.folder / "elsewhere.db")
    answer = pool.get("/nodes")
    assert "was removed or replaced" in problem(answer, 503, "unavailable")
    assert answer.headers["retry-after"] == "5"


def test_a_defect_is_a_problem_without_a_traceback(pool):
    pool.sick = True
    detail = problem(pool.get("/status"), 500, "unexpected")
    assert detail == "unexpected RuntimeError; the daemon's log has more"


def test_the_api_describes_itself(idle):
    paths = idle.get("/openapi.json").body["paths"]
    assert {"/api/v1/nodes", "/api/v1/requests/{request_id}", "/api/v1/labels/{name}/explain"} <= set(paths)

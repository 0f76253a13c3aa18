"""Requests over the API: asked for once, waited for without polling, given back."""

import getpass
import time

import pytest
from api_pool import beside, served
from test_api import problem

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"


@pytest.fixture
def pool(tmp_path):
    with served(tmp_path) as pool:
        yield pool


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """A pool that no test changes."""
    with served(tmp_path_factory.mktemp("idle")) as pool:
        yield pool


def wish(**more):
    return {"nodes": [{"label": "small", "count": 1}], **more}


def test_a_request_is_queued(pool):
    answer = pool.post("/requests", wish())
    assert answer.status == 201
    assert answer.headers["location"] == "/api/v1/requests/1"
    assert (answer.body["state"], answer.body["priority"]) == ("requested", 100)
    assert answer.body["wanted"] == [{"label": "small", "count": 1}]


def test_its_requestor_is_the_user_at_the_socket_unless_named(pool):
    assert pool.post("/requests", wish()).body["requestor"] == getpass.getuser()
    assert pool.post("/requests", wish(requestor="zuul")).body["requestor"] == "zuul"


def test_the_same_token_is_the_same_request(pool):
    first = pool.post("/requests", wish(client_token="once"))
    second = pool.post("/requests", wish(client_token="once"))
    assert (first.status, second.status) == (201, 200)
    assert first.body["id"] == second.body["id"]
    assert len(pool.get("/requests").items) == 1


def test_the_same_token_for_something_else_is_refused(pool):
    pool.post("/requests", wish(client_token="once"))
    other = {"nodes": [{"label": "small", "count": 2}], "client_token": "once"}
    assert "use another token" in problem(pool.post("/requests", other), 409, "refused")


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([{"label": "large"}], "no pool offers the label large (labels: small)"),
        ([{"label": "small", "count": 4}], "4 nodes of small are more than its pools can ever have (3)"),
    ],
)
def test_what_no_pool_could_ever_give_is_refused_at_once(idle, nodes, said):
    assert problem(idle.post("/requests", {"nodes": nodes}), 409, "refused") == said


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "body.nodes"),
        ({"nodes": []}, "body.nodes"),
        ({"nodes": [{"label": "small", "count": 0}]}, "body.nodes.0.count"),
        ({"nodes": [{"label": ""}]}, "body.nodes.0.label"),
        ({"nodes": [{"label": "small", "where": "x"}]}, "body.nodes.0.where"),
        (wish(priority=1000), "body.priority"),
        (wish(client_token="two words"), "body.client_token"),
        (wish(ssh_keys=["ssh-ed25519 AAAA"]), "the ssh-ed25519 key is damaged"),
    ],
)
def test_a_request_that_makes_no_sense_is_told_where(idle, body, said):
    assert said in problem(idle.post("/requests", body), 422, "invalid")


def test_a_body_that_is_no_json_is_malformed(idle):
    assert problem(idle.post("/requests", b"{"), 400, "malformed") == "the body is not JSON"


def test_a_private_key_is_refused_and_never_repeated(idle):
    secret = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQ"
    key = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{secret}\n-----END OPENSSH PRIVATE KEY-----"
    answer = idle.post("/requests", wish(ssh_keys=[key]))
    assert "this is a private key: keep it to yourself" in problem(answer, 422, "invalid")
    assert secret not in str(answer)
    assert idle.get("/requests").items == []


def test_keys_are_put_on_the_nodes_before_they_are_handed_out(pool):
    pool.until("ready")
    number = pool.request("small", ssh_keys=[f"  {KEY}   me@here "])
    pool.run(lambda: pool.get(f"/requests/{number}").body["state"] == "fulfilled")
    assert f"{KEY} me@here" in pool.world.machines["lab-01"].authorized


def test_a_fulfilled_request_has_all_it_takes_to_log_in(pool):
    pool.until("ready")
    number = pool.request("small")
    pool.settle()
    body = pool.get(f"/requests/{number}").body
    (node,) = body["nodes"]
    assert (body["state"], node["state"], node["request_id"]) == ("fulfilled", "in-use", number)
    assert (node["address"], node["username"], node["port"]) == ("198.18.0.1", "root", 22)
    assert node["host_key"].startswith("ssh-ed25519 ")


def test_a_request_that_waits_says_for_what(pool):
    pool.settle()
    number = pool.request("small")
    pool.run(lambda: bool(pool.nodes()))
    waits = pool.get(f"/requests/{number}").body["waiting_for"]
    assert f"request {number} waits for 1 more of small" in waits
    assert any(reason.startswith("node 1 on lab-01: write") for reason in waits)


def test_whoever_waits_is_woken_by_the_commit_that_fulfils(pool):
    pool.until("ready")
    number = pool.request("small")
    looks = pool.looks
    with beside(lambda: pool.get(f"/requests/{number}?wait=60")) as answers:
        pool.wait_for_looks(looks + 1)
        began = time.monotonic()
        pool.settle()
    assert answers[0].body["state"] == "fulfilled"
    assert time.monotonic() - began < 5
    assert pool.looks - looks <= 3  # the database is looked at when there is something to see, and not else


def test_waiting_ends_with_the_time_that_was_given(pool):
    number = pool.request("small")
    began = time.monotonic()
    assert pool.get(f"/requests/{number}?wait=0.3").body["state"] == "requested"
    assert 0.3 <= time.monotonic() - began < 5


def test_nobody_waits_longer_than_a_minute(pool):
    number = pool.request("small")
    assert "query.wait" in problem(pool.get(f"/requests/{number}?wait=61"), 422, "invalid")


def test_a_request_that_waits_is_cancelled(pool):
    number = pool.request("small")
    answer = pool.delete(f"/requests/{number}")
    assert (answer.status, answer.body["state"]) == (200, "cancelled")
    assert pool.get("/requests").items == []
    assert [item["id"] for item in pool.get("/requests?state=cancelled").items] == [number]


def test_a_fulfilled_request_is_given_back_with_all_of_its_nodes(pool):
    pool.until("ready")
    number = pool.request("small")
    pool.settle()
    answer = pool.post(f"/requests/{number}/release")
    assert (answer.status, answer.body["state"]) == (200, "released")
    assert [node["state"] for node in answer.body["nodes"]] == ["used"]
    assert pool.post(f"/requests/{number}/release").status == 200


def test_requests_are_listed_with_their_nodes_and_what_they_wait_for(pool):
    pool.until("ready")
    pool.request("small")
    pool.settle()
    pool.request("small", "small", priority=50)
    pool.settle()
    first, second = pool.get("/requests").items
    assert (first["state"], [node["id"] for node in first["nodes"]]) == ("fulfilled", ["1"])
    assert (second["state"], second["priority"], second["nodes"]) == ("requested", 50, [])
    assert second["waiting_for"]

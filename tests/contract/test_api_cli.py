"""`nodepool`, the command line, against a daemon's socket: what it prints, and its exit status."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from api_pool import beside, served

from nodepool.cmd import cli_actions
from nodepool.cmd.cli import main
from nodepool.model import Node
from nodepool.service.nodes import release

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"
HEAVY = ("sqlalchemy", "fastapi", "pydantic", "uvicorn", "yaml", "pyghmi", "asyncssh", "aiohttp", "kazoo", "alembic")
HEAVY += ("csv", "asyncio", "subprocess")  # of the standard library, and not for every command


@pytest.fixture
def pool(tmp_path, monkeypatch):
    with served(tmp_path) as pool:
        monkeypatch.setenv("NODEPOOL_URL", str(pool.path))
        yield pool


@pytest.fixture
def failing(tmp_path, monkeypatch):
    with served(tmp_path, failures="{lab-01: write}") as pool:
        monkeypatch.setenv("NODEPOOL_URL", f"unix://{pool.path}")
        yield pool


@pytest.fixture
def said(capsys):
    """Run a command: `said("list")` gives its status, output and errors."""

    def run(*words):
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def cells(output, row=0):
    """The cells of a row of the first table in an output: header, then rows."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [cell.strip() for cell in lines[row].strip("|").split("|")]


def test_list_has_upstreams_columns_and_what_each_node_is_at(pool, said):
    pool.run(lambda: bool(pool.nodes()))
    status, out, err = said("list")
    assert (status, err) == (0, "")
    head = ["ID", "Provider", "Label", "Server ID", "Public IPv4", "IPv6", "State", "Age", "Locked", "Doing"]
    assert cells(out) == head
    node = ["1", "lab", "small", "lab-01", "198.18.0.1", "", "building", "00:00:00:00", "locked"]
    assert cells(out, 1)[:-1] == node
    assert cells(out, 1)[-1].startswith("write")


def test_list_detail_has_upstreams_further_columns(pool, said):
    pool.until("ready")
    _, out, _ = said("list", "--detail")
    further = "Pool,Hostname,Private IPv4,AZ,Username,Port,Launcher,Allocated To,Hold Job,Comment,User Data,Driver Data"
    assert cells(out)[9:-3] == further.split(",")
    assert cells(out, 1)[9:11] == ["main", "lab-01"]


def test_lists_are_json_too(pool, said):
    pool.until("ready")
    for command in ("list", "machine-list", "image-list", "dib-image-list", "request-list"):
        status, out, _ = said(command, "--format", "json")
        assert (status, type(json.loads(out))) == (0, list)


def test_nodes_are_filtered(pool, said):
    pool.until("ready")
    assert len(json.loads(said("--format", "json", "list", "--state", "ready")[1])) == 1
    assert json.loads(said("list", "--label", "large", "--format=json")[1]) == []
    status, _, err = said("list", "--state", "tired")
    assert (status, "'building', 'ready'" in err) == (2, True)


def test_machine_list_tells_why_a_machine_is_broken(failing, said):
    failing.run(lambda: failing.get("/machines/lab-01").body["state"] == "broken")
    _, out, _ = said("machine-list")
    assert cells(out) == ["Name", "Provider", "Pool", "Rack", "State", "Power", "Node", "Strikes", "Age", "Doing"]
    assert cells(out, 1)[-1] == "write: disk vda: input/output error at byte 4194304"


def test_image_lists_have_upstreams_columns(pool, said):
    pool.until("ready")
    _, out, _ = said("image-list")
    assert cells(out)[:8] == (
        ["Build ID", "Upload ID", "Provider", "Image", "Provider Image Name", "Provider Image ID", "State", "Age"]
    )
    build = cells(out, 1)[0]
    _, out, _ = said("dib-image-list")
    assert cells(out)[:6] == ["ID", "Image", "Builder", "Formats", "State", "Age"]
    assert cells(out, 1)[:5] == [f"debian-{build}", "debian", "builder", "raw", "ready"]


def test_an_image_is_built_and_its_build_deleted_by_the_id_that_was_shown(pool, said):
    pool.until("ready")
    first = cells(said("dib-image-list")[1], 1)[0]
    status, out, _ = said("image-build", "debian")
    assert (status, "is requested" in out) == (0, True)
    assert said("image-build", "debian")[0] == 5
    assert said("dib-image-delete", first)[:2] == (0, f"{first} is deleting\n")


def test_show_tells_what_failed_whose_fault_it_is_and_what_happens_next(failing, said):
    failing.run(lambda: failing.nodes() and failing.nodes()[0].work.attempt == 2)
    status, out, _ = said("show", 1)
    assert status == 0
    assert "write: disk vda: input/output error at byte 4194304 [disk-write, fault of the machine]" in out
    assert "attempt 2 of 3 goes on in " in out
    assert cells(out) == ["State", "Phase", "Attempt", "Started", "Seconds", "Result"]


def test_show_takes_the_name_of_a_machine(failing, said):
    failing.run(lambda: failing.get("/machines/lab-01").body["state"] == "broken")
    status, out, _ = said("show", "lab-01")
    assert (status, out.splitlines()[0]) == (0, "machine lab-01: broken for 00:00:00:00")
    assert "at once with: nodepool machine-inspect lab-01" in out
    assert said("machine-inspect", "lab-01")[:2] == (0, "machine lab-01 is inspecting\n")


def test_show_of_a_ready_node_says_how_to_log_in(pool, said):
    pool.until("ready")
    assert "ssh root@198.18.0.1, or: nodepool ssh 1" in said("show", 1)[1]


def test_explain_says_it_in_one_sentence_first(pool, said):
    pool.until("ready")
    status, out, _ = said("explain", "small")
    assert (status, out.splitlines()[0]) == (0, "small: 1 of 1 wanted are ready; nothing is missing")


def test_status_is_readable(pool, said):
    pool.until("ready")
    status, out, _ = said("status")
    assert status == 0
    assert "nodes:\n  ready: 1\n" in out


def test_a_request_is_queued_and_listed(pool, said):
    pool.settle()
    status, out, _ = said("request", "small=2", "--requestor", "ci", "--priority", "50")
    assert (status, out) == (0, "request 1 is queued; nodepool request-show 1 follows it\n")
    _, out, _ = said("request-list")
    head = "Request ID,Priority,State,Requestor,Node Types,Nodes,Declined By,Event ID,Age,Waiting For"
    assert cells(out) == head.split(",")
    assert cells(out, 1)[:5] == ["1", "50", "requested", "ci", "small=2"]
    assert said("request-show", 1)[1].startswith("request 1: requested for ")


def test_waiting_tells_what_for_and_prints_how_to_log_in(pool, said, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_actions, "LOOK_EVERY", 0.2)
    (tmp_path / "key.pub").write_text(f"# mine\n{KEY} me@here\n")
    pool.settle()

    def let_time_pass():
        pool.wait_for_looks(3)  # twice for the first look at the progress; with the third it was told
        pool.run(lambda: pool.get("/requests/1").body["state"] == "fulfilled")

    with beside(let_time_pass):
        status, out, err = said("request", "small", "--wait", "--ssh-key", tmp_path / "key.pub")
    assert status == 0
    assert err.startswith("request 1 is queued\nrequest 1: ")
    assert out.splitlines()[0] == "request 1 is fulfilled"
    assert cells(out) == ["Node", "Label", "Machine", "Address", "Port", "User", "State", "Host Key"]
    assert cells(out, 1)[:7] == ["1", "small", "lab-01", "198.18.0.1", "22", "root", "in-use"]
    assert KEY in next(iter(pool.world.machines["lab-01"].authorized - {"ssh-ed25519 AAAAnodepool nodepool"}))


def test_waiting_ends_with_its_time_and_says_how_to_cancel(pool, said):
    status, _, err = said("request", "small", "--wait", "0.2")
    assert status == 1
    assert "not fulfilled within 0.2 s: request 1 stays queued." in err
    assert "nodepool release --request 1 cancels it" in err


def test_an_interrupt_while_waiting_says_how_to_cancel(pool, said, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_actions, "_wait", interrupt)
    status, _, err = said("request", "small", "--wait")
    assert (status, "nodepool release --request 1 cancels it" in err) == (1, True)
    assert pool.get("/requests/1").body["state"] == "requested"


def test_a_request_that_ends_without_nodes_is_a_failure(pool, said):
    pool.settle()

    def cancel():
        pool.wait_for_looks(1)
        pool.delete("/requests/1")

    with beside(cancel):
        status, _, err = said("request", "small", "--wait")
    assert (status, err.splitlines()[-1]) == (1, "nodepool: request 1 is cancelled")


def test_a_private_key_never_leaves_the_command(pool, said, tmp_path):
    (tmp_path / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nSECRET\n")
    status, _, err = said("request", "small", "--ssh-key", tmp_path / "id")
    assert (status, "this is a private key" in err, "SECRET" in err) == (2, True, False)
    assert pool.get("/requests").items == []


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"hello"])
def test_a_file_without_a_key_is_said(pool, said, tmp_path, content):
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    status, _, err = said("request", "small", "--ssh-key", tmp_path / "key")
    assert (status, err.startswith(f"nodepool: {tmp_path}/key: ")) == (2, True)


def test_nodes_are_released_each_on_its_own(pool, said):
    pool.until("ready")
    pool.request("small")
    pool.settle()
    status, out, err = said("release", 77, 1)
    assert (status, out) == (4, "node 1 is used\n")
    assert err == "nodepool: there is no node 77; nodepool list shows what there is\n"


def test_a_request_is_released_whole(pool, said):
    pool.until("ready")
    pool.request("small")
    pool.settle()
    assert said("release", "--request", 1)[:2] == (0, "request 1 is released\n")


def test_a_node_is_deleted(pool, said):
    pool.until("ready")
    assert said("delete", 1)[:2] == (0, "node 1 is deleting\n")


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["show", "99"], 4, "there is no node or machine 99; nodepool list shows the nodes"),
        (["show", "nobody"], 4, "there is no machine nobody"),
        (["request-show", "9"], 4, "there is no request 9; nodepool request-list shows"),
        (["explain", "none"], 4, "there is no label none (labels: small)"),
        (["image-build", "none"], 4, "there is no diskimage none (diskimages: debian)"),
        (["dib-image-delete", "debian-0"], 4, "there is no build 0; nodepool dib-image-list"),
        (["machine-inspect", "nobody"], 4, "there is no machine nobody"),
        (["request", "none"], 5, "no pool offers the label none (labels: small)"),
        (["request", "small=9"], 5, "9 nodes of small are more than its pools can ever have"),
        (["release"], 2, "give the ids of the nodes"),
        (["release", "1", "--request", "1"], 2, "give node ids or --request, not both"),
        (["show", "no/../such?x"], 4, "there is no machine no/../such?x"),
    ],
)
def test_each_error_is_one_sentence_with_its_status(pool, said, words, status, sentence):
    found, out, err = said(*words)
    assert (found, out) == (status, "")
    assert err.startswith(f"nodepool: {sentence}")
    assert err.count("\n") == 1


def test_a_release_of_what_nobody_uses_is_refused(pool, said):
    pool.until("ready")
    status, _, err = said("release", 1)
    assert (status, err.startswith("nodepool: node 1 is ready: only a node in use")) == (5, True)


def test_what_machines_say_cannot_move_the_cursor(pool, said):
    pool.until("ready")
    pool.request("small")
    pool.settle()
    pool.store.write(lambda tx: release(tx, 1, "x"))
    pool.store.write(lambda tx: tx.put(replace(tx.get(Node, 1), comment="\x1b[2Jgone\nby")))
    _, out, _ = said("list", "--detail")
    assert "\x1b" not in out
    assert " [2Jgone by " in out


def test_the_installed_command_imports_none_of_the_daemons_libraries(pool):
    pool.until("ready")
    script = (
        "import sys; from nodepool.cmd.cli import main; status = main(sys.argv[1:]);"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    for words in (["list"], ["show", "1"], ["explain", "small"], ["status"], ["request", "small"]):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.strip()) == (0, "[]"), words

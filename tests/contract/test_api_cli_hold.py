"""`nodepool hold` and `machine-accept`, against a daemon's socket."""

import getpass
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from api_pool import served

from nodepool.clock import micros, rfc3339
from nodepool.cmd.cli import main
from nodepool.model import Machine, MachineState

ME = getpass.getuser()


@pytest.fixture
def pool(tmp_path, monkeypatch):
    with served(tmp_path) as pool:
        monkeypatch.setenv("NODEPOOL_URL", str(pool.path))
        pool.until("ready")
        yield pool


@pytest.fixture
def used(pool):
    pool.request("small")
    pool.settle()
    return pool


@pytest.fixture
def unaccepted(pool):
    machine = pool.store.read(lambda tx: tx.select(Machine))[1]
    pool.store.write(lambda tx: tx.put(replace(machine, state=MachineState.INSPECTED, accepted=False)))
    return pool


@pytest.fixture
def said(capsys):
    def run(*words):
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_node_is_held_and_let_go(used, said):
    assert said("hold", 1, "--reason", "odd disk")[:2] == (0, f"node 1 is hold (held by {ME}: odd disk)\n")
    assert said("hold", "--off", 1)[:2] == (0, "node 1 is in-use\n")


def test_show_list_and_explain_tell_who_holds_a_node_until_when_and_why(used, said):
    until = rfc3339(used.clock.now() + micros(5400))
    said("hold", 1, "--reason", "odd disk", "--until", "90m")
    assert f"now       held by {ME} until {until}: odd disk" in said("show", 1)[1]
    detail = said("list", "--detail")[1]
    assert all(word in detail for word in ("odd disk", f"| {ME} ", until))
    assert f"on lab-01, by {ME} since " in said("explain", "small")[1]


def test_a_released_node_that_is_held_says_that_it_stays(used, said):
    said("hold", 1, "--reason", "odd disk")
    assert said("release", 1)[:2] == (0, f"node 1 is hold (held by {ME}: odd disk)\n")


def test_the_history_of_a_node_names_who_did_what(used, said):
    said("hold", 1, "--reason", "odd disk")
    line = next(line for line in said("show", 1)[1].splitlines() if "in-use -> hold" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][3:] == [ME, "odd disk"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hold", "1"], "say what it is held for: --reason TEXT"),
        (["hold", "--off", "1", "--reason", "x"], "--off ends a hold: it goes without --reason"),
        (["hold", "1", "--reason", "x", "--until", "soon"], "'soon' is no duration (90m, 2h, 3d) and no time"),
        (["hold"], "the following arguments are required: NODE"),
    ],
)
def test_words_that_make_no_hold_are_said(pool, said, words, sentence):
    status, _, err = said(*words)
    assert (status, sentence in err) == (2, True), err


def test_a_hold_until_a_time_that_is_over_is_refused(used, said):
    status, _, err = said("hold", 1, "--reason", "x", "--until", "2001-01-01")
    assert (status, "is over already" in err) == (5, True)


def test_a_machine_shows_what_is_wiped_before_it_is_accepted(unaccepted, said):
    status, out, err = said("machine-accept", "lab-02", "--yes")
    assert (status, out) == (0, f"machine lab-02 is accepted by {ME}\n")
    assert "disks that are wiped:" in err
    assert "| vda " in err
    assert f"accepted    by {ME} at " in said("show", "lab-02")[1]


def test_without_a_terminal_nothing_is_accepted_unasked(unaccepted, said, monkeypatch):
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        status, _, err = said("machine-accept", "lab-02")
    assert (status, "there is no terminal to ask at: say --yes" in err) == (2, True)
    assert not unaccepted.get("/machines/lab-02").body["accepted"]


@pytest.mark.parametrize(("typed", "status", "accepted"), [("y\n", 0, True), ("\n", 1, False), ("no\n", 1, False)])
def test_on_a_terminal_it_asks(unaccepted, typed, status, accepted):
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    script = "import sys; from nodepool.cmd.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "machine-accept", "lab-02"],
        stdin=theirs,
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    assert (done.returncode, "Wipe all disks of lab-02 now, and after each use? [y/N]" in done.stderr) == (status, True)
    assert unaccepted.get("/machines/lab-02").body["accepted"] is accepted


def test_what_is_accepted_says_by_whom(unaccepted, said):
    assert said("machine-accept", "lab-01")[1] == "machine lab-01 is accepted (accept: true in the YAML) already\n"
    said("machine-accept", "lab-02", "--yes")
    assert said("machine-accept", "lab-02")[1] == f"machine lab-02 is accepted by {ME} already\n"


def test_a_machine_that_nobody_has_seen_is_not_accepted(unaccepted, said):
    machine = unaccepted.store.read(lambda tx: tx.select(Machine))[1]
    unaccepted.store.write(lambda tx: tx.put(replace(machine, facts={})))
    status, _, err = said("machine-accept", "lab-02", "--yes")
    assert (status, "nodepool has not seen it yet" in err) == (5, True)

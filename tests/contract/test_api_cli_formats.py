"""What the command line prints for programs, and how it redraws and colours for people at a terminal."""

import contextlib
import csv
import io
import json
import os
import pty
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from api_pool import served

from nodepool.cmd import cli_watch
from nodepool.cmd.cli import main
from nodepool.model import Node

LISTS = ("list", "machine-list", "image-list", "dib-image-list", "request-list")
ITEMS = (["show", "1"], ["show", "lab-01"], ["explain", "small"], ["status"], ["request-show", "1"])
NODEPOOL = [sys.executable, "-c", "import sys; from nodepool.cmd.cli import main; sys.exit(main(sys.argv[1:]))"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A pool with a node in use and one that is ready, which no test changes."""
    with served(tmp_path_factory.mktemp("formats"), min_ready=1) as pool:
        pool.until("ready")
        pool.request("small")
        pool.until("in-use", "ready")
        yield pool


@pytest.fixture(autouse=True)
def there(pool, monkeypatch):
    monkeypatch.setenv("NODEPOOL_URL", str(pool.path))
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def said(capsys):
    def run(*words):
        status = main([str(word) for word in words])
        return status, capsys.readouterr().out

    return run


@pytest.mark.parametrize("words", [*([name] for name in LISTS), *ITEMS], ids=" ".join)
def test_yaml_says_what_json_says(said, words):
    as_json = json.loads(said(*words, "--format", "json")[1])
    status, out = said(*words, "--format", "yaml")
    assert (status, yaml.safe_load(out)) == (0, as_json)


@pytest.mark.parametrize("name", LISTS)
def test_csv_has_a_row_for_each_item_with_the_fields_of_json(said, name):
    items = json.loads(said(name, "--format", "json")[1])
    status, out = said(name, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (status, len(rows)) == (0, len(items))
    for row, item in zip(rows, items, strict=True):
        assert list(row) == list(item)
        assert row["id"] == (item["id"] or "")


def test_csv_keeps_what_has_parts_as_json(said):
    [row] = csv.DictReader(io.StringIO(said("show", "1", "--format", "csv")[1]))
    assert json.loads(row["timeline"])[0]["phase"] == "write"
    assert row["locked"] == "true"


def test_no_items_are_no_csv(said):
    assert said("list", "--label", "none", "--format", "csv") == (0, "")


def test_what_acts_on_many_nodes_speaks_every_format(said):
    for form, parse in (("yaml", yaml.safe_load), ("json", json.loads)):
        status, out = said("release", "2", "77", "--format", form)
        assert (status, parse(out)) == (5, [])


def test_csv_of_what_machines_say_cannot_move_the_cursor(pool, said):
    with_escape = replace(pool.store.read(lambda tx: tx.get(Node, 2)), comment="\x1b[2Jgone")
    pool.store.write(lambda tx: tx.put(with_escape))
    assert "\x1b" not in said("list", "--detail", "--format", "csv")[1]


def on_a_terminal(words, environment=(), until=b"", interrupt=False):
    """What a command writes to a terminal, and its exit status; with `until`, Ctrl-C once that was written."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"} | dict(environment)
    process = subprocess.Popen(
        [*NODEPOOL, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while chunk := os.read(ours, 65536):
            written += chunk
            if until and written.count(until) >= 2:
                process.send_signal(signal.SIGINT)
                until = b""
    os.close(ours)
    return process.wait(20), written.decode()


def test_states_are_coloured_on_a_terminal_and_nothing_else():
    status, out = on_a_terminal(["list"])
    assert (status, out.count("\x1b[")) == (0, 4)
    assert "| \x1b[32mready\x1b[0m  |" in out
    assert "| \x1b[36min-use\x1b[0m |" in out


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_where_they_are_not_wanted(environment):
    assert "\x1b" not in on_a_terminal(["list"], environment)[1]


def test_no_colours_but_on_a_terminal(said):
    assert "\x1b" not in said("list")[1]


def test_a_watched_list_is_drawn_over_the_last_one_until_ctrl_c():
    status, out = on_a_terminal(["list", "--watch", "0.1"], until=b"every 0.1 s; Ctrl-C ends")
    assert status == 0
    assert out.startswith("\x1b[2J")
    assert out.count("\x1b[2J") == 1
    assert out.count("\x1b[H") >= 2
    assert out.endswith("\x1b[?7h\r\n")
    assert "interrupted" not in out


def interrupted_after(monkeypatch, looks):
    """Let `--watch` sleep so often, at no cost of time, before somebody presses Ctrl-C."""
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == looks:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_watch.time, "sleep", sleep)
    return slept


def test_without_a_terminal_the_looks_follow_one_another(said, monkeypatch):
    slept = interrupted_after(monkeypatch, 2)
    status, out = said("show", "1", "--watch")
    assert (status, slept) == (0, [2.0, 2.0])
    assert out.count("node 1: in-use for") == 2
    assert "\x1b" not in out


def test_watched_yaml_is_a_stream_of_documents(said, monkeypatch):
    interrupted_after(monkeypatch, 3)
    documents = list(yaml.safe_load_all(said("list", "--format", "yaml", "--watch", "5")[1]))
    assert len(documents) == 3
    assert documents[0] == documents[2]


def test_a_daemon_that_goes_away_while_it_is_watched_is_said_and_waited_for(tmp_path, said, monkeypatch):
    with served(tmp_path) as other:
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            if len(slept) == 1:
                other.server.stop()
            elif len(slept) == 2:
                other.server.start()
            else:
                raise KeyboardInterrupt

        monkeypatch.setattr(cli_watch.time, "sleep", sleep)
        status, out = said("--url", other.path, "list", "--watch")
    looks = out.split("\n\n")
    assert (status, len(looks)) == (0, 3)
    assert looks[1].startswith("nodepool: no nodepoold answers")
    assert looks[0] == looks[2].rstrip("\n")


def test_what_was_never_there_is_not_watched(capsys):
    assert main(["show", "99", "--watch"]) == 4
    assert "there is no node or machine 99" in capsys.readouterr().err


def test_a_screen_has_no_more_lines_than_the_terminal(monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((80, 10)))
    with Path(os.devnull).open("w") as nothing:
        monkeypatch.setattr(sys, "stdout", nothing)
        drawn = cli_watch._screen("\n".join(f"line {number}" for number in range(100)), 2.0)
    assert drawn.count("\n") == 8
    assert "... 94 more lines; this terminal has 10" in drawn

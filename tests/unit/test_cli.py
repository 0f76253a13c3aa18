"""The command line without a daemon: its words, its tables, where it looks for the socket."""

import re
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from time import tzset

import pytest

from nodepool.api.keys import public_key, public_keys
from nodepool.cmd import cli
from nodepool.cmd.cli import COMMANDS, LOCAL, main
from nodepool.cmd.client import Client, CommandError, sockets
from nodepool.cmd.tables import pairs, table

BLOB = "AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"


def test_a_table_has_upstreams_borders():
    assert table(["ID", "State"], [["1", "ready"], [None, "in-use"]]).splitlines() == [
        "+----+--------+",
        "| ID | State  |",
        "+----+--------+",
        "| 1  | ready  |",
        "|    | in-use |",
        "+----+--------+",
    ]


def test_an_empty_table_is_its_header():
    assert table(["ID"], []).splitlines() == ["+----+", "| ID |", "+----+"]


def test_pairs_leave_out_what_is_not_known():
    assert pairs([("name", "x"), ("comment", ""), ("long name", 3)]) == "  name       x\n  long name  3"


def test_no_command_prints_the_help_and_fails(capsys):
    assert main([]) == 1
    assert "nodepool request small --wait" in capsys.readouterr().out


def test_an_unknown_command_is_a_usage_error(capsys):
    assert main(["lst"]) == 2
    assert "invalid choice: 'lst'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*COMMANDS, *LOCAL])
def test_each_command_teaches_by_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"  nodepool {command}" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("30m", 1800), ("2d", 172800)])
def test_a_hold_takes_the_durations_of_the_yaml(text, seconds):
    assert cli._until(text) == {"seconds": seconds}


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-11-20T18:00Z", "2026-11-20T18:00:00+00:00"),
        ("2026-11-20T18:00:30+01:00", "2026-11-20T17:00:30+00:00"),
        ("2026-11-20T18:00", "2026-11-20T23:00:00+00:00"),
        ("2026-11-20", "2026-11-20T05:00:00+00:00"),
    ],
)
def test_a_hold_takes_times_of_any_zone_and_of_this_machines_when_none_is_said(text, time, monkeypatch):
    monkeypatch.setenv("TZ", "EST5")
    tzset()
    try:
        until = datetime.fromisoformat(cli._until(text)["until"])
    finally:
        monkeypatch.undo()
        tzset()
    assert until.astimezone(UTC).isoformat() == time


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nodepool ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["request", "small=0"], "'small=0' is no LABEL or LABEL=N"),
        (["request", "small=x"], "'small=x' is no LABEL or LABEL=N"),
        (["request", "=3"], "'=3' is no LABEL or LABEL=N"),
        (["request", "--wait", "small"], "'small' is no number of seconds (labels go before --wait)"),
        (["request", "small", "--wait", "-1"], "--wait"),
        (["request", "small", "--wait", "nan"], "'nan' is no number of seconds"),
        (["list", "--format", "xml"], "invalid choice: 'xml'"),
        (["show", "--watch", "r1n1"], "'r1n1' is no number of seconds from 0.1 on (names go before --watch)"),
        (["list", "--watch", "0"], "'0' is no number of seconds from 0.1 on"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        (["--url", "http://localhost:8080", "list"], "is no Unix socket: give a path or unix:///path"),
    ],
)
def test_words_that_make_no_command_are_said_with_status_2(words, sentence, capsys):
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


def test_without_a_daemon_it_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODEPOOL_URL", raising=False)
    assert main(["list"]) == 1
    err = capsys.readouterr().err
    assert "./var/nodepool.sock does not exist" in err
    assert "start it (nodepoold -d -c FILE), or set --url" in err


def test_a_socket_that_nobody_listens_on_is_said(tmp_path, capsys):
    path = tmp_path / "np.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert main(["--url", str(path), "list"]) == 1
    assert f"{path} was left by one that is gone" in capsys.readouterr().err


def test_a_path_that_is_too_long_is_said(tmp_path, capsys):
    assert main(["--url", str(tmp_path / ("x" * 120)), "list"]) == 1
    assert "longer than the 107 bytes" in capsys.readouterr().err


def test_a_daemon_that_goes_away_is_said(tmp_path):
    path = tmp_path / "np.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client = Client(str(path))
        connection = client._connect()
        taken, _ = listener.accept()
        taken.close()
        client._connect = lambda: connection
        with pytest.raises(CommandError, match="nodepoold went away while it was asked"):
            client.get("/nodes")


@pytest.mark.parametrize(
    ("url", "variable", "paths"),
    [
        ("/a/b", "/c/d", ["/a/b"]),
        ("unix:///a/b", "", ["/a/b"]),
        (None, "/c/d", ["/c/d"]),
        (None, "", ["./var/nodepool.sock", "/run/nodepool/nodepool.sock"]),
    ],
)
def test_the_socket_is_looked_for_in_order(url, variable, paths, monkeypatch):
    monkeypatch.setenv("NODEPOOL_URL", variable)
    assert sockets(url) == paths


def test_local_commands_ask_their_own_module(tmp_path, capsys):
    path = tmp_path / "good.yaml"
    path.write_text("version: 1\n")
    assert main(["config-validate", "-c", str(path)]) == 0
    assert main(["-c", str(path), "config-validate"]) == 0
    assert capsys.readouterr().out.count(" is good: ") == 2


def test_the_reader_of_a_pipe_may_leave(tmp_path):
    command = f"{sys.executable} -m nodepool.cmd.cli --help | true; {sys.executable} -m nodepool.cmd.cli --version"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "Traceback" not in done.stderr


def test_every_command_names_a_function_that_exists():
    for command in COMMANDS.values():
        module, _, function = command.run.partition(":")
        assert callable(getattr(cli.importlib.import_module(f"nodepool.cmd.{module}"), function))


@pytest.mark.parametrize("command", [*COMMANDS, *LOCAL])
def test_the_manual_has_every_command(command):
    manual = (Path(__file__).parents[2] / "doc" / "cli.rst").read_text()
    assert re.search(rf"``{command}[ `]", manual)


@pytest.mark.parametrize("comment", ["", "me@here", "two words"])
def test_a_public_key_is_taken_with_its_comment(comment):
    assert public_key(f"  ssh-ed25519   {BLOB}  {comment}\n") == f"ssh-ed25519 {BLOB} {comment}".strip()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (f"command=reboot ssh-ed25519 {BLOB}", "begins with its type"),
        (f"ssh-dss {BLOB}", "begins with its type"),
        (f"ssh-rsa {BLOB}", "the ssh-rsa key is damaged"),
        (f"ssh-ed25519 {BLOB[:-8]}", "the ssh-ed25519 key is damaged"),
        ("ssh-ed25519 AAAA*", "the ssh-ed25519 key is damaged"),
        (f"ssh-ed25519 {BLOB}\nssh-ed25519 {BLOB}", "one line"),
        (f"ssh-ed25519 {BLOB} \x1b[2J", "control characters"),
        ("ssh-rsa " + "A" * 20000, "at most"),
        ("-----BEGIN RSA PRIVATE KEY-----", "private key"),
        ("PuTTY-User-Key-File-3: ssh-ed25519", "private key"),
    ],
)
def test_what_is_no_public_key_is_said_without_repeating_it(text, said):
    with pytest.raises(ValueError, match=said) as error:
        public_key(text)
    assert BLOB not in str(error.value)


def test_a_file_may_have_many_keys():
    assert public_keys(f"# mine\n\nssh-ed25519 {BLOB} a\nssh-ed25519 {BLOB} b\n") == [
        f"ssh-ed25519 {BLOB} a",
        f"ssh-ed25519 {BLOB} b",
    ]

"""nodepoold as a process, with the quick start's machines of thin air."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mariadb
import pytest

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.e2e


class Home:
    """A folder with the quick start's YAML, and the daemon in it."""

    def __init__(self, folder):
        self.folder = folder
        self.yaml = folder / "tools" / "fake.yaml"
        self.yaml.parent.mkdir()
        for name in ("fake.yaml", "fake-image-create"):
            shutil.copy(ROOT / "tools" / name, folder / "tools")
        self.log = folder / "log"
        self.daemon = None

    def edit(self, old, new):
        text = self.yaml.read_text()
        assert old in text
        self.yaml.write_text(text.replace(old, new))

    def start(self, *more, within=()):
        with self.log.open("ab") as log:
            command = [*within, BIN / "nodepoold", "-d", "-c", "tools/fake.yaml", *more]
            self.daemon = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        self.until(lambda: self.cli("status").returncode == 0)

    def end(self, number=signal.SIGTERM):
        self.daemon.send_signal(number)
        return self.daemon.wait(10)

    def cli(self, *arguments):
        env = {name: value for name, value in os.environ.items() if name != "NODEPOOL_URL"}
        return subprocess.run(
            [BIN / "nodepool", *arguments], cwd=self.folder, capture_output=True, text=True, check=False, env=env
        )

    def items(self, *arguments):
        done = self.cli(*arguments, "--format", "json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found["items"] if isinstance(found, dict) and "items" in found else found

    def ready(self, count):
        return lambda: len([node for node in self.items("list") if node["state"] == "ready"]) >= count

    def until(self, true, seconds=30):
        end = time.monotonic() + seconds
        while not true():
            assert self.daemon.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.1)  # the command line has no way to wait for this


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path)
    yield home
    if home.daemon and home.daemon.poll() is None:
        home.daemon.kill()
        home.daemon.wait()


def test_the_quick_start_is_ready_in_seconds_and_a_second_start_needs_no_cleaning(home):
    home.start()
    home.until(home.ready(3))
    first = {node["id"] for node in home.items("list")}
    assert "fake-debian" in home.cli("image-list").stdout
    began = time.monotonic()
    assert home.end() == 0
    assert time.monotonic() - began < 5
    home.start()
    assert {node["id"] for node in home.items("list") if node["state"] == "ready"} == first


def test_killed_in_the_middle_it_goes_on_after_a_restart(home):
    home.start()
    home.until(lambda: any(node["state"] == "building" for node in home.items("list")))
    home.end(signal.SIGKILL)
    home.start()
    home.until(home.ready(3), seconds=60)
    assert not [node for node in home.items("list") if node["state"] == "failed"]


def test_an_edited_yaml_is_picked_up_and_a_broken_edit_keeps_the_old_one(home):
    home.start()
    home.until(home.ready(3))
    home.edit("min-ready: 2", "min-raedy: 2")
    home.until(lambda: "did you mean" in home.log.read_text())
    assert len(home.items("list")) == 3
    assert "min-raedy" in home.cli("status").stdout
    home.edit("min-raedy: 2", "min-ready: 4")
    home.until(home.ready(5))


def test_a_second_daemon_on_the_same_database_is_refused_with_a_sentence(home):
    home.start()
    second = subprocess.run(
        [BIN / "nodepoold", "-d", "-c", "tools/fake.yaml"],
        cwd=home.folder, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert second.returncode == 1
    assert "another nodepoold already runs" in second.stderr
    assert "Traceback" not in second.stderr


def test_on_mariadb_it_is_ready_outlives_a_kill_and_a_second_daemon_is_refused(home):
    with mariadb.running() as database:
        home.edit("sqlite:///var/fake/nodepool.db", database())
        home.start()
        home.until(lambda: any(node["state"] == "building" for node in home.items("list")))
        home.end(signal.SIGKILL)
        home.start()
        home.until(home.ready(3), seconds=60)
        second = subprocess.run(
            [BIN / "nodepoold", "-d", "-c", "tools/fake.yaml"],
            cwd=home.folder, capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
        assert second.returncode == 1
        assert "another nodepoold already runs" in second.stderr
        done = home.cli("request", "fake-small=2", "--wait", "30", "--format", "json")
        assert done.returncode == 0, done.stderr
        assert home.cli("release", "--request", json.loads(done.stdout)["id"]).returncode == 0
        home.until(home.ready(3))
        assert home.end() == 0


def test_a_mariadb_that_goes_away_is_waited_for(home):
    with mariadb.running() as database:
        home.edit("sqlite:///var/fake/nodepool.db", database())
        home.start()
        home.until(home.ready(3))
        database.stop()
        assert home.cli("request", "fake-small").returncode == 1
        assert home.log.read_text().count("the database does not answer") == 1
        database.start()
        home.until(lambda: home.cli("request", "fake-small", "--wait", "30").returncode == 0, seconds=60)
        assert home.end() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system in a namespace of its own")
def test_a_full_disk_is_told_and_when_there_is_room_again_nothing_is_lost(home):
    small = home.folder / "small"
    small.mkdir()
    home.edit("sqlite:///var/fake/nodepool.db", f"sqlite:///{small}/nodepool.db")
    mount = f'mount -t tmpfs -o size=3m none {small} && exec "$@"'
    home.start(within=["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh"])
    home.until(home.ready(3))
    inside = ["nsenter", "--mount", "--target", str(home.daemon.pid), "sh", "-c"]
    subprocess.run([*inside, f"cat /dev/zero > {small}/filler"], check=False, capture_output=True)
    home.until(lambda: home.cli("request", "fake-small").returncode == 1)
    assert "full" in home.cli("status").stdout
    assert home.log.read_text().count("make room where the database is") == 1
    subprocess.run([*inside, f"rm {small}/filler"], check=True)
    assert home.cli("request", "fake-small=2", "--wait", "30").returncode == 0
    assert home.end() == 0


def test_a_database_restored_from_an_old_copy_is_frozen_until_thawed(home):
    home.start()
    home.until(home.ready(3))
    assert home.end() == 0
    database = home.folder / "var/fake/nodepool.db"
    copy = database.read_bytes()
    home.start()
    assert home.cli("request", "fake-small=2", "--wait", "30").returncode == 0
    marks = list((home.folder / "var/fake/images").glob("database-*.mark"))
    first = marks[0].read_text()
    home.until(lambda: marks[0].read_text() != first or home.cli("delete", "3").returncode)
    assert home.end() == 0
    database.write_bytes(copy)
    home.start()
    assert "frozen: the database is older than it was" in home.cli("status").stdout
    assert home.cli("request", "fake-small", "--wait", "2").returncode == 1
    assert home.cli("thaw").returncode == 0
    assert home.cli("request", "fake-small", "--wait", "30").returncode == 0


def test_a_request_is_filled_released_and_the_pool_full_again(home):
    home.start()
    done = home.cli("request", "fake-small=2", "--wait", "30", "--format", "json")
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)
    assert [node["label"] for node in request["nodes"]] == ["fake-small"] * 2
    assert home.cli("release", "--request", request["id"]).returncode == 0
    home.until(home.ready(3))


def test_the_logging_configuration_and_the_ssh_key_of_the_environment_are_honoured(home, monkeypatch):
    monkeypatch.setenv("NODEPOOL_SSH_KEY", str(home.folder / "my_key"))
    (home.folder / "log.yaml").write_text(
        "version: 1\nformatters: {own: {format: 'OWN %(message)s'}}\n"
        "handlers: {file: {class: logging.FileHandler, filename: own.log, formatter: own}}\n"
        "root: {level: INFO, handlers: [file]}\n"
    )
    home.start("-l", "log.yaml")
    home.until(home.ready(1))
    assert "OWN node 1 building -> ready" in (home.folder / "own.log").read_text()
    assert "PRIVATE KEY" in (home.folder / "my_key").read_text()
    assert (home.folder / "my_key").stat().st_mode & 0o077 == 0


def test_metrics_of_the_running_daemon_reach_a_statsd(home):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(20)
        home.edit("version: 1", f"version: 1\nstatsd: {{host: 127.0.0.1, port: {udp.getsockname()[1]}}}")
        home.start()
        heard = ""
        while "nodepool.launch.ready" not in heard or "nodepool.label.fake-small.nodes.ready:2|g" not in heard:
            heard += udp.recv(65536).decode() + "\n"
    assert "nodepool.provider.provider.max_servers:8|g" in heard


def test_detached_it_answers_before_the_command_returns(home):
    done = subprocess.run(
        [BIN / "nodepoold", "-c", "tools/fake.yaml"], cwd=home.folder, check=False, capture_output=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    try:
        assert home.cli("status").returncode == 0
    finally:
        pid = int((home.folder / "var/fake/nodepool.db.lock").read_text())
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "it did not stop within 5 s"
        time.sleep(0.05)  # not our child: there is nothing to wait on


def test_a_yaml_that_cannot_be_used_is_told_with_every_problem(home):
    home.edit("version: 1", "version: 1\nnonsense: 1")
    home.edit("min-ready: 2", "min-ready: many")
    done = subprocess.run(
        [BIN / "nodepoold", "-d", "-c", "tools/fake.yaml"],
        cwd=home.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    assert "Traceback" not in done.stderr

"""The daemon's end: within 5 s, whatever it is at, and with nothing left behind."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from nodepool.loops.running import LoopThread, ThreadedExecutor

BIN = Path(sys.executable).parent
STUBBORN = """\
#!/bin/sh
trap '' TERM
echo $$ > {pid}
while :; do sleep 0.2; done
"""
YAML = """\
version: 1
database: sqlite:///nodepool.db
socket: sock
images-dir: images
diskimages: [{name: image, release: bookworm, elements: [none], dib-cmd: ./stubborn, assembly: dib}]
labels: [{name: label, min-ready: 1}]
providers:
  - name: fake
    driver: fake
    count: 2
    ssh: {key: key}
    pools: [{name: main, labels: [{name: label, diskimage: image}]}]
"""


@pytest.fixture
def daemon(tmp_path):
    """`daemon()` starts nodepoold in a folder whose image build ignores SIGTERM."""
    begun = []

    def start():
        (tmp_path / "nodepool.yaml").write_text(YAML)
        (tmp_path / "stubborn").write_text(STUBBORN.format(pid=tmp_path / "build.pid"))
        (tmp_path / "stubborn").chmod(0o755)
        command = [BIN / "nodepoold", "-d", "-c", "nodepool.yaml"]
        begun.append(
            subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def until(daemon, true):
    end = time.monotonic() + 20
    while not true():
        assert daemon.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)  # another process: there is no event to wait for


def ended_after(daemon):
    began = time.monotonic()
    daemon.send_signal(signal.SIGTERM)
    output, _ = daemon.communicate(timeout=30)
    assert daemon.returncode == 0, output
    assert "Traceback" not in output
    return time.monotonic() - began


def test_a_build_that_will_not_end_is_ended_with_the_daemon(daemon, tmp_path):
    running, pid = daemon(), tmp_path / "build.pid"
    until(running, lambda: pid.exists() and pid.read_text().strip())
    assert ended_after(running) < 5
    assert not Path("/proc", pid.read_text().strip()).exists()


def test_a_locked_database_does_not_hold_up_the_end(daemon, tmp_path):
    running = daemon()
    until(running, (tmp_path / "build.pid").exists)
    with closing(sqlite3.connect(tmp_path / "nodepool.db", timeout=10)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert ended_after(running) < 5


def test_a_daemon_that_cannot_start_says_why_in_a_sentence(daemon, tmp_path):
    (tmp_path / "sock").write_text("not a socket")
    running = daemon()
    output, _ = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "sock is in the way and is no socket" in output
    assert "Traceback" not in output


def test_a_step_that_hangs_does_not_hold_up_the_end():
    program = """
import threading
from nodepool.loops.running import ThreadedExecutor
executor, begun = ThreadedExecutor(2, "step"), threading.Event()
executor.submit(lambda: (begun.set(), threading.Event().wait()), print)
begun.wait()
assert not executor.stop()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=10)


def test_workers_are_as_many_as_allowed_and_used_again():
    executor, names, results = ThreadedExecutor(2, "step"), set(), []
    for _ in range(20):
        done = threading.Event()
        executor.submit(
            lambda: names.add(threading.current_thread().name), lambda _, d=done: (results.append(1), d.set())
        )
        assert done.wait(5)
    assert executor.stop(5)
    assert len(results) == 20
    assert names <= {"step-0", "step-1"}
    assert executor.free() == 2


def test_a_loop_that_was_never_started_can_be_stopped():
    assert LoopThread("idle", None, None, lambda: None).stop(0.1)

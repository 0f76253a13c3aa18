"""`make bench`: what the pool costs, each row with the command that measured it.  Figures rank only beside each other.

usage: tests/bench/bench.py [ready|list|idle|power|simulated ...]     (all of them when none is named)
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from nodepool.cmd.client import Client, CommandError

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
ME = "tests/bench/bench.py"
YAML = """\
version: 1
database: sqlite:///nodepool.db
socket: sock
images-dir: images
diskimages:
  - {{name: image, release: bookworm, elements: [none], dib-cmd: {dib}, assembly: dib}}
labels: [{{name: label, min-ready: {count}}}]
providers:
  - name: fake
    driver: fake
    count: {count}
    delay: 0
    ssh: {{key: key}}
    pools: [{{name: main, labels: [{{name: label, diskimage: image}}]}}]
"""


@contextmanager
def daemon(count):
    """A daemon with `count` fake machines, and the time at which it was started."""
    with tempfile.TemporaryDirectory(prefix="npb") as name:
        folder = Path(name)
        (folder / "y.yaml").write_text(YAML.format(count=count, dib=ROOT / "tools" / "fake-image-create"))
        with (folder / "log").open("wb") as log:
            began = time.monotonic()
            process = subprocess.Popen([BIN / "nodepoold", "-d", "-c", "y.yaml"], cwd=folder, stdout=log, stderr=log)
        try:
            yield Client(str(folder / "sock")), process, began
        finally:
            process.terminate()
            process.wait()


def until_ready(client, count):
    """Wait until `count` nodes are READY; gives the moment."""
    while True:
        try:
            if client.get("/status")["nodes"].get("ready", 0) >= count:
                return time.monotonic()
        except CommandError:
            pass
        time.sleep(0.05)


def row(what, value, aim, command):
    """One line of the table."""
    print(f"{what:44} {value:>22}   {aim:24} {command}", flush=True)


def bench_ready():
    """From the start of the process, image build and enrolment included, to N READY."""
    for count in (200, 1000):
        with daemon(count) as (client, _, began):
            seconds = until_ready(client, count) - began
        value = f"{seconds:.2f} s ({count / seconds:.0f}/s)"
        row(f"start to {count} READY, fake", value, "200/s (peer: 20-22/s)", f"{ME} ready")


def bench_list_and_idle(which):
    """With 1,000 READY: the command line, then the daemon left alone."""
    with daemon(1000) as (client, process, _):
        until_ready(client, 1000)
        if "list" in which:
            command = [BIN / "nodepool", "--url", client._paths[0], "list"]
            times = []
            for _ in range(7):
                began = time.monotonic()
                subprocess.run(command, check=True, capture_output=True)
                times.append(time.monotonic() - began)
            value = f"{statistics.median(times):.3f} s"
            row("nodepool list of 1,000", value, "0.15 s (peer: 3.6 s)", shlex.join(["nodepool", "list"]))
        if "idle" in which:
            time.sleep(5)  # what follows measures rest: let it come to rest
            before, began = cpu(process.pid), time.monotonic()
            time.sleep(30)
            share = (cpu(process.pid) - before) / (time.monotonic() - began)
            row("idle with 1,000 READY, CPU", f"{share:.2%} of a core", "0.5 % (peer: 3.3 %)", f"{ME} idle")
            row("idle with 1,000 READY, memory", f"{rss(process.pid):.0f} MiB", "100 MiB (peer: 172)", f"{ME} idle")


def cpu(pid):
    """Seconds of CPU that a process has used (proc(5), stat 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid):
    """MiB of memory that a process holds."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=["ready", "list", "idle", "power", "simulated", []])
    which = parser.parse_args().which or ["ready", "list", "idle", "power", "simulated"]
    print(f"{'what':44} {'measured':>22}   {'aim':24} measured by")
    if "ready" in which:
        bench_ready()
    if {"list", "idle"} & set(which):
        bench_list_and_idle(which)
    if "simulated" in which:
        subprocess.run([sys.executable, ROOT / "tests" / "bench" / "bench_simulated.py"], check=True)
    if "power" in which:
        print()
        subprocess.run([sys.executable, ROOT / "tests" / "bench" / "bench_power.py"], check=True)


if __name__ == "__main__":
    main()

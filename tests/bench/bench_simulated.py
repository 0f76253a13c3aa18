"""Simulated machines over loopback: from nothing to READY, and a turn-round of all, beside the sum of their phases.

usage: tests/bench/bench_simulated.py [--machines 200] [--seconds firmware=5,...]

The machines speak real IPMI, HTTP and SSH from one other process; the sum is what one machine would need if the daemon
and everything between took no time.  Overhead is what comes on top of it until the last of all machines is READY.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from nodepool.cmd.client import Client, CommandError
from nodepool.rack import phases, rack
from nodepool.rack.simulated import rack as simulated

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
ME = "tests/bench/bench_simulated.py"
MACHINES, SECONDS = 200, "firmware=5,ramdisk=2,erase=2,write=4,configure=1,start=1,system=3"
TO_AGENT = ("firmware", "ramdisk")
DEPLOY = ("erase", "write", "configure", "start")
BY = {"reboot": ("firmware", "system"), "kexec": ("system",)}


@contextmanager
def pool(machines, seconds):
    """A simulated rack and a daemon with all its machines: client, both process ids, when the daemon was started."""
    with tempfile.TemporaryDirectory(prefix="npsim") as name:
        folder = Path(name)
        described = rack.up_simulated(folder / "rack", simulated.describe(folder / "rack", machines, seconds), str)
        path = simulated.write_yaml(described, folder / "home", str(ROOT / "tools" / "fake-image-create"))
        try:
            with (folder / "log").open("wb") as log:
                began = time.monotonic()
                command = [BIN / "nodepoold", "-d", "-c", path, "-s", path.with_name("secure.yaml")]
                daemon = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                server = int((folder / "rack" / "server.pid").read_text())
                yield Client(str(folder / "home" / "nodepool.sock")), folder / "rack", (daemon.pid, server), began
            finally:
                daemon.terminate()
                daemon.wait()
        finally:
            rack.down(folder / "rack", str)


def until(client, true, limit=900):
    """Wait until `true(status)`; the moment."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            if true(client.get("/status")):
                return time.monotonic()
        except CommandError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"not within {limit} s: {client.get('/status')}")


def usage(pid):
    """Seconds of CPU and MiB of memory of a process (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK"), int(status["VmRSS"].split()[0]) / 1024


def row(what, took, told, machines, command):
    """One line of the table."""
    over = f"{took:.1f} s, {machines / took:.1f} nodes/s"
    against = f"phases {told:.1f} s: +{(took - told) / told:.0%}" if told else "no phases"
    print(f"{what:44} {over:>22}   {against:24} {command}", flush=True)


def told(seconds, *names):
    """The sum of phases."""
    return sum(seconds[name] for group in names for name in group)


def bench(machines, text):
    """0 to READY, then all of them released at once and READY again."""
    seconds, command = phases.told([text]), ME
    if (machines, text) != (MACHINES, SECONDS):
        command = shlex.join([ME, "--machines", str(machines), "--seconds", text])
    with pool(machines, seconds) as (client, folder, (daemon, server), began):
        ready = until(client, lambda status: status["nodes"].get("ready", 0) == machines)
        first = told(seconds, TO_AGENT, DEPLOY, BY["reboot"])
        row(f"0 to {machines} READY, simulated", ready - began, first, machines, command)
        wish = {"nodes": [{"label": simulated.LABEL, "count": machines}], "requestor": "bench"}
        request = client.post("/requests", wish)
        while request["state"] in {"requested", "pending"}:
            request = client.get(f"/requests/{request['id']}", wait=30)
        released = time.monotonic()
        client.post(f"/requests/{request['id']}/release")
        again = until(client, lambda status: status["nodes"].get("ready", 0) == machines)
        how = started_by(folder)
        sum_of = told(seconds, TO_AGENT, DEPLOY, BY[how])
        row(f"turn-round of {machines}, by {how}", again - released, sum_of, machines, command)
        for name, pid in (("daemon", daemon), ("all machines", server)):
            cpu, memory = usage(pid)
            print(f"{f'{name}: CPU for both, memory':44} {f'{cpu:.1f} s, {memory:.0f} MiB':>22}   {'':24} {command}")


def started_by(folder):
    """How most of the machines came up last, as their consoles tell."""
    last = [machine["console"][-1] for machine in rack.status(folder)]
    return "kexec" if sum("by kexec" in line for line in last) * 2 > len(last) else "reboot"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=MACHINES)
    parser.add_argument("--seconds", default=SECONDS)
    arguments = parser.parse_args()
    bench(arguments.machines, arguments.seconds)


if __name__ == "__main__":
    main()

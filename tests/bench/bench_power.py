"""Power status of many BMCs: this project's client, cold and with kept sessions, beside FreeIPMI's ipmipower.

    python tests/bench/bench_power.py [--bmcs N] [--rounds N] [--only ROW]

The BMCs are the rack's, all in one other process.  The rows take turns, so that noise meets them alike; a row is the
median of its rounds.  "cold" is everything from opening the client to its being closed with all sessions ended; kept
sessions are opened before the clock starts.  ipmipower's figures contain the start of its process (see `--version`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nodepool.drivers.power import Bmc, Power, open_power  # noqa: E402
from nodepool.rack.bmc import Faults, running  # noqa: E402

ROWS = ("cold-17", "cold-3", "kept-17", "ipmipower-17", "ipmipower-3")  # client or tool, and cipher suite

Sweep = Callable[[], int]  # returns how many BMCs answered


def serve(count: int, suite: int) -> None:
    """The other process: print where the BMCs are, run until the standard input ends."""
    with running(count, faults=Faults(suites=(suite,))) as endpoints:
        print(json.dumps([f"{endpoint.host}:{endpoint.port}" for endpoint in endpoints]), flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def bmcs(count: int, suite: int) -> Iterator[list[str]]:
    command = [sys.executable, __file__, "--serve", str(suite), "--bmcs", str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield json.loads(process.stdout.readline())
        process.stdin.close()


def sweep(power: Power, threads: ThreadPoolExecutor, places: list[str]) -> int:
    records = [Bmc(f"ipmi://{place}", "admin", "admin") for place in places]
    return sum(state is False for state in threads.map(power.power, records))


def cold(threads: ThreadPoolExecutor, places: list[str]) -> int:
    with open_power() as power:
        return sweep(power, threads, places)


def ipmipower(places: list[str], suite: int) -> int:
    command = ["ipmipower", "-D", "LAN_2_0", "-I", str(suite), "-u", "admin", "-p", "admin", "-s", "-h"]
    done = subprocess.run([*command, ",".join(places)], check=True, capture_output=True, text=True)
    return done.stdout.count(": off")


def measure(rows: Mapping[str, Sweep], count: int, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, run in rows.items():
            began = time.perf_counter()
            answered = run()
            if number:  # the first round only warms up
                seconds[name].append(time.perf_counter() - began)
            if answered != count:
                raise SystemExit(f"{name}: only {answered} of {count} BMCs answered")
    return seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--bmcs", type=int, default=64)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--only", choices=ROWS, help="run this row alone")
    options.add_argument("--serve", type=int, metavar="SUITE", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.serve:
        serve(chosen.bmcs, chosen.serve)
        return
    count = chosen.bmcs
    with (
        bmcs(count, 3) as suite3,
        bmcs(count, 17) as suite17,
        ThreadPoolExecutor(min(count, 64)) as threads,
        open_power() as kept,
    ):
        rows: dict[str, Sweep] = {
            "cold-17": lambda: cold(threads, suite17),
            "cold-3": lambda: cold(threads, suite3),  # refused at suite 17 first
            "kept-17": lambda: sweep(kept, threads, suite17),
            "ipmipower-17": lambda: ipmipower(suite17, 17),
            "ipmipower-3": lambda: ipmipower(suite3, 3),
        }
        if not shutil.which("ipmipower"):
            print("ipmipower is not installed (package freeipmi-tools): its rows are left out", file=sys.stderr)
            rows = {name: run for name, run in rows.items() if not name.startswith("ipmipower")}
        if chosen.only:
            rows = {chosen.only: rows[chosen.only]}
        measured = measure(rows, count, chosen.rounds)
    print(
        f"{'power status, ' + str(count) + ' BMCs':<24} {'median':>9} {'min':>9} {'max':>9} {'BMCs/s':>7}  measured by"
    )
    for name, seconds in measured.items():
        median, least, most = (1000 * f(seconds) for f in (statistics.median, min, max))
        command = f"python tests/bench/bench_power.py --bmcs {count} --rounds {chosen.rounds} --only {name}"
        print(f"{name:<24} {median:>6.1f} ms {least:>6.1f} ms {most:>6.1f} ms {1000 * count / median:>7.0f}  {command}")


if __name__ == "__main__":
    main()

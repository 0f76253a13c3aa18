"""`nodepool list` of many nodes: the whole command, from the start of its process to its end, over the real API.

    python tests/bench/bench_list.py [--nodes N] [--rounds N]

The store is SQLite in a temporary folder, the API listens on its socket in this process; the command is another one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nodepool.api.app import create_app  # noqa: E402
from nodepool.api.server import ApiServer  # noqa: E402
from nodepool.clock import SystemClock  # noqa: E402
from nodepool.config.records import Config  # noqa: E402
from nodepool.model import Node, NodeState  # noqa: E402
from nodepool.plan import catalog  # noqa: E402
from nodepool.store import Tx, open_store  # noqa: E402

COMMANDS = (["list"], ["list", "--detail"], ["list", "--format", "json"])


def fill(tx: Tx, count: int) -> None:
    """READY nodes, as full of text as real ones."""
    for number in range(count):
        tx.add_later(
            Node(
                id=0,
                label="small",
                provider="lab",
                pool="main",
                machine_id=number + 1,
                machine=f"lab-{number:05}",
                image="debian",
                build_id="0123456789abcdef" * 2,
                config_generation="0123456789ab",
                state=NodeState.READY,
                since=tx.now,
                created_at=tx.now,
                ready_at=tx.now,
                hostname=f"lab-{number:05}",
                address=f"198.18.{number // 250}.{number % 250}",
                username="root",
                host_key="ssh-ed25519 " + "A" * 68,
            )
        )


def measure(words: list[str], rounds: int) -> list[float]:
    """Seconds of wall time of each round."""
    command = [sys.executable, "-c", "import sys; from nodepool.cmd.cli import main; sys.exit(main())", *words]
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
        seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Print one row per command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nodepool-bench-") as folder:
        store = open_store(f"sqlite:///{folder}/nodepool.db", SystemClock())
        store.write(lambda tx: fill(tx, args.nodes))
        offered = catalog(Config(generation=""))
        server = ApiServer(create_app(store, lambda: offered, dict, dict), Path(folder) / "nodepool.sock")
        server.start()
        os.environ["NODEPOOL_URL"] = f"{folder}/nodepool.sock"
        try:
            for words in COMMANDS:
                seconds = measure(words, args.rounds)
                row = f"nodepool {' '.join(words)}"
                print(f"{row:<32} {args.nodes} nodes  {statistics.median(seconds):.3f} s  (best {min(seconds):.3f})")
        finally:
            server.stop()
            store.close()


if __name__ == "__main__":
    main()

"""`make run RACK=simulated MACHINES=20`: a pool of simulated machines, READY in seconds, as an ordinary user.

They answer real IPMI, boot over real HTTP, run the agent's protocol and can be logged in to, all on loopback addresses;
nothing else about them exists.  Everything is in var/simulated/, begun anew by each run; Ctrl-C ends all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alone import NotAloneError, alone
from demo import Trouble

from nodepool.clock import age
from nodepool.cmd.client import Client, CommandError
from nodepool.errors import StepError
from nodepool.rack import RackError, phases, rack
from nodepool.rack.simulated import rack as simulated
from nodepool.ssh import SshShell, Target, ensure_key

TOOLS, BIN = Path(__file__).parent, Path(sys.executable).parent
VAR = Path("var/simulated")
RACK, HOME, LOG = VAR / "rack", VAR / "home", VAR / "nodepoold.log"
ONCE = 5  # nodes that are requested by --once


def main() -> int:
    """Run it; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="request, log in, release, READY again, tear down, exit")
    parser.add_argument("--machines", type=int, default=20, help="machines in the rack (default: 20)")
    parser.add_argument(
        "--seconds", action="append", default=[], metavar="PHASE=SECONDS[,...]", help="see nodepool-rack up --help"
    )
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with (
            alone(VAR),
            _rack(arguments.machines, phases.told(arguments.seconds)) as described,
            _daemon(described) as daemon,
        ):
            client = Client(str(HOME / "nodepool.sock"))
            _watch(client, daemon, arguments.machines)
            if arguments.once:
                _once(client, daemon, arguments.machines)
            else:
                _look_around(described)
    except (Trouble, NotAloneError, RackError, CommandError, StepError) as trouble:
        print(f"make run: {trouble}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing runs any more")
        return 130 if arguments.once else 0
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _say(sentence: str) -> None:
    print(sentence, flush=True)


@contextlib.contextmanager
def _rack(machines: int, seconds: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A new rack, and a daemon's files beside it: what was READY in an earlier run was in that rack's memory."""
    folder = RACK.resolve()
    if folder.is_dir():
        rack.down(folder, str)
    shutil.rmtree(HOME, ignore_errors=True)
    described = rack.up_simulated(folder, simulated.describe(folder, machines, seconds), _say)
    try:
        simulated.write_yaml(described, HOME, str(TOOLS.resolve() / "fake-image-create"))
        if len(path := str(HOME.resolve() / "nodepool.sock")) > 107:
            raise Trouble(f"{path} is too long for a Unix socket (107 bytes): clone into a shorter folder")
        yield described
    finally:
        rack.down(folder, str)


@contextlib.contextmanager
def _daemon(described: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    _say(f"the daemon for {len(described['machines'])} machines (its log: {LOG})")
    command = [BIN / "nodepoold", "-d", "-c", HOME / "nodepool.yaml", "-s", HOME / "secure.yaml"]
    with LOG.open("wb") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # Ctrl-C is ours to handle
    try:
        yield daemon
    finally:
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _watch(client: Client, daemon: subprocess.Popen[bytes], wanted: int, gone: frozenset[str] = frozenset()) -> float:
    """Tell how many are in which state until `wanted` nodes, none of them of `gone`, are READY; the seconds it took."""
    began, shown = time.monotonic(), ""
    while True:
        if daemon.poll() is not None:
            lines = LOG.read_text(errors="replace").splitlines()[-15:]
            raise Trouble(f"nodepoold ended; the end of {LOG} says why:\n" + "\n".join(lines))
        with contextlib.suppress(CommandError):
            nodes = client.items("/nodes")
            states = [node["state"] for node in nodes]
            text = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
            if text and text != shown:
                _say(f"[{time.monotonic() - began:6.1f} s] {text}")
                shown = text
            if sum(node["state"] == "ready" and node["id"] not in gone for node in nodes) >= wanted:
                return time.monotonic() - began
        time.sleep(0.2)


def _look_around(described: dict[str, Any]) -> None:
    tool, first = f"{BIN}/nodepool --url {HOME}/nodepool.sock", described["machines"][0]
    bmc = first["bmc"]
    _say(
        f"""
All nodes are READY: nodepool has logged in to each.  Look around from another terminal, in this folder:

    {tool} list
    {tool} show {first["name"]}
    {tool} request {simulated.LABEL}=5 --wait --ssh-key ~/.ssh/id_ed25519.pub
    ssh -i {HOME}/id_ed25519 -p {described["ssh_port"]} root@{first["ip"]} uname -r
    ipmitool -I lanplus -H {bmc["host"]} -p {bmc["port"]} -U {bmc["username"]} -P '{bmc["password"]}' power status
    {BIN}/nodepool-rack fault --dir {RACK} n1 fail=write
    {BIN}/nodepool-rack console --dir {RACK} n1

Ctrl-C ends everything."""
    )
    signal.pause()


def _once(client: Client, daemon: subprocess.Popen[bytes], machines: int) -> None:
    """Request nodes, log in with a key of one's own, give them back; READY again; the seconds of one of them."""
    count, key = min(ONCE, machines), VAR / "requestor_ed25519"
    wish = {"nodes": [{"label": simulated.LABEL, "count": count}], "requestor": "make run"}
    request = client.post("/requests", {**wish, "ssh_keys": [ensure_key(key)]})
    while request["state"] in {"requested", "pending"}:
        request = client.get(f"/requests/{request['id']}", wait=30)
    if request["state"] != "fulfilled":
        raise Trouble(f"the request is {request['state']}: {request}")
    given = [client.get(f"/nodes/{node['id']}") for node in request["nodes"]]
    for node in given:
        SshShell(key).boot_id(Target(node["address"], node["port"], node["username"], node["host_key"]))
    _say(f"logged in to {', '.join(node['machine'] for node in given)}, each by its proven host key; giving them back")
    client.post(f"/requests/{request['id']}/release")
    seconds = _watch(client, daemon, machines, frozenset(node["id"] for node in given))
    _say(f"{count} of them erased, written anew and READY after {age(seconds)}; one life before, in seconds:")
    for phase in given[0]["timeline"]:
        _say(f"  {phase['state']:10} {phase['phase']:12} {phase['seconds']:8.1f}")


if __name__ == "__main__":
    sys.exit(main())

"""The whole round of `make run ONCE=1`: machines are handed out, marked, released, READY again; no mark is left.

What a user leaves behind is looked for as the next user would, by a login, and on all of the disk, by reading the file
that it is on this host.  Where the time went is told at the end, for the first launch and for the recycle.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from nodepool.cmd.client import Client

View = dict[str, Any]

_CHUNK = 8 << 20
_HELLO = 'echo "  logged in to $(hostname) as $(id -un): $(. /etc/os-release; echo $PRETTY_NAME), $(uname -r)"'
_SSH = ("-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=10")
_PHASES = (
    ("agent", "off, on, firmware, network boot, agent up"),
    ("erase", "zeroed and read back"),
    ("write", "image written, read back, grown"),
    ("configure", "host key, name, nodepool's key"),
    ("start", "told, heard"),
    ("login", "the new system comes up; proven"),
    ("waiting", "in between"),
)


class Trouble(Exception):
    """The demo cannot go on: one sentence with the remedy."""


class Round:
    """One user's way through all machines of a rack: `var` is the demo's folder, `label` what is asked for."""

    def __init__(self, client: Client, rack: Mapping[str, Any], var: Path, label: str) -> None:
        self.client = client
        self.rack = rack
        self.label = label
        self._key = var / "demo_ed25519"
        self._known = var / "demo_known_hosts"
        self._disks = {machine["name"]: Path(machine["disks"][0]["path"]) for machine in rack["machines"]}
        self._mark = secrets.token_hex(16)

    def go(self, watch: Callable[[frozenset[str]], None]) -> str:
        """Do it; the table of seconds.

        `watch` is called with the ids of the nodes that were given back; it returns when others are READY in their
        place.  Raises `Trouble`.
        """
        request, nodes = self._hand_out()
        boots = [self._firmware_boots()]
        for node in nodes:
            self.login(node, f"{_HELLO}; echo {self._mark} >marker; sync")
            if not reads(self._disks[node["machine"]], self._mark.encode()):
                raise Trouble(f"the mark that was left on {node['machine']} is not on its disk: nothing would be shown")
        print("a mark is on each disk; the nodes are given back\n", flush=True)
        self.client.post(f"/requests/{request}/release")
        watch(frozenset(node["id"] for node in nodes))
        boots.append(self._firmware_boots())
        request, again = self._hand_out()
        for node in again:
            self.login(node, f"{_HELLO}; ! test -e marker")
            path = self._disks[node["machine"]]
            if reads(path, self._mark.encode()):
                raise Trouble(f"the mark of the last user is still on the disk of {node['machine']}")
            print(f"  no mark on {node['machine']}: all {path.stat().st_size / 2**30:.1f} GiB of its disk were read")
        table = self._table(nodes, again, boots)
        self.client.post(f"/requests/{request}/release")
        return table

    def login(self, node: View, command: str) -> None:
        """Run a command on a node over a connection that proved the host key that nodepool has told."""
        self._known.write_text(f"{node['address']} {node['host_key']}\n")
        inside = ("ip", "netns", "exec", self.rack["namespace"])
        ssh = ("ssh", "-i", str(self._key), "-o", f"UserKnownHostsFile={self._known}", *_SSH)
        done = subprocess.run([*inside, *ssh, f"{node['username']}@{node['address']}", command], check=False)
        if done.returncode:
            raise Trouble(f"on node {node['id']} ({node['machine']}) the user's command failed (see above)")

    def _hand_out(self) -> tuple[str, list[View]]:
        """Ask for all machines at once, with a key of one's own: the request's id, and the nodes in full."""
        if not self._key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._key], check=True)
        public = self._key.with_suffix(".pub").read_text().strip()
        wish = {"nodes": [{"label": self.label, "count": len(self._disks)}], "requestor": "make run"}
        request = self.client.post("/requests", wish | {"ssh_keys": [public]})
        while request["state"] in {"requested", "pending"}:
            request = self.client.get(f"/requests/{request['id']}", wait=30)
        if request["state"] != "fulfilled":
            raise Trouble(f"the request is {request['state']}: {request}")
        nodes = [self.client.get(f"/nodes/{node['id']}") for node in request["nodes"]]
        print(f"\nrequest {request['id']}: nodes {' and '.join(node['id'] for node in nodes)}, together", flush=True)
        return request["id"], sorted(nodes, key=lambda node: str(node["machine"]))

    def _firmware_boots(self) -> dict[str, int]:
        """How often each machine's firmware has started since the rack came up."""
        command = [Path(sys.executable).with_name("nodepool-rack"), "status", "--format", "json"]
        said = subprocess.run([*command, "--dir", self.rack["folder"]], capture_output=True, text=True, check=True)
        return {machine["name"]: machine["firmware_boots"] for machine in json.loads(said.stdout)}

    def _table(self, first: Sequence[View], again: Sequence[View], boots: Sequence[Mapping[str, int]]) -> str:
        """Seconds of each phase: a column for each machine's first launch and one for its recycle."""
        lives = [life for pair in zip(first, again, strict=True) for life in pair]
        columns = [self._seconds(node) for node in lives]
        firmware = {machine["name"]: machine["firmware"] for machine in self.rack["machines"]}
        heads = [f"{node['machine']} ({firmware[node['machine']]})" for node in first]
        lines = ["", f"{'seconds per phase':18}" + "".join(f"{head:>20}" for head in heads)]
        lines.append(" " * 18 + f"{'first':>10}{'recycle':>10}" * len(heads))
        for phase, what in _PHASES:
            if any(phase in column for column in columns):
                cells = "".join(f"{column.get(phase, 0.0):10.1f}" for column in columns)
                lines.append(f"  {phase:16}{cells}    {what}")
        lines.append(f"  {'in all':16}" + "".join(f"{sum(column.values()):10.1f}" for column in columns))
        names = [node["machine"] for node in first]
        tests = "".join(f"{boots[0][name]:>10}{boots[1][name] - boots[0][name]:>10}" for name in names)
        return "\n".join([*lines, f"  {'self tests':16}{tests}    of the firmware; minutes each on real servers"])

    def _seconds(self, node: View) -> dict[str, float]:
        """Phases of a machine's way to this node, from the time that it was switched on for the agent."""
        machine = self.client.get(f"/machines/{node['machine']}")
        earlier = [life["id"] for life in machine["lives"] if int(life["id"]) < int(node["id"])]
        events = self.client.get("/events", subject=f"machine:{node['machine']}")["items"][::-1]
        before = [event for event in events if event["time"] <= node["created_at"]]
        found = {"agent": _last_stay(before, "inspecting"), "erase": _last_stay(before, "cleaning")}
        if earlier:  # newest first
            phases = self.client.get(f"/nodes/{earlier[0]}")["timeline"]
            found["agent"] = sum(phase["seconds"] for phase in phases if phase["state"] == "deleting")
        for phase in node["timeline"]:
            if phase["state"] == "building":
                name = phase["phase"] if phase["phase"] in dict(_PHASES) else "waiting"
                found[name] = found.get(name, 0.0) + phase["seconds"]
        return found


def _last_stay(events: Sequence[View], state: str) -> float:
    """How long the last stay of a machine in a state took that is over, in seconds; 0 when there was none."""
    came = seconds = 0.0
    for event in events:
        time = datetime.fromisoformat(event["time"]).timestamp()
        if event["from"] == state:
            seconds = time - came
        if event["to"] == state:
            came = time
    return seconds


def reads(path: Path, word: bytes) -> bool:
    """Whether `word` is anywhere in a file; all of it is read, but for holes, which read as zeros."""
    with path.open("rb", buffering=0) as file:
        place, tail, size = 0, b"", path.stat().st_size
        while place < size:
            try:
                data = os.lseek(file.fileno(), place, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but holes from here on
                return False
            place, tail = data, tail if data == place else b""
            chunk = file.read(_CHUNK)
            if word in tail + chunk:
                return True
            place, tail = place + len(chunk), chunk[1 - len(word) :]
    return False

"""`make run`: a rack of QEMU machines behind real BMCs, a daemon that brings them to READY, and a look around.

Everything it makes is in var/ and in a network namespace of the rack's own; Ctrl-C takes down what runs and keeps what
was built (the agent's ramdisk, the image, the database), so that a second run is quicker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nodepool.clock import age
from nodepool.cmd.client import Client, CommandError

sys.path.insert(0, str(Path(__file__).parent))  # as it is when this file is the program; the tests load it as a module
from alone import NotAloneError, alone
from demo_round import Round, Trouble

VAR = Path("var")
BIN = Path(sys.executable).parent
LABEL = "debian-12-metal"
KERNEL = "linux-image-cloud-amd64"  # has what virtual machines need, and boots 5 s sooner than the one for all
NEEDS_DISK = 2 << 30  # bytes: an image build and its caches; the rack counts its own disks
NEEDS_MEMORY = (900 << 20, 900 << 20)  # bytes: diskimage-builder; each QEMU with its translation buffer
LOG = VAR / "nodepoold.log"

YAML = """\
# Written by `make run` on every start; edit nodepool.yaml.sample's copy of your own instead.
version: 1
database: sqlite:///var/nodepool.db
images-dir: var/images
agent-dir: var/agent
networks:
  - {{name: lab, interface: {bridge}, cidr: {cidr}, gateway: {gateway}, dhcp: managed}}
diskimages:
  - name: debian-12
    release: bookworm
    elements: [debian-minimal, nodepool-node]
    formats: [raw]
    rebuild-age: 7d
    env-vars: {{DIB_NODEPOOL_KERNEL: {kernel}}}  # enough for virtual machines, and small
    # the daemon lives in the rack's network namespace; the package mirrors are in that of the machine
    dib-cmd: {dib}
labels:
  - {{name: {label}, min-ready: {machines}}}
providers:
  - name: rack1
    driver: metal
    network: lab
    boot-timeout: 300
    ssh: {{user: root, key: var/id_ed25519}}
    machines:
{specs}
    pools:
      - name: main
        max-servers: {machines}
        labels:
          - {{name: {label}, diskimage: debian-12, start: auto}}
"""

MACHINE = """\
      - name: {name}
        rack: rack1
        bmc: ipmi://{host}:{port}
        credentials: {name}
        interfaces: [{{mac: "{mac}", ip: {ip}}}]
        firmware: {firmware}
        accept: true"""


def main() -> int:
    """Run it; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="the whole round (see demo_round.py), tear down, exit")
    parser.add_argument(
        "--machines", type=int, default=2, help="machines in the rack, BIOS and UEFI in turn (default: 2)"
    )
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    began = time.monotonic()
    try:
        _check(arguments.machines)
        _agent()
        with alone(VAR), _rack(arguments.machines) as rack:
            _write_yaml(rack, arguments.machines)
            with _daemon(rack) as daemon:
                client = Client(str(VAR / "nodepool.sock"))
                _answers(client, daemon)
                _forget(client)
                _watch(client, daemon, arguments.machines)
                if arguments.once:
                    table = Round(client, rack, VAR, LABEL).go(
                        lambda gone: _watch(client, daemon, arguments.machines, gone)
                    )
                    print(f"{table}\n  {age(time.monotonic() - began)} since the start, on {_host()}")
                else:
                    _look_around(client, rack)
    except (Trouble, NotAloneError) as trouble:
        print(f"make run: {trouble}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was built is kept in var/")
        return 130 if arguments.once else 0
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _check(machines: int) -> None:
    if os.geteuid():
        raise Trouble("network namespaces and taps need root: run it as `sudo make run`")
    VAR.mkdir(exist_ok=True)
    free = shutil.disk_usage(VAR).free
    if free < NEEDS_DISK:
        raise Trouble(
            f"{NEEDS_DISK >> 30} GiB of disk are needed in {VAR.resolve()}, {free >> 20} MiB are free: make room"
        )
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) << 10
    needed = NEEDS_MEMORY[0] + machines * NEEDS_MEMORY[1]
    if available < needed:
        raise Trouble(
            f"{needed >> 20} MiB of memory are needed for {machines} machine(s), {available >> 20} MiB are free: "
            "end something, or take fewer: make run MACHINES=1"
        )
    path = str((VAR / "nodepool.sock").resolve())
    if len(path) > 107:
        raise Trouble(f"{path} is too long for a Unix socket (107 bytes): clone into a shorter folder")


def _agent() -> None:
    print("the agent's ramdisk")
    build = [BIN / "nodepool", "agent-build", "--dir", VAR / "agent", "--kernel-package", KERNEL]
    done = subprocess.run(build, check=False)
    if done.returncode:
        raise Trouble("the agent's ramdisk could not be built (see above)")


@contextlib.contextmanager
def _rack(machines: int) -> Iterator[dict[str, Any]]:
    rack = [BIN / "nodepool-rack"]
    up = [*rack, "up", "--dir", VAR / "rack", "--machines", str(machines), "--firmware", "bios,uefi"]
    up += ["--kernel", VAR / "agent" / "vmlinuz"]
    subprocess.run([*rack, "down", "--dir", VAR / "rack", "--keep-disks"], check=False, capture_output=True)
    print("the rack")
    done = subprocess.run(up, check=False)
    try:
        if done.returncode:
            raise Trouble("the rack did not come up (see above)")
        yield json.loads((VAR / "rack" / "rack.json").read_text())
    finally:
        subprocess.run([*rack, "down", "--dir", VAR / "rack"], check=False, capture_output=True)


def _write_yaml(rack: dict[str, Any], machines: int) -> None:
    outside = f"/proc/{os.getpid()}/ns/net"
    specs = "\n".join(
        MACHINE.format(**{**machine, "host": machine["bmc"]["host"], "port": machine["bmc"]["port"]})
        for machine in rack["machines"]
    )
    (VAR / "nodepool.yaml").write_text(
        YAML.format(
            bridge=rack["bridge"],
            cidr=rack["cidr"],
            gateway=rack["gateway"],
            dib=f"nsenter --net={outside} {BIN / 'disk-image-create'}",
            label=LABEL,
            kernel=KERNEL,
            machines=machines,
            specs=specs,
        )
    )
    secrets = "".join(
        f"  - {{name: {m['name']}, username: {m['bmc']['username']}, password: '{m['bmc']['password']}'}}\n"
        for m in rack["machines"]
    )
    secure = VAR / "secure.yaml"
    secure.unlink(missing_ok=True)
    secure.touch(mode=0o600)
    secure.write_text(f"credentials:\n{secrets}")


@contextlib.contextmanager
def _daemon(rack: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    command = ["ip", "netns", "exec", rack["namespace"], BIN / "nodepoold", "-d"]
    with LOG.open("ab") as log:
        daemon = subprocess.Popen(
            [*command, "-c", VAR / "nodepool.yaml", "-s", VAR / "secure.yaml"],
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is ours to handle, in order
        )
    try:
        yield daemon
    finally:
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _answers(client: Client, daemon: subprocess.Popen[bytes]) -> None:
    print(f"the daemon (its log: {LOG})")
    while True:
        if daemon.poll() is not None:
            raise Trouble(f"nodepoold ended; the end of {LOG} says why:\n{_tail(LOG)}")
        try:
            client.get("/status")
        except CommandError:
            time.sleep(0.2)
        else:
            return


def _forget(client: Client) -> None:
    """Nodes of an earlier run went with the disks of its rack: their machines are to be made ready anew."""
    if client.get("/status").get("frozen"):
        client.post("/thaw")  # whoever removed the database of an earlier run: nothing of it is in use
    for node in client.items("/nodes"):
        if node["state"] in {"ready", "in-use"}:
            client.delete(f"/nodes/{node['id']}")


def _watch(client: Client, daemon: subprocess.Popen[bytes], wanted: int, gone: frozenset[str] = frozenset()) -> None:
    """Show what everything is at until nodes that are not `gone` are READY; a table on a terminal, lines elsewhere."""
    began, shown, lines = time.monotonic(), "", 0
    while True:
        if daemon.poll() is not None:
            raise Trouble(f"nodepoold ended; the end of {LOG} says why:\n{_tail(LOG)}")
        table, ready = _table(client, gone)
        if sys.stdout.isatty():
            if lines:
                print(f"\x1b[{lines}A\x1b[J", end="")
            text = f"{table}\n{age(time.monotonic() - began)} since the start"
            print(text, flush=True)
            lines = text.count("\n") + 1
        elif table != shown:
            print(f"[{time.monotonic() - began:6.1f} s]", table.replace("\n", "\n           "), flush=True)
            shown = table
        if ready >= wanted:
            return
        time.sleep(0.5)


def _table(client: Client, gone: frozenset[str]) -> tuple[str, int]:
    builds = client.items("/builds")
    running = [build for build in builds if build["state"] in {"requested", "building", "testing"}]
    newest = [build for build in builds if build["state"] == "ready"][:1]
    rows = [f"image   {b['image']:16} {b['state']:12} {b.get('at') or ''}" for b in [*running, *newest]]
    for machine in client.items("/machines"):
        trouble = machine["trouble"]
        at = f"by node {machine['node_id']}" if machine["node_id"] else machine["at"]
        at = f"{trouble['phase']}: {trouble['reason']}" if trouble else at
        rows.append(f"machine {machine['name']:16} {machine['state']:12} {at}")
    ready = 0
    for node in client.items("/nodes"):
        ready += node["state"] in {"ready", "in-use"} and node["id"] not in gone
        rows.append(f"node    {node['id']:16} {node['state']:12} {node.get('at') or ''}")
    width = shutil.get_terminal_size((200, 24)).columns - 1  # a row that is broken in two could not be drawn over
    return "\n".join(row.rstrip()[:width] for row in rows), ready


def _host() -> str:
    """What the seconds were measured on."""
    system = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    rack = json.loads((VAR / "rack" / "rack.json").read_text())
    return f"{system['PRETTY_NAME'].strip(chr(34))}, {os.cpu_count()} cores, QEMU by {rack['accelerator']['name']}"


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _look_around(client: Client, rack: dict[str, Any]) -> None:
    node = client.items("/nodes")[-1]["id"]
    machine = rack["machines"][0]
    bmc = machine["bmc"]
    inside = f"ip netns exec {rack['namespace']}"
    print(
        f"""
READY is proven: nodepool has logged in.  Look around from another terminal, in this folder:

    {BIN}/nodepool list                    what there is
    {BIN}/nodepool show {node:18} where the time went
    {BIN}/nodepool explain {LABEL}
    {BIN}/nodepool request {LABEL} --wait --ssh-key ~/.ssh/id_ed25519.pub
    {inside} ssh -i var/id_ed25519 root@{machine["ip"]}
    {inside} ipmitool -I lanplus -H {bmc["host"]} -U {bmc["username"]} -P '{bmc["password"]}' power status
    tail -f {machine["console"]}

Ctrl-C ends everything; nothing stays behind but what was built, in var/."""
    )
    signal.pause()


if __name__ == "__main__":
    sys.exit(main())

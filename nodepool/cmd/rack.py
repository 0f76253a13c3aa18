"""`nodepool-rack`: real QEMU machines behind real IPMI BMCs, in a network of their own, to try nodepool on.

With `--simulated` the machines are simulated, on loopback addresses, and no root is needed.

Exit status: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nodepool.rack import RackError, inventory, phases, rack
from nodepool.rack.inventory import Wish
from nodepool.rack.simulated import rack as simulated_rack

DESCRIPTION = """\
A virtual rack: QEMU machines, each behind an IPMI 2.0 BMC of its own, in a network namespace of their own.

    nodepool-rack up --machines 2            make it; rack.json says where everything is
    nodepool-rack up --machines 2 --firmware bios,uefi
    nodepool-rack status                     power, boot flags, last console line
    ip netns exec NAMESPACE ipmitool -I lanplus -H 127.0.0.11 -U admin -P PASSWORD chassis power on
    nodepool-rack fault n1 silent=rakp1      let a BMC misbehave
    nodepool-rack down                       take it away

Simulated machines, without root or QEMU: real IPMI, network boot, agent protocol and SSH on loopback addresses.

    nodepool-rack up --simulated 20 --seconds firmware=60,write=10
    nodepool-rack yaml --to var/simulated    the daemon's YAML, secrets and files for them
    nodepool-rack fault n3 fail=erase        let a phase of a machine fail, from now on
"""

FAULTS = """\
faults:
  silent=STAGE     nothing is answered from a stage on: open, rakp1, rakp3, setpriv, cmd (commands are dropped),
                   answer (commands are carried out, their answers lost), all
  full             no free session
  suites=N[,N]     only these cipher suites are accepted (3, 17)
  tag0             a failed login is answered with tag 0 and session id 0
  zero_code        the BMC proves nothing in RAKP message 2
  lag=SECONDS      the power that is reported stays behind the true one
  stuck            power commands are accepted and nothing happens
  refuse=COMMAND:CODE[,...]   e.g. control:0xc0; commands: status, control, set-boot, get-boot, identify,
                   device-id, guid, set-privilege, close
  fail=PHASE[,...] hang=PHASE[,...]   of simulated machines: firmware, ramdisk, erase, write, configure, start, system
  drop=SHARE, duplicate=SHARE, delay=SECONDS   of answers
"""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str) -> int:
    """Bytes out of `2G`, `512M`, `1000000`."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper().removesuffix("IB").removesuffix("B"))
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give e.g. 2G or 512M")
    return int(match[1]) * _UNITS[match[2]]


def firmwares(text: str) -> tuple[str, ...]:
    """Firmwares out of `bios`, `uefi`, `bios,uefi`."""
    found = tuple(word.strip() for word in text.split(","))
    if not set(found) <= {"bios", "uefi"}:
        raise argparse.ArgumentTypeError(f"{text!r}: give bios, uefi or one for each machine, e.g. bios,uefi")
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("nodepool-rack", description=DESCRIPTION, formatter_class=raw)
    commands = top.add_subparsers(dest="command", required=True, metavar="up|down|status|console|fault|yaml")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dir", type=Path, default=Path("var/rack"), help="the rack's folder (default: %(default)s)")

    _add_up(commands.add_parser("up", parents=[common], help="make the rack and start it; all machines are off"))
    show = commands.add_parser("yaml", parents=[common], help="write what a daemon needs to use simulated machines")
    show.add_argument("--to", type=Path, default=Path("var/simulated"), help="the folder (default: %(default)s)")
    show.add_argument(
        "--dib-cmd", default="tools/fake-image-create", help="what makes the image (default: %(default)s)"
    )
    show.add_argument("--min-ready", type=int, help="nodes to keep ready (default: all machines)")

    end = commands.add_parser("down", parents=[common], help="power off, end and remove everything")
    end.add_argument("--keep-disks", action="store_true", help="keep the disks for the next `up`")

    look = commands.add_parser("status", parents=[common], help="what the machines are doing")
    look.add_argument("--format", choices=("table", "json"), default="table")
    look.add_argument("--lines", type=int, default=5, help="console lines for each machine in json (default: 5)")

    console = commands.add_parser("console", parents=[common], help="the last lines of a machine's serial console")
    console.add_argument("machine")
    console.add_argument("-n", "--lines", type=int, default=40)

    spoil = commands.add_parser(
        "fault", parents=[common], help="let a BMC misbehave", epilog=FAULTS, formatter_class=raw
    )
    spoil.add_argument("machine")
    spoil.add_argument("faults", nargs="*", metavar="NAME[=VALUE]")
    spoil.add_argument("--clear", action="store_true", help="end all faults of the machine first")
    return top


def _add_up(make: argparse.ArgumentParser) -> None:
    make.add_argument("--machines", type=int, default=1, help="how many (default: %(default)s)")
    make.add_argument("--disk-size", type=size, help="e.g. 8G (default: 2G for the first machine, 4G for the others)")
    make.add_argument("--memory", type=int, default=512, help="MiB for each machine (default: %(default)s)")
    make.add_argument(
        "--firmware",
        type=firmwares,
        default=("bios",),
        metavar="bios|uefi[,...]",
        help="for each machine in turn, from the start again when there are more machines (default: bios)",
    )
    make.add_argument(
        "--kernel",
        type=Path,
        action="append",
        default=[],
        help="a Linux kernel to boot when finding out whether kvm works (default: those in /boot); may be repeated",
    )
    make.add_argument("--simulated", type=int, metavar="N", help="N simulated machines instead; needs no root")
    make.add_argument(
        "--seconds",
        action="append",
        default=[],
        metavar="PHASE=SECONDS[,...]",
        help=f"how long phases of simulated machines last: all, {', '.join(phases.DEFAULT)} "
        f"(default: {','.join(f'{name}={seconds:g}' for name, seconds in phases.DEFAULT.items())})",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command."""
    args = parser().parse_args(argv)
    run = {"up": _up, "down": _down, "status": _status, "console": _console, "fault": _fault, "yaml": _yaml}
    try:
        run[args.command](args)
    except RackError as error:
        print(f"nodepool-rack: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _progress(sentence: str) -> None:
    print(f"nodepool-rack: {sentence}", flush=True)


def _up(args: argparse.Namespace) -> None:
    if args.simulated is not None:
        folder = args.dir.resolve()
        wanted = simulated_rack.describe(folder, args.simulated, phases.told(args.seconds))
        rack.up_simulated(folder, wanted, _progress)
        _progress(f"up; {args.dir / 'rack.json'} says where everything is")
        return
    wish = Wish(args.machines, args.disk_size, args.memory, args.firmware)
    rack.up(args.dir, wish, _progress, args.kernel)
    _progress(f"up; {args.dir / 'rack.json'} says where everything is")


def _yaml(args: argparse.Namespace) -> None:
    path = simulated_rack.write_yaml(inventory.read(args.dir), args.to, args.dib_cmd, args.min_ready)
    _progress(f"written; start the daemon: nodepoold -d -c {path} -s {path.with_name('secure.yaml')}")


def _down(args: argparse.Namespace) -> None:
    rack.down(args.dir, _progress, keep_disks=args.keep_disks)


def _status(args: argparse.Namespace) -> None:
    machines = rack.status(args.dir, args.lines)
    if args.format == "json":
        print(json.dumps(machines, indent=2))
        return
    heads = ("NAME", "POWER", "BOOT", "PID", "UPTIME", "BOOTS", "FAULTS", "CONSOLE")
    rows = [heads, *map(_row, machines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(machine: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        machine["name"],
        machine["power"],
        machine["boot"],
        str(machine["pid"] or "-"),
        f"{machine['uptime']:.0f}",
        str(machine["firmware_boots"]),
        machine["last_error"] or " ".join(machine["faults"]) or "-",
        machine["console"][-1][:60] if machine["console"] else "",
    )


def _console(args: argparse.Namespace) -> None:
    machines = {machine["name"]: machine for machine in rack.status(args.dir, args.lines)}
    if args.machine not in machines:
        raise RackError(f"there is no machine {args.machine!r}; the machines are {', '.join(machines)}")
    print("\n".join(machines[args.machine]["console"]))


def _fault(args: argparse.Namespace) -> None:
    in_force = rack.fault(args.dir, args.machine, args.faults, clear=args.clear)
    _progress(f"faults of {args.machine}: {' '.join(in_force) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())

"""`nodepool`, the command line: argparse, and http.client over the daemon's Unix socket.

Exit status: 0 done, 1 failed, 2 usage, 4 not found, 5 refused or conflict.  To start is part of every command's time:
nothing is imported before it is needed, and none of the daemon's libraries ever (a test holds it to that).
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from nodepool import __version__
from nodepool.cmd.cli_output import FORMATS
from nodepool.cmd.client import DEFAULTS, FAILED, USAGE, Client, CommandError

DESCRIPTION = """\
Nodes (machines made ready), requests for them, and the machines and images behind them.

  nodepool list                            the nodes, and what each is at
  nodepool request small --wait            a node of the label small: its address once it is handed out
  nodepool release 12                      give node 12 back: its machine is wiped and used again
  nodepool explain small                   why there are no more of them
  nodepool show 12                         one node: what went wrong, where its time went
  nodepool ssh 12                          log in to it
  nodepool list --watch                    the nodes, drawn again every 2 seconds
"""
EPILOG = f"""\
The daemon is asked through its Unix socket: --url, else NODEPOOL_URL, else {DEFAULTS[0]}, else {DEFAULTS[1]}.
Exit status: 0 done, 1 failed, 2 usage, 4 not found, 5 refused or conflict.  nodepool COMMAND --help has examples.
"""
FOREVER = 10 * 365 * 86400.0  # seconds that --wait without a number waits


class Command(NamedTuple):
    """A command: what it does, examples, its arguments, and where its function is (`module:function`)."""

    help: str
    examples: str
    run: str
    add_arguments: Callable[[argparse.ArgumentParser], Any] = lambda _: None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = parser_of(words)
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:  # --help, --version, or words that make no command
        return stop.code if isinstance(stop.code, int) else USAGE
    if args.command is None:
        parser.print_help()
        return FAILED
    try:
        status = _run(args)
        sys.stdout.flush()
    except CommandError as error:
        print(f"nodepool: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("nodepool: interrupted", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return status


def _run(args: argparse.Namespace) -> int:
    if args.command in LOCAL:
        return int(importlib.import_module(LOCAL[args.command].run).run(args))
    module, _, function = COMMANDS[args.command].run.partition(":")
    run = getattr(importlib.import_module(f"nodepool.cmd.{module}"), function)
    client = Client(args.url)
    if getattr(args, "watch", None) is None:
        return int(run(client, args))
    from nodepool.cmd.cli_watch import watch

    between = {"table": "\n", "yaml": "---\n"}.get(args.format, "")
    return watch(lambda: int(run(client, args)), args.watch, between)


class _Parser(argparse.ArgumentParser):
    """argparse that keeps the layout of what it is told and names where to look."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """One sentence and the remedy on stderr, status 2."""
        print(f"nodepool: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(USAGE)


def parser_of(words: Sequence[str]) -> argparse.ArgumentParser:
    """The program's words; those of a local command only when it is among `words`."""
    parser = _Parser(prog="nodepool", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"nodepool {__version__}")
    parser.add_argument("-c", "--config", metavar="FILE", help="the configuration, for config-validate")
    parser.add_argument("-s", "--secure", metavar="FILE", help="the secrets file, for config-validate")
    _common(parser, url=None, format="table")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in (*COMMANDS.items(), *LOCAL.items()):
        sub = commands.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"examples:\n{command.examples}" if command.examples else None,
        )
        if name in COMMANDS:
            _common(sub, url=argparse.SUPPRESS, format=argparse.SUPPRESS)
            command.add_arguments(sub)
        elif name in words:  # its module knows its arguments, and may be costly
            importlib.import_module(command.run).add_arguments(sub)
    return parser


def _common(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    parser.add_argument("--url", default=defaults["url"], help="the daemon's socket: a path or unix:///path")
    forms = "how to print it (default: table)"
    parser.add_argument("--format", choices=FORMATS, default=defaults["format"], help=forms)


def _label(text: str) -> tuple[str, int]:
    """LABEL or LABEL=N."""
    label, equals, number = text.partition("=")
    if not label or (equals and not (number.isdecimal() and 0 < int(number) <= 10_000)):
        raise argparse.ArgumentTypeError(f"{text!r} is no LABEL or LABEL=N (N from 1 to 10000)")
    return label, int(number) if equals else 1


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= FOREVER:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds (labels go before --wait)")
    return seconds


def _every(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 on (names go before --watch)")
    return seconds


def _until(text: str) -> dict[str, object]:
    """A duration in the YAML's words, or a time (RFC 3339; without a zone, this machine's), as the API takes them."""
    if match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", text, re.ASCII):
        return {"seconds": float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]}
    from datetime import datetime

    try:
        return {"until": datetime.fromisoformat(text).astimezone().isoformat()}
    except (ValueError, OverflowError):
        problem = f"{text!r} is no duration (90m, 2h, 3d) and no time (2026-11-20T18:00, with Z or +01:00 if not here)"
        raise argparse.ArgumentTypeError(problem) from None


def _watch(parser: argparse.ArgumentParser) -> None:
    again = "look again every so many seconds (2) until Ctrl-C"
    parser.add_argument("--watch", metavar="SECONDS", nargs="?", type=_every, const=2.0, help=again)


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NODE|MACHINE", help="a node's id or a machine's name")
    _watch(parser)


def _hold_arguments(parser: argparse.ArgumentParser) -> None:
    _nodes(parser)
    parser.add_argument("--reason", metavar="TEXT", default="", help="what it is held for")
    until = "let it go by itself after 90m, 2h, 3d, or at a time such as 2026-11-20T18:00"
    parser.add_argument("--until", metavar="TIME|DURATION", type=_until, help=until)
    parser.add_argument("--off", action="store_true", help="end the hold")


def _accept_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("machine", metavar="MACHINE", help="its name")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--off", action="store_true", help="take back an acceptance that was given by this command")


def _ssh_arguments(parser: argparse.ArgumentParser) -> None:
    identity = "the private key (default: nodepool's own where you may read it, else what ssh finds)"
    parser.add_argument("-i", "--identity", metavar="FILE", default="", help=identity)
    parser.add_argument("node", metavar="NODE", help="a node's id")
    parser.add_argument("words", metavar="COMMAND", nargs=argparse.REMAINDER, help="what to run there, with its words")


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "words"), help="the shell; `words` is what its script asks")
    parser.add_argument("kind", nargs="?", default="", help=argparse.SUPPRESS)


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detail", action="store_true", help="more columns")
    parser.add_argument("--label", default="", help="only nodes of this label")
    parser.add_argument("--state", default="", help="only nodes in this state; `deleted` lists those that are gone")
    parser.add_argument("--provider", default="", help="only nodes of this provider")
    _watch(parser)


def _request_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("labels", metavar="LABEL[=N]", nargs="+", type=_label, help="N nodes of a label (one)")
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        nargs="?",
        type=_seconds,
        const=FOREVER,
        help="stay until the nodes are handed over, at most so long, and print how to log in",
    )
    key = "a file of public SSH keys to put on the nodes; may be given again"
    parser.add_argument("--ssh-key", metavar="FILE", action="append", default=[], help=key)
    requestor = "for whom (default: the user who asks)"
    parser.add_argument("--requestor", "--name", metavar="NAME", default="", help=requestor)
    parser.add_argument("--priority", type=int, default=100, help="0 to 999, smaller is served first (default: 100)")


def _release_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("nodes", metavar="NODE", nargs="*", help="a node's id")
    parser.add_argument("--request", metavar="ID", default="", help="give back all nodes of a request, or cancel it")


def _state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", default="", help="only requests in this state, also one that is over")


def _one(name: str, metavar: str, help_: str) -> Callable[[argparse.ArgumentParser], Any]:
    return lambda parser: parser.add_argument(name, metavar=metavar, help=help_)


def _nodes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("nodes", metavar="NODE", nargs="+", help="a node's id")


COMMANDS = {
    "list": Command(
        "list the nodes and what each is at",
        "  nodepool list --label small --state ready\n"
        "  nodepool list --watch 5                  drawn again every 5 seconds\n"
        "  nodepool list --format csv               with the fields of the API, for other programs\n"
        "  nodepool list --state deleted --detail   those that are gone\n",
        "cli_lists:nodes",
        _list_arguments,
    ),
    "show": Command(
        "show a node or a machine: what failed and why, what happens next, seconds per phase",
        "  nodepool show 12\n  nodepool show r1n1 --watch\n  nodepool show 12 --format yaml\n",
        "cli_shows:show",
        _show_arguments,
    ),
    "machine-list": Command("list the machines", "  nodepool machine-list --format json\n", "cli_lists:machines"),
    "machine-inspect": Command(
        "have a broken machine looked at again now",
        "  nodepool machine-inspect r1n1\n",
        "cli_actions:machine_inspect",
        _one("machine", "MACHINE", "its name"),
    ),
    "machine-accept": Command(
        "let all disks of a machine be wiped and the pool use it; shows what it is, and asks",
        "  nodepool machine-accept r1n1\n"
        "  nodepool machine-accept r1n1 --yes\n"
        "  nodepool machine-accept r1n1 --off       not to be used any more, after what runs there\n",
        "cli_accept:machine_accept",
        _accept_arguments,
    ),
    "image-list": Command(
        "list what is published of each image at each provider, and what is being built",
        "  nodepool image-list\n",
        "cli_lists:images",
    ),
    "dib-image-list": Command("list the builds of images", "  nodepool dib-image-list\n", "cli_lists:builds"),
    "dib-image-delete": Command(
        "remove a build of an image",
        "  nodepool dib-image-delete debian-12-0a1b2c3d4e5f60718293a4b5c6d7e8f9\n",
        "cli_actions:dib_image_delete",
        _one("build", "ID", "as dib-image-list shows it"),
    ),
    "image-build": Command(
        "build an image now",
        "  nodepool image-build debian-12\n",
        "cli_actions:image_build",
        _one("image", "IMAGE", "a diskimage of the YAML"),
    ),
    "request": Command(
        "ask for nodes, all of them together or none",
        "  nodepool request small --wait\n"
        "  nodepool request small=3 large --wait 600 --ssh-key ~/.ssh/id_ed25519.pub\n",
        "cli_actions:request",
        _request_arguments,
    ),
    "request-list": Command(
        "list the requests and what they wait for",
        "  nodepool request-list\n  nodepool request-list --state released\n",
        "cli_lists:requests",
        _state,
    ),
    "request-show": Command(
        "show a request, what it waits for, and how to log in to its nodes",
        "  nodepool request-show 3\n",
        "cli_shows:request",
        _one("request", "ID", "a request's id"),
    ),
    "release": Command(
        "give nodes back (their machines are wiped and used again), or a whole request",
        "  nodepool release 12 13\n  nodepool release --request 3\n",
        "cli_actions:release",
        _release_arguments,
    ),
    "hold": Command(
        "keep nodes as they are, whoever gives them back, until somebody has looked at them",
        '  nodepool hold 12 --reason "job 4711 failed oddly" --until 2h\n'
        '  nodepool hold 12 --reason "for the vendor" --until 2026-11-20T18:00\n'
        "  nodepool hold --off 12                   back to its request if that goes on, else wiped\n",
        "cli_actions:hold",
        _hold_arguments,
    ),
    "ssh": Command(
        "log in to a node, which must show the host key that nodepool knows",
        "  nodepool ssh 12\n  nodepool ssh 12 uname -a\n  nodepool ssh -i ~/.ssh/ci 12 'journalctl -b | tail'\n",
        "cli_ssh:ssh",
        _ssh_arguments,
    ),
    "delete": Command(
        "take nodes down, whoever has or holds them",
        "  nodepool delete 12\n",
        "cli_actions:delete",
        _nodes,
    ),
    "explain": Command(
        "say why there are as many nodes of a label as there are",
        "  nodepool explain small\n",
        "cli_shows:explain",
        _one("label", "LABEL", "a label of the YAML"),
    ),
    "thaw": Command(
        "go on after a look: out of the freeze (nodepool status says why), and with what was held back",
        "  nodepool status\n  nodepool thaw\n",
        "cli_actions:thaw",
    ),
    "completion": Command(
        "print a script that lets bash or zsh complete commands, options, nodes, machines and labels",
        "  source <(nodepool completion bash)\n"
        "  nodepool completion bash > /etc/bash_completion.d/nodepool\n"
        '  nodepool completion zsh > "${fpath[1]}/_nodepool"\n',
        "cli_completion:completion",
        _completion_arguments,
    ),
    "status": Command("show how the daemon and its loops are", "  nodepool status --format json\n", "cli_shows:status"),
}
LOCAL = {
    "config-validate": Command(
        "say whether the configuration can be used (needs no daemon)",
        "  nodepool config-validate -c nodepool.yaml -s secure.yaml\n",
        "nodepool.cmd.config_validate",
    ),
    "agent-build": Command(
        "build the agent's kernel and ramdisk (needs no daemon)",
        "  nodepool agent-build\n",
        "nodepool.cmd.agent_build",
    ),
}


if __name__ == "__main__":
    sys.exit(main())

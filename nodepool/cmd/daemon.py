"""`nodepoold`: reads the YAML, takes office over its database, runs the loops, answers people and machines."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from nodepool import __version__
from nodepool.clock import SystemClock
from nodepool.config import ConfigFile
from nodepool.errors import ConfigError, NodepoolError
from nodepool.log import configure

log = logging.getLogger("nodepool.daemon")

M_ARENA_MAX = -8  # malloc.h of glibc
STOP = 4.0  # seconds in which everything is to have ended after SIGTERM

EPILOG = """
examples:
  nodepoold -d -c tools/fake.yaml        the quick start: machines of thin air, READY in seconds
  nodepoold -c /etc/nodepool/nodepool.yaml -s /etc/nodepool/secure.yaml
  nodepool list                          what it has, from another terminal

signals: SIGTERM, SIGINT stop; SIGHUP reads the YAML again at once (a changed file is noticed by itself within 2 s);
SIGUSR2 writes the stack of every thread to stderr.
"""


def main(argv: list[str] | None = None) -> int:
    """Run until told to stop; gives the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        file = ConfigFile(arguments.config, arguments.secure)
        if arguments.foreground:
            configure(arguments.logging, debug=arguments.debug)
            return _run(file, lambda: None)
        return _detached(file, arguments)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 1
    except (NodepoolError, OSError, ValueError) as error:
        print(f"nodepoold: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nodepoold",
        description="Keeps pools of bare-metal machines ready.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-c", dest="config", type=Path, default=Path("/etc/nodepool/nodepool.yaml"), metavar="FILE", help="the YAML")
    add("-s", dest="secure", type=Path, metavar="FILE", help="the secrets (a YAML file that nobody else may read)")
    add("-d", dest="foreground", action="store_true", help="stay in the foreground, log to stdout")
    add("-l", dest="logging", type=Path, metavar="FILE", help="logging configuration (.yaml, .json or .ini)")
    add("--debug", action="store_true", help="say more")
    add("--version", action="version", version=f"nodepoold {__version__}")
    return parser


def _detached(file: ConfigFile, arguments: argparse.Namespace) -> int:
    """Run in the background; the caller waits until the daemon answers, or hears why it does not."""
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        print(
            said.removeprefix("ready").strip() or "nodepoold runs", file=sys.stderr if said != "ready" else sys.stdout
        )
        return 0 if said == "ready" else 1
    os.close(read)
    os.setsid()
    if os.fork():
        os._exit(0)
    said = "nodepoold ended before it was ready"
    try:
        target = file.current.socket.parent / "nodepoold.log"
        target.parent.mkdir(parents=True, exist_ok=True)
        configure(arguments.logging, debug=arguments.debug, target=target)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(null, standard)

        def ready() -> None:
            os.write(write, b"ready")
            os.close(write)

        status = _run(file, ready)
    except Exception as error:
        log.exception("nodepoold ended")
        os.write(write, f"nodepoold: {error or said}".encode())
        os._exit(1)
    os._exit(status)


def _share_memory_between_threads() -> None:
    """Keep glibc from giving each thread an arena of its own, which it hardly ever gives back (mallopt(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def _run(file: ConfigFile, ready: Callable[[], None]) -> int:
    """Take office, run everything, wait for a signal, end everything."""
    from nodepool.cmd.running import Service  # the heavy imports; `nodepoold --help` needs none of them

    _share_memory_between_threads()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    stopping = threading.Event()
    service = Service(file, SystemClock(), on_fatal=stopping.set)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    signal.signal(signal.SIGHUP, lambda *_: service.reload())
    try:
        service.start()
        ready()
        log.info("ready; the API is at %s", file.current.socket)
        stopping.wait()
        log.info("stopping")
    finally:
        began = time.monotonic()
        service.stop(STOP)
        log.info("stopped in %.1f s", time.monotonic() - began)
    return 1 if service.lost_office else 0


if __name__ == "__main__":
    sys.exit(main())

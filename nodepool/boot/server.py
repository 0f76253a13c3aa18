"""A dnsmasq kept running for one network: started, watched, started again, told of changes, ended with the daemon.

Its thread starts it, reads what it logs and waits for its end.  The kernel ends it with that thread (prctl(2),
PR_SET_PDEATHSIG), however the daemon dies.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from ipaddress import IPv6Network
from pathlib import Path

from nodepool.boot import dnsmasq
from nodepool.config.records import MachineSpec, Network
from nodepool.errors import NodepoolError

log = logging.getLogger("nodepool.boot.dnsmasq")

START = 4.0  # seconds until it serves; it needs a fraction of one
END = 2.0  # seconds to end in peace
BACKOFF, BACKOFF_MOST = 1.0, 60.0  # seconds before it is started again
SOUND = 60.0  # seconds of running after which a death counts as the first again
CONF = "dnsmasq.conf"

_SERVING = "started, version"  # it has its sockets when it logs this
_FIRMWARE = (Path("/usr/lib/ipxe"), Path("/usr/share/ipxe"))  # where distributions keep iPXE's files
_SYSTEM_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_IF_INET6 = Path("/proc/thread-self/net/if_inet6")
_PERMANENT, _GLOBAL = 0x80, 0x00  # IFA_F_PERMANENT; the scope that neither is of the link nor of the host


class Dnsmasq:
    """DHCP, TFTP and router advertisements on one network, for the machines given."""

    def __init__(self, network: Network, machines: Sequence[MachineSpec], folder: Path) -> None:
        self.network = network
        self._machines = tuple(machines)
        self._folder = folder
        self._lock = threading.Lock()  # of the files, the process and the three flags
        self._process: subprocess.Popen[bytes] | None = None
        self._serving = False
        self._outdated = False  # it may have read the reservations before they changed
        self._replaced = False  # it was ended by us, to be started with another configuration
        self._settled = threading.Event()  # the first start has succeeded or failed
        self._stopping = threading.Event()
        self._last_line = ""
        self._trouble = ""
        self._thread = threading.Thread(target=self._keep_running, name=f"dnsmasq-{network.name}", daemon=True)

    @property
    def sentence(self) -> str:
        """How it goes."""
        return self._trouble or (
            f"DHCP on {self.network.interface} for {len(self._machines)} machines of network {self.network.name}"
        )

    @property
    def pid(self) -> int:
        """The process that serves now; 0 when there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else 0

    def start(self) -> None:
        """Start it and see it serve.  NodepoolError with the remedy when that cannot be; nothing is left then."""
        self._check()
        self._thread.start()
        if not self._settled.wait(START):
            self.stop()
            raise NodepoolError(f"dnsmasq did not begin to serve network {self.network.name} within {START:g} s")
        if self._trouble:
            self.stop()
            raise NodepoolError(self._trouble)

    def update(self, network: Network, machines: Sequence[MachineSpec]) -> None:
        """Serve with these settings and reservations from now on; does nothing when they are the old ones.

        NodepoolError when they cannot be written; the old ones stay in force then.
        """
        with self._lock:
            before = (self.network, self._machines)
            if (network, tuple(machines)) == before:
                return
            self.network, self._machines = network, tuple(machines)
            try:
                changed = self._write_files()
            except OSError as error:
                self.network, self._machines = before
                raise NodepoolError(
                    f"network {network.name}: cannot write {error.filename or self._folder}: {error.strerror}"
                ) from error
            self._outdated = True
            if not changed and not dnsmasq.stale(self._leases(), self._machines):
                self._tell()
            elif self._process is not None:
                self._replaced = True
                self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """End it; returns when it is gone."""
        with self._lock:
            self._stopping.set()
            self._signal(signal.SIGTERM)
        if self._thread.is_alive():
            self._thread.join(END)
        if self._thread.is_alive():
            with self._lock:
                self._signal(signal.SIGKILL)
            self._thread.join()

    def _check(self) -> None:
        missing = [tool for tool in ("dnsmasq", "setpriv") if _tool(tool) is None]
        if missing:
            packages = " ".join({"dnsmasq": "dnsmasq-base", "setpriv": "util-linux"}[tool] for tool in missing)
            raise NodepoolError(
                f"network {self.network.name} needs {' and '.join(missing)}: apt-get install {packages},"
                " or set `dhcp: external` for it"
            )
        try:
            socket.if_nametoindex(self.network.interface)
        except OSError as error:
            raise NodepoolError(
                f"network {self.network.name}: there is no interface {self.network.interface} here; make it, or name"
                " the right one in `interface:`"
            ) from error

    def _keep_running(self) -> None:
        """The thread: as long as it is not told to stop, dnsmasq runs or is about to."""
        backoff = BACKOFF
        while not self._stopping.is_set():
            began = time.monotonic()
            ended = self._run_once()
            with self._lock:
                replaced, self._replaced = self._replaced, False
            if self._stopping.is_set():
                return
            if replaced:
                continue
            if not self._settled.is_set():
                self._trouble = f"dnsmasq does not serve network {self.network.name}: {self._why(ended)}"
                self._settled.set()
                return
            backoff = BACKOFF if time.monotonic() - began > SOUND else backoff
            self._trouble = (
                f"dnsmasq for network {self.network.name} has ended ({self._why(ended)}); starting it again in"
                f" {backoff:g} s"
            )
            log.warning("%s", self._trouble)
            self._stopping.wait(backoff)
            backoff = min(backoff * 2, BACKOFF_MOST)

    def _run_once(self) -> int:
        """Start it and follow it to its end; its exit status, negative the signal that ended it."""
        with self._lock:
            if self._stopping.is_set():
                return 0
            try:
                process = self._start_process()
            except OSError as error:
                self._last_line = f"{error.filename or 'it'}: {error.strerror}"
                return 1
        assert process.stderr is not None
        with process.stderr as lines:
            for raw in lines:
                self._heard(raw.decode(errors="replace").strip())
        status = process.wait()
        with self._lock:
            self._process, self._serving = None, False
        return status

    def _start_process(self) -> subprocess.Popen[bytes]:
        self._write_files()
        self._drop_stale_leases()
        self._outdated = False
        command = [str(_tool("setpriv")), "--pdeathsig", "TERM", str(_tool("dnsmasq")), "--keep-in-foreground"]
        self._process = subprocess.Popen(
            [*command, f"--conf-file={self._folder.resolve() / CONF}", "--pid-file="],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
        )
        return self._process

    def _heard(self, line: str) -> None:
        log.debug("%s: %s", self.network.name, line)
        self._last_line = line
        if _SERVING in line:
            with self._lock:
                self._serving = True
                if self._outdated:
                    self._tell()
            if self._trouble:
                log.info("dnsmasq serves network %s again", self.network.name)
                self._trouble = ""
            self._settled.set()

    def _tell(self) -> None:
        """Have it read the reservations anew; once it serves, if it does not yet."""
        if self._serving:
            self._outdated = False
            self._signal(signal.SIGHUP)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _why(self, status: int) -> str:
        """What it said last, in words that name the remedy where they are known."""
        if "DHCP" in self._last_line and "in use" in self._last_line:
            return (
                "another DHCP server has port 67 here: stop it (ss -lunp 'sport = :67' names it), or set"
                " `dhcp: external` for the network"
            )
        if "TFTP" in self._last_line and "in use" in self._last_line:
            return "another TFTP server has port 69 here: stop it (ss -lunp 'sport = :69' names it)"
        if status < 0:
            return f"signal {signal.Signals(-status).name}"
        return f"status {status}: {self._last_line.removeprefix('dnsmasq: ') or 'it said nothing'}"

    def _write_files(self) -> bool:
        """Write what it reads; whether its configuration, which it reads only at its start, has changed."""
        tftp = self._folder / dnsmasq.TFTP
        tftp.mkdir(parents=True, exist_ok=True)
        self._copy_firmware(tftp)
        unknown = dnsmasq.unknown_range(self.network, self._machines)
        account = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
        conf = dnsmasq.render_conf(self.network, self._folder, account, unknown, _prefix6(self.network.interface))
        _write(self._folder / dnsmasq.HOSTS, dnsmasq.render_hosts(self._machines).encode())
        return _write(self._folder / CONF, conf.encode())

    def _copy_firmware(self, tftp: Path) -> None:
        for name in (dnsmasq.BIOS_FILE, dnsmasq.UEFI_FILE):
            source = next((place / name for place in _FIRMWARE if (place / name).is_file()), None)
            if source is not None:
                _write(tftp / name, source.read_bytes())
            elif not (tftp / name).exists() and not self._settled.is_set():
                log.warning(
                    "%s is missing: machines of network %s whose network card has no iPXE cannot boot from it;"
                    " apt-get install ipxe",
                    name,
                    self.network.name,
                )

    def _leases(self) -> str:
        try:
            return (self._folder / dnsmasq.LEASES).read_text()
        except FileNotFoundError:
            return ""

    def _drop_stale_leases(self) -> None:
        """Forget leases that stand in the way of a reservation; only while dnsmasq does not run."""
        leases = self._leases()
        gone = dnsmasq.stale(leases, self._machines)
        if gone:
            kept = [line for line in leases.splitlines() if line not in gone]
            _write(self._folder / dnsmasq.LEASES, "".join(f"{line}\n" for line in kept).encode())


def _write(path: Path, content: bytes) -> bool:
    """Write a file at once or not at all; whether it is another than before."""
    if path.is_file() and path.read_bytes() == content:
        return False
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(content)
    draft.replace(path)
    return True


def _tool(name: str) -> str | None:
    """Where a system tool is; daemons may lack the sbin folders in their PATH."""
    return shutil.which(name) or shutil.which(name, path=_SYSTEM_PATH)


def _prefix6(interface: str) -> IPv6Network | None:
    """The first IPv6 prefix that the interface was given for good; none: no routers are advertised."""
    try:
        lines = _IF_INET6.read_text().splitlines()
    except FileNotFoundError:
        return None
    for line in lines:  # address, index, prefix length, scope, flags (hex each), name
        address, _, length, scope, flags, name = line.split()
        if name == interface and int(scope, 16) == _GLOBAL and int(flags, 16) & _PERMANENT and int(length, 16) == 64:
            return IPv6Network((int(address, 16), 64), strict=False)
    return None

"""A place to boot the agent in: a network namespace, a DHCP server and one QEMU machine, all gone afterwards.

Everything is in a namespace and a folder of this object's own.  The machine boots kernel and ramdisk directly, without
firmware's network boot, which is tested elsewhere.
"""

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

ADDRESS = "198.51.100.1"
CLONE_NEWNET = 0x40000000
NEEDED = ("ip", "dnsmasq", "qemu-system-x86_64", "sfdisk", "mke2fs")


def missing():
    """What this system lacks for the lab: a sentence, empty when nothing."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    absent = [name for name in NEEDED if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]
    return f"needs {', '.join(absent)}" if absent else ""


class Lab:
    """One namespace with one machine; use it as a context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespace = f"agent{os.getpid()}"
        self.console = folder / "console.log"
        self.mac = "52:54:00:a9:e7:01"
        self._processes = []

    def __enter__(self):
        self._ip("netns", "add", self.namespace)
        try:
            self._ip("-n", self.namespace, "tuntap", "add", "tap0", "mode", "tap")
            self._ip("-n", self.namespace, "addr", "add", f"{ADDRESS}/24", "dev", "tap0")
            self._ip("-n", self.namespace, "link", "set", "lo", "up")
            self._ip("-n", self.namespace, "link", "set", "tap0", "up")
            self._start(
                *("dnsmasq", "-k", "--conf-file=/dev/null", "--port=0", "--interface=tap0", "--bind-interfaces"),
                *("--dhcp-authoritative", "--no-ping", "--dhcp-range=198.51.100.10,198.51.100.20,1h"),
                *("--leasefile-ro", "--pid-file=", "--user=root"),
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._ip("netns", "del", self.namespace)

    def listen(self):
        """A listening TCP socket inside the namespace; a thread may live in a namespace of its own."""
        made = []

        def inside():
            with Path(f"/run/netns/{self.namespace}").open() as handle:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(handle.fileno(), CLONE_NEWNET):
                    made.append(OSError(ctypes.get_errno(), "setns"))
                    return
            made.append(socket.create_server((ADDRESS, 0)))

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def boot(self, kernel: Path, initrd: Path, words: str, devices):
        """Start a machine as servers are (AHCI, NVMe, an Intel card); `devices` are QEMU options for its disks."""
        return self._start(
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "qemu64", "-m", "512"),
            *("-smp", "1", "-machine", "q35,graphics=off,smm=off", "-nodefaults", "-display", "none", "-no-reboot"),
            *("-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no"),
            *("-device", f"e1000e,netdev=n0,mac={self.mac},romfile="),
            *devices,
            *("-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=r0"),
            *("-serial", f"file:{self.console}", "-kernel", str(kernel), "-initrd", str(initrd)),
            *("-append", f"console=ttyS0 quiet panic=5 {words}"),
        )

    def _start(self, *command):
        with (self.folder / f"{command[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes.append(process)
        return process

    @staticmethod
    def _ip(*words):
        subprocess.run(["ip", *words], check=True)

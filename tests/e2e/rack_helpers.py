"""What the e2e tests of the rack share: a rack to ask, a disk that says when it was booted, a console to listen to."""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

DISK_WORD = b"booted from the disk"
NETWORK_WORD = b"iPXE initialising devices"  # what iPXE says when it is booted, not only there
SCRIPT_WORD = b"boot.ipxe... ok"

# A boot sector that prints the text behind it by the firmware's teletype and halts for good.
_CODE = bytes.fromhex(
    "31c0 8ed8 fc"  # xor ax,ax; mov ds,ax; cld
    "be 187c"  # mov si, 7c18h: the text
    "ac 84c0 7408"  # next: lodsb; test al,al; jz end
    "b40e 31db cd10"  # mov ah,0eh; xor bx,bx; int 10h
    "ebf3 f4 ebfd"  # jmp next; end: hlt; jmp end
)
BOOT_SECTOR = (_CODE + DISK_WORD + b"\r\n\0").ljust(510, b"\0") + b"\x55\xaa"


def rack(*words, timeout=120):
    """Run `nodepool-rack`; the finished process."""
    command = [sys.executable, "-m", "nodepool.cmd.rack", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


class Up:
    """A rack that is up, with rack.json at hand."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.json = json.loads((folder / "rack.json").read_text())
        self.namespace = self.json["namespace"]

    def machine(self, name="n1"):
        return next(machine for machine in self.json["machines"] if machine["name"] == name)

    def status(self, name="n1"):
        done = rack("status", "--dir", self.folder, "--format", "json", "--lines", "200")
        assert done.returncode == 0, done.stderr
        return next(machine for machine in json.loads(done.stdout) if machine["name"] == name)

    def inside(self, *words, **options):
        """Run a program inside the rack's network; its output."""
        command = ["ip", "netns", "exec", self.namespace, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)
        assert done.returncode == 0, f"{words}: {done.stdout} {done.stderr}"
        return done.stdout

    def ipmitool(self, *words, name="n1"):
        place = self.machine(name)["bmc"]
        account = ["-H", place["host"], "-U", place["username"], "-P", place["password"]]
        return self.inside("ipmitool", "-I", "lanplus", "-C", "17", *account, *words)

    def console(self, name="n1"):
        return Console(Path(self.machine(name)["console"]).with_name("console.sock"))


class Console:
    """What a machine says on its serial port from now on."""

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            self._socket.connect(f"/proc/self/fd/{descriptor}/{path.name}")
        finally:
            os.close(descriptor)
        self.heard = b""

    def wait_for(self, word, seconds=60):
        """Listen until `word` was said."""
        self._socket.settimeout(seconds)
        while word not in self.heard:
            heard = self._socket.recv(4096)
            assert heard, f"the power went off before {word!r}: {self.heard[-500:]!r}"
            self.heard += heard

    def wait_for_end(self, seconds=60):
        """Listen until the power is off."""
        self._socket.settimeout(seconds)
        while heard := self._socket.recv(4096):
            self.heard += heard

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()


def put_boot_sector(up, name):
    """Make the machine's disk one that says that it was booted."""
    with Path(up.machine(name)["disks"][0]["path"]).open("r+b") as disk:
        disk.write(BOOT_SECTOR)


@contextmanager
def network_boot(up, folder, script):
    """A DHCP and TFTP server inside the rack's network that hands out one iPXE script; gone at the end."""
    (folder / "boot.ipxe").write_text(script)
    (folder / "dnsmasq.conf").write_text(
        "port=0\ninterface=br0\nbind-interfaces\ndhcp-authoritative\nno-ping\nuser=root\n"
        f"dhcp-range=198.51.100.11,198.51.100.30,10m\ndhcp-leasefile={folder}/leases\n"
        f"enable-ra\ndhcp-range=fd42::,ra-only,64,10m\nenable-tftp\ntftp-root={folder}\ndhcp-boot=boot.ipxe\n"
    )
    server = subprocess.Popen(
        ["ip", "netns", "exec", up.namespace, "dnsmasq", "-k", "-C", str(folder / "dnsmasq.conf"), "--log-facility=-"],
        stderr=subprocess.PIPE,
    )
    try:
        for line in server.stderr:
            if b"router advertisement on" in line or b"IPv6" in line:
                break
        yield
    finally:
        server.kill()
        server.wait()
        server.stderr.close()

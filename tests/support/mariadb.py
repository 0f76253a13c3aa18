"""A MariaDB of the tests' own: Debian's package, in a folder, on a private socket, gone afterwards."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

SERVER = shutil.which("mariadbd") or "/usr/sbin/mariadbd"
MEMORY = Path("/dev/shm")  # its data there: what it makes and drops costs no disk
ROOM = 512 * 2**20  # bytes that it may come to


@contextmanager
def running():
    """Gives a function that makes an empty database and tells its SQLAlchemy URL."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
    with tempfile.TemporaryDirectory(prefix="npm", dir=MEMORY if roomy else None) as name:
        folder = Path(name)
        data, socket, log = folder / "data", folder / "sock", folder / "log"
        user = ["--user=root"] if os.geteuid() == 0 else []
        install = [
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
        ]
        subprocess.run([*install, "--skip-test-db", *user], check=True, capture_output=True)
        command = [SERVER, "--no-defaults", f"--datadir={data}", f"--socket={socket}", "--skip-networking", *user]
        small = ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M", f"--pid-file={folder / 'pid'}"]
        with log.open("wb") as out:
            server = subprocess.Popen([*command, *small], stdout=out, stderr=out)
        try:
            _wait_until_it_answers(server, socket, log)
            yield lambda: _database(socket)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)


def _client(socket, *words):
    command = ["mariadb", "--no-defaults", f"--socket={socket}", "-u", "root", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _wait_until_it_answers(server, socket, log):
    end = time.monotonic() + 30
    while _client(socket, "-e", "SELECT 1").returncode:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)  # it tells nobody when it is up


def _database(socket):
    name = f"np{time.monotonic_ns()}"
    made = _client(socket, "-e", f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
    assert made.returncode == 0, made.stderr
    return f"mysql+pymysql://root@localhost/{name}?unix_socket={socket}"

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
    """Gives a server; called, it makes an empty database and tells its SQLAlchemy URL."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
    with tempfile.TemporaryDirectory(prefix="npm", dir=MEMORY if roomy else None) as name:
        server = Server(Path(name))
        server.start()
        try:
            yield server
        finally:
            server.stop()


class Server:
    """mariadbd over one folder; it may be stopped and started again."""

    def __init__(self, folder):
        self.socket, self._log = folder / "sock", folder / "log"
        user = ["--user=root"] if os.geteuid() == 0 else []
        data = f"--datadir={folder / 'data'}"
        install = ["mariadb-install-db", "--no-defaults", data, "--auth-root-authentication-method=normal"]
        subprocess.run([*install, "--skip-test-db", *user], check=True, capture_output=True)
        place = [data, f"--socket={self.socket}", f"--pid-file={folder / 'pid'}", "--skip-networking"]
        small = ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M"]
        self._command = [SERVER, "--no-defaults", *place, *small, *user]
        self._process = None

    def __call__(self):
        name = f"np{time.monotonic_ns()}"
        made = self._client("-e", f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        assert made.returncode == 0, made.stderr
        return f"mysql+pymysql://root@localhost/{name}?unix_socket={self.socket}"

    def start(self):
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(self._command, stdout=out, stderr=out)
        end = time.monotonic() + 30
        while self._client("-e", "SELECT 1").returncode:
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.1)  # it tells nobody when it is up

    def stop(self):
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)

    def _client(self, *words):
        command = ["mariadb", "--no-defaults", f"--socket={self.socket}", "-u", "root", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

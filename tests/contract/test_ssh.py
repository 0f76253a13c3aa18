"""Logging in, over a real SSH server: only the proven host key counts, and each way to fail has its own name."""

import asyncio
import threading
from contextlib import contextmanager
from pathlib import Path

import asyncssh
import pytest

from nodepool.errors import Code, ConfigError, Temporary
from nodepool.ssh import SshShell, Target, ensure_key


@contextmanager
def system(home, allowed):
    """A system with a host key of its own that lets `allowed` in and runs what it is told in `home`."""
    host_key = asyncssh.generate_private_key("ssh-ed25519")
    (home / "allowed").write_text(allowed + "\n")
    loop = asyncio.new_event_loop()
    ready, port = threading.Event(), []

    async def run(process):
        command = ["sh", "-c", process.command]
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(*command, cwd=home, stdin=pipe, stdout=pipe, stderr=pipe)
        out, err = await child.communicate((await process.stdin.read()).encode())
        process.stdout.write(out.decode())
        process.stderr.write(err.decode())
        process.exit(child.returncode)

    async def serve():
        keys = str(home / "allowed")
        server = await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[host_key], authorized_client_keys=keys, process_factory=run
        )
        port.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stop.wait()
        server.close()
        await server.wait_closed()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: (loop.run_until_complete(serve()), loop.close()))
    thread.start()
    ready.wait(10)
    try:
        public = " ".join(host_key.export_public_key("openssh").decode().split()[:2])
        yield Target("127.0.0.1", port[0], "root", public)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


@pytest.fixture
def key(tmp_path):
    return tmp_path / "keys" / "id_ed25519"


@pytest.fixture
def shell(key):
    ensure_key(key)
    return SshShell(key)


def test_the_boot_id_is_read_over_a_connection_that_proved_the_host_key(shell, key, tmp_path):
    with system(tmp_path, ensure_key(key)) as target:
        assert shell.boot_id(target) == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_another_system_at_the_address_is_told_by_its_host_key_and_never_logged_in_to(shell, key, tmp_path):
    (tmp_path / "other").mkdir()
    with (
        system(tmp_path, ensure_key(key)) as target,
        system(tmp_path / "other", ensure_key(key)) as other,
        pytest.raises(Temporary, match="another system") as caught,
    ):
        shell.boot_id(Target(other.address, other.port, "root", target.host_key))
    assert caught.value.code is Code.LOGIN_HOST_KEY


def test_a_system_that_does_not_know_our_key_is_told(shell, tmp_path):
    foreign = ensure_key(tmp_path / "foreign")
    with (
        system(tmp_path, foreign) as target,
        pytest.raises(Temporary, match="does not let nodepool's key in") as caught,
    ):
        shell.boot_id(target)
    assert caught.value.code is Code.LOGIN_AUTH


def test_nobody_there_is_to_be_expected_while_a_system_starts(shell, key, tmp_path):
    with system(tmp_path, ensure_key(key)) as target:
        pass
    with pytest.raises(Temporary, match="no SSH on 127") as caught:
        shell.boot_id(target)
    assert caught.value.code is Code.LOGIN_SILENT


def test_keys_are_added_once_however_often_they_are_put_on(shell, key, tmp_path):
    keys = ("ssh-ed25519 AAAAone me", "ssh-ed25519 AAAAtwo 'quoted $HOME'")
    with system(tmp_path, ensure_key(key)) as target:
        shell.authorize(target, keys)
        shell.authorize(target, keys)
    file = tmp_path / ".ssh" / "authorized_keys"
    assert file.read_text().splitlines() == list(keys)
    assert file.stat().st_mode & 0o077 == 0


def test_a_key_is_made_when_there_is_none_and_kept_when_there_is_one(key):
    public = ensure_key(key)
    assert public.startswith("ssh-ed25519 ")
    assert key.stat().st_mode & 0o077 == 0
    assert ensure_key(key) == public


@pytest.mark.parametrize("content", [b"", b"no key at all", b"-----BEGIN OPENSSH PRIVATE KEY-----\n"])
def test_a_key_that_cannot_be_used_is_a_problem_of_the_configuration(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be used"):
        ensure_key(path)

"""`nodepool ssh`: the real ssh against a real SSH server, whose host key is the one that nodepool knows, or another."""

import asyncio
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import asyncssh
import pytest
from api_pool import served

from nodepool.model import Node

NODEPOOL = [sys.executable, "-c", "import sys; from nodepool.cmd.cli import main; sys.exit(main(sys.argv[1:]))"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Private keys by name: of the host, of nodepool, of a user; and their files."""
    folder = tmp_path_factory.mktemp("keys")
    made = {name: asyncssh.generate_private_key("ssh-ed25519") for name in ("host", "other", "nodepool", "user")}
    for name, key in made.items():
        write(key, folder / name)
    return folder, made


def write(key, path):
    """As ssh wants private keys to be: closed to others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)
    key.write_private_key(path)


@contextmanager
def ssh_server(host_key, *authorized):
    """A server that takes these keys, and answers a command with its words and its user; gives its port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def handle(process):
        process.stdout.write(f"{process.get_extra_info('username')} ran {process.command}\n")
        process.exit(7 if process.command == "false" else 0)

    async def begin():
        known = "".join(key.export_public_key().decode() for key in authorized)
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[host_key],
            authorized_client_keys=asyncssh.import_authorized_keys(known),
            process_factory=handle,
        )

    server = asyncio.run_coroutine_threadsafe(begin(), loop).result(20)
    try:
        yield server.get_port()
    finally:

        async def end():
            server.close()
            await server.wait_closed()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(end(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


@pytest.fixture
def pool(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    with served(tmp_path) as pool:
        monkeypatch.setenv("NODEPOOL_URL", str(pool.path))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        pool.until("ready")
        yield pool


def at(pool, port, host_key):
    """Let node 1 be behind `port`, with this host key."""
    public = host_key.export_public_key().decode().strip()
    pool.store.write(
        lambda tx: tx.put(replace(tx.get(Node, 1), address="127.0.0.1", port=port, host_key=public, username="root"))
    )


def nodepool(*words, timeout=60):
    return subprocess.run([*NODEPOOL, *words], capture_output=True, text=True, timeout=timeout, check=False)


def test_a_command_runs_on_the_node_with_the_users_own_key(pool, keys):
    folder, key = keys
    with ssh_server(key["host"], key["user"]) as port:
        at(pool, port, key["host"])
        done = nodepool("ssh", "-i", str(folder / "user"), "1", "uname", "-a")
    assert (done.returncode, done.stdout) == (0, "root ran uname -a\n"), done.stderr


def test_the_exit_status_is_that_of_the_command(pool, keys):
    folder, key = keys
    with ssh_server(key["host"], key["user"]) as port:
        at(pool, port, key["host"])
        assert nodepool("ssh", "-i", str(folder / "user"), "1", "--", "false").returncode == 7


def test_nodepools_own_key_is_used_where_it_may_be_read(pool, keys, monkeypatch, tmp_path):
    _, key = keys
    monkeypatch.chdir(tmp_path)  # the daemon's folder too: it is this process
    write(key["nodepool"], tmp_path / pool.current().config.providers["lab"].ssh.key)
    with ssh_server(key["host"], key["nodepool"]) as port:
        at(pool, port, key["host"])
        done = nodepool("ssh", "1", "id")
    assert (done.returncode, done.stdout) == (0, "root ran id\n"), done.stderr


def test_who_has_the_address_and_another_host_key_is_turned_away(pool, keys):
    folder, key = keys
    with ssh_server(key["other"], key["user"]) as port:
        at(pool, port, key["host"])
        done = nodepool("ssh", "-i", str(folder / "user"), "1", "id")
    assert (done.returncode, done.stdout) == (255, "")
    assert "Host key verification failed" in done.stderr


def test_nothing_is_left_behind(pool, keys, tmp_path, monkeypatch):
    folder, key = keys
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with ssh_server(key["host"], key["user"]) as port:
        at(pool, port, key["host"])
        nodepool("ssh", "-i", str(folder / "user"), "1", "id")
    assert list((tmp_path / "home").iterdir()) == []


def test_a_node_without_a_system_says_so(pool):
    nodepool("delete", "1")
    done = nodepool("ssh", "1")
    assert (done.returncode, done.stderr) == (5, "nodepool: node 1 is deleting: there is no system to log in to\n")


def test_a_host_key_that_is_none_is_refused(pool):
    pool.store.write(lambda tx: tx.put(replace(tx.get(Node, 1), host_key='ssh-ed25519 AAAA"$(reboot)')))
    done = nodepool("ssh", "1")
    assert (done.returncode, "the host key of node 1 is damaged" in done.stderr) == (5, True)


def test_without_ssh_it_says_what_to_install(pool, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "home"))
    done = nodepool("ssh", "1")
    assert (done.returncode, "install openssh-client" in done.stderr) == (1, True)

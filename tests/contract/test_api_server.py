"""The Unix socket: who may connect, what is in its way, how it ends."""

import os
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_pool import Pool, beside, served

from nodepool.api.server import ApiServer
from nodepool.errors import Refused


@pytest.fixture
def pool(tmp_path):
    pool = Pool(tmp_path)
    yield pool
    pool.server.stop()
    pool.store.close()


def test_only_owner_and_group_may_connect(pool):
    pool.server.start()
    assert stat.S_IMODE(pool.path.stat().st_mode) == 0o660


def test_the_socket_is_gone_after_a_stop_and_there_again_after_a_start(pool):
    pool.server.start()
    pool.server.stop()
    assert not pool.path.exists()
    pool.server.start()
    assert pool.get("/nodes").status == 200


def test_its_folder_is_made(pool, tmp_path):
    server = ApiServer(pool.server._app, tmp_path / "var" / "run" / "np.sock")
    server.start()
    server.stop()
    assert (tmp_path / "var" / "run").is_dir()


def test_the_socket_that_a_dead_daemon_has_left_is_replaced(pool):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(pool.path))
    pool.server.start()
    assert pool.get("/nodes").status == 200


def test_a_socket_in_use_is_refused_and_left_alone(pool):
    pool.server.start()
    with pytest.raises(Refused, match=rf"another daemon \(process {os.getpid()}\) answers on .*: stop it, or set"):
        ApiServer(pool.server._app, pool.path).start()
    assert pool.get("/nodes").status == 200


def test_a_file_in_the_way_is_refused_and_left_alone(pool):
    pool.path.write_text("precious")
    with pytest.raises(Refused, match="is in the way and is no socket"):
        pool.server.start()
    assert pool.path.read_text() == "precious"


def test_a_path_that_the_kernel_does_not_take_is_refused_plainly(pool, tmp_path):
    path = tmp_path / ("x" * 107)
    with pytest.raises(Refused, match=r"bytes; the kernel takes 107: shorten it"):
        ApiServer(pool.server._app, path).start()


def test_a_folder_that_cannot_be_made_is_refused_plainly(pool, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot listen on"):
        ApiServer(pool.server._app, tmp_path / "file" / "np.sock").start()


def test_a_socket_that_somebody_else_has_put_there_is_left(pool):
    pool.server.start()
    pool.path.unlink()
    pool.path.write_text("another's")
    pool.server.stop()
    assert pool.path.read_text() == "another's"


def test_a_stop_ends_those_who_wait_with_what_is_known(pool):
    pool.server.start()
    number = pool.request("small")
    looks = pool.looks
    with beside(lambda: pool.get(f"/requests/{number}?wait=60")) as answers:
        pool.wait_for_looks(looks + 1)
        began = time.monotonic()
        pool.server.stop()
        took = time.monotonic() - began
    assert (answers[0].status, answers[0].body["state"]) == (200, "requested")
    assert took < 2


def test_a_stop_does_not_wait_for_those_who_say_nothing(pool):
    pool.server.start()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(pool.path))
        began = time.monotonic()
        pool.server.stop()
        assert time.monotonic() - began < 2


def test_many_ask_at_once(tmp_path):
    with served(tmp_path) as pool, ThreadPoolExecutor(32) as many:
        answers = list(many.map(lambda _: pool.post("/requests", {"nodes": [{"label": "small"}]}), range(64)))
        assert sorted(int(answer.body["id"]) for answer in answers) == list(range(1, 65))

"""The boot listener over real HTTP: with a door of the test's own, and with the agents' desk over a real store."""

import asyncio
import http.client
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from nodepool.boot import listener as module
from nodepool.boot.listener import Listener
from nodepool.boot.protocol import MAX_BODY, parse, render
from nodepool.clock import SystemClock
from nodepool.config.records import Config, Interface, MachineSpec, Provider
from nodepool.door import Expected, Reply
from nodepool.errors import StoreUnavailable
from nodepool.model import Boot, BootState, Machine, MachineState, Operation, OperationState, Status
from nodepool.plan.catalog import catalog
from nodepool.service.agents import Desk
from nodepool.store import open_store

MAC = "52:54:00:00:00:01"
TOKEN, NONCE, OTHER_NONCE = "a" * 32, "b" * 32, "c" * 32


class Door:
    """The other side: answers from memory, and can be told to be without its store."""

    def __init__(self):
        self.orders = {}  # boot -> lines of an order
        self.work = set()
        self.gone = False
        self.fetchable = {"agent/vmlinuz", "agent/nothing", "images/abc.raw"}
        self.polls = self.looks = self.batches = 0
        self.poisoned = ""

    def expected_boot(self, mac):
        self._store()
        return Expected("n1", TOKEN) if mac == MAC else None

    def hello(self, lines, peer):
        self._store()
        return Reply(200, {"boot": "1", "seen": peer})

    def poll(self, lines, peer):
        self._store()
        self.polls += 1
        if lines.get("boot") == self.poisoned:
            raise RuntimeError("a row that breaks")
        if lines.get("nonce") == "foreign":
            return Reply(403, {"error": "belongs to no boot that is up"})
        if lines.get("state") == "running":
            return Reply(200, {"continue": "1"})
        return Reply(200, self.orders.get(lines["boot"], {"wait": "0"}))

    def together(self, calls):
        self.batches += 1
        return [getattr(self, call.verb)(call.lines, call.peer) for call in calls]

    def may_fetch(self, path, peer):
        self._store()
        return path in self.fetchable

    def changed(self):
        self._store()
        self.looks += 1
        work, self.work = self.work, set()
        return work

    def order(self, boot, **lines):
        self.orders[boot] = lines
        self.work.add(int(boot))

    def _store(self):
        if self.gone:
            raise StoreUnavailable("the database does not answer")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Served:
    """A listener on loopback, and a client for it."""

    def __init__(self, door, folder):
        self.folders = {"agent": folder / "agent", "images": folder / "images"}
        for path in self.folders.values():
            path.mkdir(exist_ok=True)
        self.listener = Listener(door, lambda: self.folders)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.listener.start()
        assert self.listener.serve([("127.0.0.1", self.port)]) == {}

    def ask(self, method, path, body=None, headers=None):
        """Status, headers in lower case, and body; the path goes out as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def say(self, verb, **lines):
        """Status and lines of an answer to an agent."""
        status, _, body = self.ask("POST", f"/agent/v1/{verb}", render(lines))
        return status, parse(body)


@pytest.fixture
def door():
    return Door()


@pytest.fixture
def served(door, tmp_path):
    up = Served(door, tmp_path)
    yield up
    up.listener.stop()


@contextmanager
def later(action, *arguments, **more):
    """Run something in a thread; its result is a list that has it at the end."""
    result = []
    thread = threading.Thread(target=lambda: result.append(action(*arguments, **more)))
    thread.start()
    yield result
    thread.join(30)


def until(condition, seconds=10):
    """Wait for what another thread brings about and announces to nobody."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never came"
        time.sleep(0.005)


# Scripts


def test_the_first_script_names_the_address_at_which_the_machine_reached_us(served):
    status, _, body = served.ask("GET", "/boot.ipxe", headers={"Host": "elsewhere.example"})
    assert status == 200
    assert f"chain --replace {served.url}/boot/${{netX/mac}}".encode() in body


@pytest.mark.parametrize("form", [MAC, MAC.replace(":", "%3A"), MAC.upper(), MAC.replace(":", "-")])
def test_an_expected_machine_gets_the_agent_however_its_mac_is_written(served, form):
    status, _, body = served.ask("GET", f"/boot/{form}")
    assert status == 200
    assert f"nodepool.token={TOKEN} nodepool.mac={MAC} ".encode() in body
    assert f"{served.url}/files/agent/vmlinuz".encode() in body


def test_any_other_machine_gets_its_disk(served):
    status, _, body = served.ask("GET", "/boot/52:54:00:00:00:02")
    assert status == 200
    assert b"sanboot" in body
    assert b"token" not in body


def test_what_is_no_mac_is_refused(served):
    status, _, body = served.ask("GET", "/boot/nonsense")
    assert (status, parse(body)) == (400, {"error": "'nonsense' is no MAC address"})


# Messages


def test_a_hello_reaches_the_door_with_the_address_it_came_from(served):
    assert served.say("hello", token=TOKEN) == (200, {"boot": "1", "seen": "127.0.0.1"})


def test_a_report_is_answered_at_once(served):
    began = time.monotonic()
    assert served.say("poll", boot="1", nonce="x", operation="5", state="running") == (200, {"continue": "1"})
    assert time.monotonic() - began < 1


def test_a_refused_poll_is_not_held(served):
    assert served.say("poll", boot="1", nonce="foreign") == (403, {"error": "belongs to no boot that is up"})


def test_malformed_lines_get_a_sentence(served):
    status, _, body = served.ask("POST", "/agent/v1/hello", b"version=1\nversion=1\n")
    assert (status, parse(body)) == (400, {"error": "line 2: version comes twice"})


@pytest.mark.parametrize("encoding", ["length", "chunked"])
def test_a_body_above_64_kib_is_refused(served, encoding):
    big = b"a=" + b"x" * MAX_BODY
    body = big if encoding == "length" else iter([big[:1000], big[1000:]])
    status, _, answer = served.ask("POST", "/agent/v1/poll", body)
    assert status == 413
    assert f"{MAX_BODY} bytes" in parse(answer)["error"]


def test_a_body_of_just_64_kib_is_taken(served):
    body = b"boot=1\nstate=running\noperation=5\nerror=" + b"x" * (MAX_BODY - 40) + b"\n"
    assert len(body) == MAX_BODY
    assert served.ask("POST", "/agent/v1/poll", body)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/agent/v1/poll", 405),
        ("POST", "/agent/v2/hello", 404),
        ("GET", "/", 404),
        ("DELETE", "/boot.ipxe", 405),
    ],
)
def test_what_is_not_served_is_an_error_with_a_sentence(served, method, path, status):
    found, _, body = served.ask(method, path)
    assert found == status
    assert parse(body)["error"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", f"/boot/{MAC}", None),
        ("POST", "/agent/v1/hello", b"a=b\n"),
        ("POST", "/agent/v1/poll", b"boot=1\n"),
        ("GET", "/files/agent/vmlinuz", None),
    ],
)
def test_without_the_store_all_are_asked_to_come_again(served, door, method, path, body):
    door.gone = True
    status, _, answer = served.ask(method, path, body)
    assert status == 503
    assert parse(answer) == {"error": "nodepool's database does not answer now", "wait": "5"}


def test_an_agent_whose_call_breaks_the_door_spoils_it_for_nobody_else(served, door, caplog):
    door.poisoned = "6"
    held = door.together
    entered, go_on = threading.Event(), threading.Event()

    def slow(calls):
        if not entered.is_set():
            entered.set()
            go_on.wait(10)
        return held(calls)

    door.together = slow
    with later(served.say, "poll", boot="5", operation="1", state="running") as first:
        entered.wait(10)
        with (
            later(served.say, "poll", boot="6", operation="1", state="running") as bad,
            later(served.say, "poll", boot="7", operation="1", state="running") as good,
        ):
            until(lambda: len(served.listener._calls._calls) == 2)
            go_on.set()
    assert first == [(200, {"continue": "1"})]
    assert good == [(200, {"continue": "1"})]
    assert bad == [(500, {"error": "nodepool failed to answer; its log says more"})]
    assert "each alone now" in caplog.text


# Held polls


def test_a_held_poll_is_answered_within_a_second_after_its_order_appears(served, door):
    with later(served.say, "poll", boot="1", nonce="x") as answer:
        until(lambda: door.polls == 1)
        assert served.listener.held == 1
        ordered = time.monotonic()
        door.order("1", operation="9", kind="erase")
        served.listener.wake()
    assert answer == [(200, {"operation": "9", "kind": "erase"})]
    assert time.monotonic() - ordered < 1
    assert served.listener.held == 0


def test_an_order_that_appears_while_the_door_is_being_asked_is_not_missed(served, door):
    answered = door.poll

    def poll(lines, peer):
        reply = answered(lines, peer)
        if door.polls == 1:
            door.order("1", operation="9", kind="erase")
            served.listener.wake()
            until(lambda: door.looks == 1)
        return reply

    door.poll = poll
    began = time.monotonic()
    assert served.say("poll", boot="1", nonce="x") == (200, {"operation": "9", "kind": "erase"})
    assert time.monotonic() - began < 2


def test_a_wake_up_for_others_lets_a_poll_wait_on_without_asking_again(served, door):
    with later(served.say, "poll", boot="1", nonce="x"):
        until(lambda: door.polls == 1)
        door.order("2", operation="9", kind="erase")
        served.listener.wake()
        until(lambda: door.looks == 1)
        assert (door.polls, served.listener.held) == (1, 1)
        door.order("1", operation="10", kind="erase")
        served.listener.wake()


def test_a_poll_for_which_nothing_comes_is_answered_in_time(served, door, monkeypatch):
    monkeypatch.setattr(module, "HOLD", 0.3)
    began = time.monotonic()
    assert served.say("poll", boot="1", nonce="x") == (200, {"wait": "0"})
    assert 0.3 <= time.monotonic() - began < 1


def test_wake_ups_survive_a_while_without_the_store(served, door, caplog):
    with later(served.say, "poll", boot="1", nonce="x") as answer:
        until(lambda: door.polls == 1)
        door.order("1", operation="9", kind="erase")
        door.gone = True
        served.listener.wake()
        until(lambda: "looked after later" in caplog.text)
        door.gone = False
    assert answer == [(200, {"operation": "9", "kind": "erase"})]


def test_many_wake_ups_are_one_look(served, door):
    for _ in range(1000):
        served.listener.wake()
    until(lambda: door.looks >= 1)
    assert door.looks <= 3


def test_hundreds_of_polls_are_held_in_one_thread_and_only_the_one_meant_is_asked_again(served, door):
    many = 500

    async def story():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def poll(boot):
                async with session.post(
                    f"{served.url}/agent/v1/poll", data=render({"boot": boot, "nonce": "x"})
                ) as got:
                    return parse(await got.read())

            threads = threading.active_count()
            polls = [asyncio.create_task(poll(str(number))) for number in range(many)]
            await asyncio.to_thread(until, lambda: door.polls == many)
            assert threading.active_count() - threads <= module.DOOR_THREADS + 1  # the waiting one of this test
            began = time.monotonic()
            door.order("250", operation="9", kind="erase")
            served.listener.wake()
            assert await asyncio.wait_for(polls[250], 5) == {"operation": "9", "kind": "erase"}
            took = time.monotonic() - began
            assert door.polls == many + 1
            assert served.listener.held == many - 1
            await asyncio.to_thread(served.listener.stop)
            rest = await asyncio.gather(*polls[:250], *polls[251:])
            return took, rest

    took, rest = asyncio.run(story())
    assert took < 1
    assert rest == [{"wait": "0"}] * (many - 1)
    assert door.batches < many


def test_the_listener_stops_within_two_seconds_and_answers_those_it_held(door, tmp_path):
    up = Served(door, tmp_path)
    with later(up.say, "poll", boot="1", nonce="x") as answer:
        until(lambda: up.listener.held == 1 and door.polls == 1)
        began = time.monotonic()
        up.listener.stop()
        assert time.monotonic() - began < 2
    assert answer == [(200, {"wait": "0"})]
    with pytest.raises(ConnectionRefusedError):
        up.ask("GET", "/boot.ipxe")


def test_a_listener_that_was_stopped_takes_wake_ups_quietly(door, tmp_path):
    up = Served(door, tmp_path)
    up.listener.stop()
    up.listener.wake()
    up.listener.stop()
    assert up.listener.held == 0


# Files


@pytest.fixture
def files(served, tmp_path):
    """A kernel and an image of odd bytes."""
    content = bytes(range(256)) * 4000
    (tmp_path / "agent" / "vmlinuz").write_bytes(content)
    (tmp_path / "images" / "abc.raw").write_bytes(content)
    (tmp_path / "images" / "def.raw").write_bytes(b"not for you")
    (tmp_path / "secret").write_bytes(b"secret")
    return content


def test_a_file_is_served_whole_with_its_length_and_as_plain_bytes(served, files):
    status, headers, body = served.ask("GET", "/files/images/abc.raw")
    assert (status, body) == (200, files)
    assert headers["content-length"] == str(len(files))
    assert headers["content-type"] == "application/octet-stream"
    assert "content-encoding" not in headers


def test_a_head_tells_the_length_alone(served, files):
    status, headers, body = served.ask("HEAD", "/files/agent/vmlinuz")
    assert (status, headers["content-length"], body) == (200, str(len(files)), b"")


@pytest.mark.parametrize(
    ("wanted", "first", "end"),
    [("bytes=1000-1999", 1000, 2000), ("bytes=1023990-", 1023990, None), ("bytes=-7", -7, None)],
)
def test_a_range_is_served(served, files, wanted, first, end):
    status, headers, body = served.ask("GET", "/files/images/abc.raw", headers={"Range": wanted})
    assert (status, body) == (206, files[first:end])
    assert headers["content-range"].endswith(f"/{len(files)}")


def test_a_range_behind_the_end_is_refused(served, files):
    status, headers, _ = served.ask("GET", "/files/images/abc.raw", headers={"Range": "bytes=99999999-"})
    assert (status, headers["content-range"]) == (416, f"bytes */{len(files)}")


def test_a_file_that_the_door_does_not_allow_is_refused(served, files):
    status, _, body = served.ask("GET", "/files/images/def.raw")
    assert (status, parse(body)) == (403, {"error": "this file is not for this machine now"})


def test_whether_a_file_exists_is_not_told_to_who_may_not_have_it(served, files):
    assert served.ask("GET", "/files/images/nothing.raw")[0] == 403


def test_an_allowed_file_that_is_not_there_is_not_found_and_said_in_the_log(served, files, caplog):
    status, _, body = served.ask("GET", "/files/agent/nothing")
    assert status == 404
    assert parse(body)["error"]
    assert "there is no" in caplog.text


@pytest.mark.parametrize(
    "path",
    [
        "/files/images/../secret",
        "/files/images/%2e%2e/secret",
        "/files/images/..%2fsecret",
        "/files/images/%2e%2e%2fsecret",
        "/files/../secret",
        "/files//etc/passwd",
        "/files/agent//etc/passwd",
        "/files/agent/sub/../../secret",
        "/files/agent/..%5csecret",
        "/files/agent/%00",
        "/files/agent/.",
        "/files/agent/",
        "/files/agent",
        "/files/images/",
        "/files/",
        "/files/other/x",
    ],
)
def test_nothing_outside_of_the_two_folders_and_no_listing_is_served(served, files, door, path):
    door.may_fetch = lambda path, peer: True
    status, _, body = served.ask("GET", path)
    assert status in {400, 404}
    assert b"secret" not in body
    assert b"vmlinuz" not in body


# Places


def test_a_port_in_use_is_said_with_the_remedy_and_the_other_places_are_served(served, door, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = taken.getsockname()
        refused = served.listener.serve([place, ("127.0.0.1", served.port)])
    assert list(refused) == [place]
    assert f"port {place[1]} of 127.0.0.1 is in use by another program: stop it" in refused[place]
    assert "`port:`" in refused[place]
    assert served.ask("GET", "/boot.ipxe")[0] == 200


def test_an_address_that_this_machine_lacks_is_said_with_the_remedy(served):
    place = ("198.51.100.1", served.port)
    assert "no interface has the address 198.51.100.1" in served.listener.serve([place])[place]


def test_places_come_and_go_while_it_runs(served):
    other = free_port()
    assert served.listener.serve([("127.0.0.1", other)]) == {}
    with pytest.raises(ConnectionRefusedError):
        served.ask("GET", "/boot.ipxe")
    served.port = other
    assert served.ask("GET", "/boot.ipxe")[0] == 200


# With the desk and a store

SPEC = MachineSpec("n1", "rack1", interfaces=(Interface(MAC, "198.51.100.11"),))
CONFIG = Config("generation", providers={"rack1": Provider("rack1", "metal", "lab", machines=(SPEC,))})
HELLO = {"version": "1", "token": TOKEN, "nonce": NONCE, "agent_boot_id": "x", "nic.0.mac": MAC, "fact.cpus": "2"}


class Pool:
    """One machine with an expected boot, a desk over its rows, a listener before the desk."""

    def __init__(self, folder: Path):
        self.store = open_store(f"sqlite:///{folder}/nodepool.db", SystemClock())
        index = catalog(CONFIG)
        self.desk = Desk(self.store, lambda: index)
        self.up = Served(self.desk, folder)
        self.store.wake.append(self.up.listener.wake)
        self.boot = self.store.write(self._mint)

    def _mint(self, tx):
        machine = tx.add(
            Machine(0, "n1", "rack1", MachineState.CLEANING, since=tx.now, enrolled_at=tx.now, accepted=True)
        )
        boot = tx.add(Boot(0, machine.id, TOKEN, BootState.EXPECTED, tx.now))
        tx.put(Machine(machine.id, "n1", "rack1", MachineState.CLEANING, tx.now, tx.now, boot_id=boot.id))
        return boot

    def order(self, kind, **params):
        def write(tx):
            return tx.add(
                Operation(
                    0, self.boot.machine_id, kind, OperationState.PENDING, tx.now, boot_id=self.boot.id, by_agent=True,
                    params=params,
                )
            )  # fmt: skip

        return self.store.write(write)

    def get(self, cls, key):
        return self.store.read(lambda tx: tx.get(cls, key))

    def close(self):
        self.up.listener.stop()
        self.store.close()


@pytest.fixture
def pool(tmp_path):
    made = Pool(tmp_path)
    yield made
    made.close()


def test_a_boot_from_script_to_report(pool):
    assert f"nodepool.token={TOKEN}".encode() in pool.up.ask("GET", f"/boot/{MAC}")[2]
    assert pool.up.say("hello", **HELLO) == (200, {"boot": str(pool.boot.id)})
    assert pool.get(Boot, pool.boot.id).state is BootState.UP
    assert pool.get(Machine, pool.boot.machine_id).facts["fact.cpus"] == "2"
    order = pool.order("erase", level="default")
    me = {"boot": str(pool.boot.id), "nonce": NONCE}
    assert pool.up.say("poll", **me) == (200, {"operation": str(order.id), "kind": "erase", "level": "default"})
    report = {**me, "operation": str(order.id)}
    assert pool.up.say("poll", **report, state="running", done="5", total="9", phase="erase") == (
        200,
        {"continue": "1"},
    )
    assert pool.get(Operation, order.id).done == 5
    with later(pool.up.say, "poll", **report, state="done", **{"result.disks": "vda"}) as last:
        until(lambda: pool.get(Operation, order.id).state is OperationState.DONE)
    assert last[0][0] == 200
    assert pool.get(Operation, order.id).result == {"disks": "vda"}


def test_a_spent_token_gives_no_second_script_and_the_same_agent_may_repeat_its_hello(pool):
    assert pool.up.say("hello", **HELLO)[0] == 200
    assert pool.up.say("hello", **HELLO) == (200, {"boot": str(pool.boot.id)})
    assert b"sanboot" in pool.up.ask("GET", f"/boot/{MAC}")[2]


def test_a_second_claimant_is_refused_and_fails_the_boot_for_the_first_too(pool):
    assert pool.up.say("hello", **HELLO)[0] == 200
    status, lines = pool.up.say("hello", **{**HELLO, "nonce": OTHER_NONCE})
    assert status == 409
    assert "a second machine (127.0.0.1) used the boot token" in lines["error"]
    assert pool.get(Boot, pool.boot.id).state is BootState.FAILED
    assert pool.up.say("poll", boot=str(pool.boot.id), nonce=NONCE)[0] == 403


def test_a_foreign_token_is_refused(pool):
    status, lines = pool.up.say("hello", **{**HELLO, "token": "d" * 32})
    assert status == 403
    assert "not known here" in lines["error"]
    assert pool.get(Boot, pool.boot.id).state is BootState.EXPECTED


def test_a_machine_with_other_network_cards_is_refused_and_the_token_stays_unspent(pool):
    status, lines = pool.up.say("hello", **{**HELLO, "nic.0.mac": "52:54:00:00:00:77"})
    assert status == 403
    assert "none of the network cards of n1" in lines["error"]
    assert pool.get(Boot, pool.boot.id).state is BootState.EXPECTED


def test_an_agent_of_another_version_is_told_to_reboot(pool):
    status, lines = pool.up.say("hello", **{**HELLO, "version": "0"})
    assert status == 426
    assert "reboot" in lines["error"]


def test_a_held_poll_has_its_order_within_a_second_after_the_commit(pool):
    pool.up.say("hello", **HELLO)
    with later(pool.up.say, "poll", boot=str(pool.boot.id), nonce=NONCE) as answer:
        until(lambda: pool.up.listener.held == 1)
        began = time.monotonic()
        order = pool.order("erase", level="default")
    assert answer == [(200, {"operation": str(order.id), "kind": "erase", "level": "default"})]
    assert time.monotonic() - began < 1


def test_an_image_is_for_the_machine_that_is_told_to_write_it(pool, tmp_path):
    (tmp_path / "images" / "abc.raw").write_bytes(b"image")
    assert pool.up.ask("GET", "/files/images/abc.raw")[0] == 403
    pool.up.say("hello", **HELLO)
    pool.order("write", url=f"{pool.up.url}/files/images/abc.raw")
    assert pool.up.ask("GET", "/files/images/abc.raw")[::2] == (200, b"image")
    assert pool.up.ask("GET", "/files/images/def.raw")[0] == 403


def test_a_machine_that_nobody_declared_boots_its_disk_and_is_listed(pool):
    status, _, body = pool.up.ask("GET", "/boot/52:54:00:00:00:99")
    assert status == 200
    assert b"sanboot" in body
    assert "52:54:00:00:00:99" in pool.get(Status, "unknown-machines").data

"""What the native IPMI back-end promises besides: sessions, packets, threads."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nodepool.drivers.power import Auth, Bmc, Busy, OutcomeUnknown, Unreachable, Withheld
from nodepool.drivers.power.ipmi import NativeIpmi
from nodepool.errors import Permanent, Temporary
from nodepool.rack.bmc import Bmc as RackBmc
from nodepool.rack.bmc import Faults, MemoryMachine, User, running, serve


@pytest.fixture
def endpoint():
    with running(1) as endpoints:
        yield endpoints[0]


@pytest.fixture
def client(endpoint):  # closed before its BMC is
    opened = NativeIpmi()
    yield opened
    opened.close()


@pytest.fixture
def bmc(endpoint):
    return Bmc(f"ipmi://{endpoint.host}:{endpoint.port}", "admin", "admin")


def lose_answers_to_commands(endpoint):
    """From its next power command on, the BMC carries out and does not answer."""
    carry_out = endpoint.bmc.chassis.control

    async def control(action, lag=0.0):
        endpoint.bmc.faults = Faults(silent="answer")
        return await carry_out(action, lag)

    endpoint.bmc.chassis.control = control


def wait_for(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        threading.Event().wait(0.01)


# ---- login ----


def test_a_wrong_password_is_tried_once_and_its_slot_given_back(client, endpoint):
    with pytest.raises(Auth):
        client.power(Bmc(f"ipmi://{endpoint.host}:{endpoint.port}", "admin", "wrong"))
    assert endpoint.bmc.received["rakp1"] == 1
    wait_for(lambda: endpoint.bmc.open_sessions == 0)


def test_an_unknown_user_is_asked_for_once_per_role(client, endpoint):
    with pytest.raises(Auth):
        client.power(Bmc(f"ipmi://{endpoint.host}:{endpoint.port}", "nobody", "admin"))
    assert endpoint.bmc.received["rakp1"] == 2
    assert endpoint.bmc.open_sessions == 0


def test_suite_3_is_taken_when_the_proof_of_suite_17_is_empty(client, endpoint, bmc):
    endpoint.bmc.faults = Faults(zero_code=True)
    with pytest.raises(Permanent, match="cipher suite"):  # this BMC proves nothing on suite 3 either
        client.power(bmc)
    assert endpoint.bmc.received["rakp1"] == 2


def test_what_a_bmc_wants_at_login_is_remembered(client, endpoint, bmc):
    endpoint.bmc.faults = Faults(suites=(3,))
    client.power(bmc)
    endpoint.bmc.forget_sessions()
    client.power(bmc)
    assert endpoint.bmc.received["open"] == 3  # 17, 3, and 3 again


def test_a_bmc_that_wants_another_suite_than_last_time_is_followed(client, endpoint, bmc):
    endpoint.bmc.faults = Faults(suites=(3,))
    assert client.info(bmc)["suite"] == "3"
    endpoint.bmc.forget_sessions()
    endpoint.bmc.faults = Faults(suites=(17,))
    assert client.info(bmc)["suite"] == "17"


def test_a_bmc_with_a_key_of_its_own_is_told_apart(client, endpoint, bmc):
    endpoint.bmc.sessions.kg = b"k" * 20
    with pytest.raises(Auth, match="K_g"):
        client.power(bmc)


@pytest.mark.parametrize("stage", ["setpriv", "cmd"])
def test_a_session_that_falls_silent_is_closed(client, endpoint, bmc, stage):
    endpoint.bmc.faults = Faults(silent=stage)
    with pytest.raises(Unreachable):
        client.power(bmc, deadline=0.3)
    endpoint.bmc.faults = Faults()
    assert client.power(bmc) is False
    assert endpoint.bmc.received["open"] == 2


# ---- sessions ----


def test_a_session_is_kept_for_the_next_call(client, endpoint, bmc):
    for _ in range(5):
        client.power(bmc)
    assert endpoint.bmc.received["open"] == 1
    assert endpoint.bmc.open_sessions == 1


def test_a_session_that_nobody_needs_is_closed(endpoint, bmc):
    client = NativeIpmi(keep=0.05)
    try:
        client.power(bmc)
        wait_for(lambda: endpoint.bmc.open_sessions == 0)
        assert endpoint.bmc.received["close"] == 1
        assert client.power(bmc) is False
    finally:
        client.close()


def test_many_callers_of_one_bmc_share_one_session():
    with running(1, slots=1) as (endpoint,), ThreadPoolExecutor(16) as threads:
        client = NativeIpmi()
        bmc = Bmc(f"ipmi://{endpoint.host}:{endpoint.port}", "admin", "admin")
        assert not any(threads.map(lambda _: client.power(bmc), range(64)))
        assert endpoint.bmc.received["open"] == 1
        client.close()


def test_other_credentials_get_another_session():
    users = {"admin": User("admin"), "other": User("other")}
    with running(1, users=users, slots=1) as (endpoint,):
        client = NativeIpmi()
        address = f"ipmi://{endpoint.host}:{endpoint.port}"
        client.power(Bmc(address, "admin", "admin"))
        client.power(Bmc(address, "other", "other"))
        with pytest.raises(Auth):
            client.power(Bmc(address, "other", "wrong"))
        client.close()


def test_a_bmc_that_forgot_the_kept_session_is_logged_in_to_again(client, endpoint, bmc):
    client.power(bmc)
    endpoint.bmc.forget_sessions()
    client.set_power(bmc, on=True)
    assert list(endpoint.bmc.actions) == ["on"]
    endpoint.bmc.forget_sessions()
    client.set_boot(bmc, "pxe", uefi=False)
    endpoint.bmc.forget_sessions()
    client.identify(bmc, 1)
    assert client.power(bmc) is True


def test_closing_leaves_no_session_and_no_thread():
    before = set(threading.enumerate())
    with running(8) as endpoints:
        rack = set(threading.enumerate())
        client = NativeIpmi()
        for endpoint in endpoints:
            client.power(Bmc(f"ipmi://{endpoint.host}:{endpoint.port}", "admin", "admin"))
        client.close()
        assert set(threading.enumerate()) == rack
        assert [endpoint.bmc.open_sessions for endpoint in endpoints] == [0] * 8
    assert set(threading.enumerate()) == before


def test_closing_ends_the_calls_that_wait(endpoint, bmc):
    endpoint.bmc.faults = Faults(silent="all")
    client = NativeIpmi()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.power, bmc, deadline=60)
        wait_for(lambda: client.counts.sent > 0)
        began = time.monotonic()
        client.close()
        with pytest.raises(Temporary, match="nodepool stops"):
            waiting.result()
    assert time.monotonic() - began < 1


# ---- outcomes ----


def test_stopping_after_a_command_was_sent_says_that_its_outcome_is_unknown(endpoint, bmc):
    lose_answers_to_commands(endpoint)
    client = NativeIpmi()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.set_power, bmc, on=True, deadline=60)
        wait_for(lambda: endpoint.bmc.actions)
        client.close()
        with pytest.raises(OutcomeUnknown, match="nodepool stops"):
            waiting.result()


def test_a_caller_that_has_to_wait_its_turn_too_long_is_told_so(client, endpoint, bmc):
    endpoint.bmc.faults = Faults(silent="all")
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.power, bmc, deadline=0.8)
        wait_for(lambda: client.counts.sent > 0)
        with pytest.raises(Busy, match="an earlier command"):
            client.power(bmc, deadline=0.2)
        assert isinstance(first.exception(), Unreachable)


# ---- may_send ----


def test_nothing_is_sent_when_it_may_not_be(endpoint, bmc):
    client = NativeIpmi(may_send=lambda: False)
    with pytest.raises(Withheld, match="may not command") as caught:
        client.set_power(bmc, on=True)
    client.close()
    assert isinstance(caught.value, Temporary)
    assert client.counts.sent == 0
    assert not endpoint.bmc.received


def test_it_is_asked_before_each_packet_resends_included(endpoint, bmc):
    endpoint.bmc.faults = Faults(silent="open")
    answers = iter([True, True])
    client = NativeIpmi(may_send=lambda: next(answers, False))
    with pytest.raises(Withheld):
        client.power(bmc)
    client.close()
    assert endpoint.bmc.received["open"] == 2


def test_a_command_that_may_not_be_repeated_has_an_unknown_outcome(endpoint, bmc):
    lose_answers_to_commands(endpoint)
    client = NativeIpmi(may_send=lambda: not endpoint.bmc.actions)
    with pytest.raises(OutcomeUnknown, match="may send nothing more"):
        client.set_power(bmc, on=True)
    client.close()
    assert list(endpoint.bmc.actions) == ["on"]
    assert endpoint.bmc.received["control"] == 1


# ---- packets from anybody ----


def test_packets_that_nobody_asked_for_are_counted_and_change_nothing(client, endpoint, bmc):
    client.power(bmc)
    endpoint.bmc.faults = Faults(duplicate=1.0)
    for _ in range(10):
        assert client.power(bmc) is False
    wait_for(lambda: client.counts.strays >= 9)


@pytest.mark.parametrize(("host", "written"), [("127.0.0.1", "localhost"), ("::1", "[::1]")])
def test_names_and_ipv6_addresses_are_understood(client, host, written):
    async def ask() -> bool:
        server = await serve([(RackBmc(MemoryMachine(is_on=True), {"admin": User("admin")}), host, 0)])
        address = f"ipmi://{written}:{server.addresses[0][1]}"
        try:
            return await asyncio.to_thread(client.power, Bmc(address, "admin", "admin"))
        finally:
            await server.close()

    assert asyncio.run(ask()) is True

"""Whatever arrives on the IPMI socket, the parser gives a packet or ProtocolError, and nothing else."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.ciphers import algorithms
from hypothesis import given
from hypothesis import strategies as st

from nodepool.drivers.power import rakp, rmcp

KEYS = {number: rmcp.Keys(suite, b"k" * suite.size, algorithms.AES(b"e" * 16)) for number, suite in rmcp.SUITES.items()}
SESSION = b"\x01\x02\x03\x04"
suites = st.sampled_from(sorted(rmcp.SUITES))
datagrams = st.one_of(
    st.binary(max_size=120),
    st.builds(lambda rest: rmcp.HEADER + b"\x06" + rest, st.binary(max_size=120)),
    st.builds(rmcp.hello, st.sampled_from((rmcp.OPEN_ANSWER, rmcp.RAKP2, rmcp.RAKP4, 0, 1, 2)), st.binary(max_size=90)),
)


def take(datagram: bytes, keys: rmcp.Keys) -> None:
    """Go as far as the client would."""
    packet = rmcp.parse(datagram)
    if isinstance(packet, rmcp.Sealed):
        rmcp.parse_answer(rmcp.unseal(keys, packet))


def signed(keys: rmcp.Keys, head: bytes) -> bytes:
    """What a BMC that has gone mad may send: any bytes, rightly signed."""
    return rmcp.HEADER + head + keys.suite.hmac(keys.sign, head)[: keys.suite.icv]


@given(datagrams, suites)
def test_random_packets_raise_nothing_but_protocol_error(datagram, suite):
    with suppress(rmcp.ProtocolError):
        take(datagram, KEYS[suite])


@given(suites, st.binary(max_size=64), st.integers(0, 2**32 - 1), st.data())
def test_altered_packets_are_refused(suite, payload, sequence, data):
    good = rmcp.seal(KEYS[suite], SESSION, sequence, payload)
    place = data.draw(st.integers(4, len(good) - 1))
    bad = bytearray(good)
    bad[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(rmcp.ProtocolError):
        take(bytes(bad), KEYS[suite])


@given(suites, st.binary(max_size=64), st.data())
def test_shortened_packets_are_refused(suite, payload, data):
    good = rmcp.seal(KEYS[suite], SESSION, 1, payload)
    with pytest.raises(rmcp.ProtocolError):
        take(good[: data.draw(st.integers(0, len(good) - 1))], KEYS[suite])


@given(suites, st.integers(0, 255), st.integers(0, 80), st.binary(max_size=96))
def test_rightly_signed_nonsense_raises_nothing_but_protocol_error(suite, flags, size, rest):
    head = bytes((6, flags)) + SESSION + bytes(4) + size.to_bytes(2, "little") + rest
    with suppress(rmcp.ProtocolError):
        take(signed(KEYS[suite], head), KEYS[suite])


@given(suites, st.binary(max_size=80))
def test_rightly_sealed_nonsense_raises_nothing_but_protocol_error(suite, payload):
    with suppress(rmcp.ProtocolError):
        take(rmcp.seal(KEYS[suite], SESSION, 1, payload), KEYS[suite])


@given(suites, st.binary(max_size=200), st.sampled_from((rmcp.MESSAGE, rmcp.CONSOLE)))
def test_what_was_sealed_is_unsealed(suite, payload, kind):
    packet = rmcp.parse(rmcp.seal(KEYS[suite], SESSION, 7, payload, kind))
    assert isinstance(packet, rmcp.Sealed)
    assert (packet.kind, packet.session, packet.sequence) == (kind, SESSION, 7)
    assert rmcp.unseal(KEYS[suite], packet) == payload


@given(st.integers(0, 255), st.integers(0, 63), st.integers(0, 31), st.integers(0, 255), st.binary(max_size=40))
def test_answers_are_read_as_they_were_written(command, sequence, half, completion, data):
    payload = bytes((0x81, (half * 2 + 1) << 2, 0, 0x20, sequence << 2, command, completion)) + data + b"\0"
    assert rmcp.parse_answer(payload) == rmcp.Answer(half * 2, command, sequence, completion, data)


def log_in(handshake: rakp.Handshake, answers: list[tuple[bool, bytes]]) -> None:
    """Go through a login that is answered so: whether the status is good, and what follows the session id."""
    steps = (
        (rmcp.OPEN_ANSWER, handshake.open_request, handshake.opened),
        (rmcp.RAKP2, handshake.rakp1, handshake.rakp2),
        (rmcp.RAKP4, handshake.rakp3, handshake.rakp4),
    )
    for (kind, make, judge), (good, rest) in zip(steps, answers, strict=True):
        make()
        packet = rmcp.parse(rmcp.hello(kind, bytes((handshake.tag, 0 if good else 1, 0, 0)) + SESSION + rest))
        assert isinstance(packet, rmcp.Hello)
        assert handshake.fits(packet)
        judge(packet)


@given(suites, st.lists(st.tuples(st.booleans(), st.binary(max_size=90)), min_size=3, max_size=3), st.booleans())
def test_a_login_is_refused_whatever_is_answered(suite, answers, opened):
    if opened:  # get past the first answer, so that the others are read at all
        algorithms_ = b"".join(bytes((0, 0, 0, 8, number, 0, 0, 0)) for number in rmcp.SUITES[suite].algorithms)
        answers[0] = (True, b"\x09\x09\x09\x09" + algorithms_)
    handshake = rakp.Handshake(rmcp.SUITES[suite], rakp.Account(b"user", b"password"), 4, SESSION)
    with pytest.raises((rakp.LoginRefused, rmcp.ProtocolError)):  # nobody guesses an HMAC
        log_in(handshake, answers)


# ---- the replay window ----


@given(st.lists(st.integers(1, 100), max_size=60))
def test_no_number_is_taken_twice(numbers):
    window = rmcp.ReplayWindow()
    taken = [number for number in numbers if window.accept(number)]
    assert len(taken) == len(set(taken))


@given(st.permutations(range(1, 33)))
def test_32_packets_are_taken_in_any_order(numbers):
    window = rmcp.ReplayWindow()
    assert all(window.accept(number) for number in numbers)


@given(st.integers(33, 2**32 - 1), st.integers(32, 2**32 - 1))
def test_numbers_that_left_the_window_are_refused(highest, behind):
    window = rmcp.ReplayWindow()
    window.accept(highest)
    if behind < highest:
        assert not window.accept(highest - behind)


def test_a_bmc_that_does_not_count_is_put_up_with():
    window = rmcp.ReplayWindow()
    assert window.accept(0)
    assert window.accept(0)


def test_each_packet_has_another_initialisation_vector():
    payload = os.urandom(16)
    assert rmcp.seal(KEYS[17], SESSION, 1, payload) != rmcp.seal(KEYS[17], SESSION, 1, payload)

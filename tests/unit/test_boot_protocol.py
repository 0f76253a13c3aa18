"""The agent's protocol: what one end writes, the other reads; what is malformed is refused in a sentence."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepool.boot.protocol import MAX_BODY, BadMessage, parse, render

KEYS = st.text("abcdefghijklmnopqrstuvwxyz0123456789._-", min_size=1, max_size=30)
VALUES = st.text(st.characters(codec="utf-8"), max_size=60)


@given(st.dictionaries(KEYS, VALUES, max_size=30))
def test_what_is_rendered_is_parsed_back(lines):
    assert parse(render(lines)) == lines


@given(st.dictionaries(KEYS, VALUES, max_size=30))
def test_a_rendered_body_has_one_plain_line_per_key(lines):
    body = render(lines)
    assert body.count(b"\n") == len(lines)
    assert body.isascii()
    assert not any(forbidden in body for forbidden in (b" ", b"'", b'"', b"$", b"`", b"\\", b";", b"\r"))


@given(st.binary(max_size=300))
def test_noise_is_read_or_refused_and_nothing_else(noise):
    with suppress(BadMessage):
        assert isinstance(parse(noise), dict)


def test_the_last_line_may_lack_its_end():
    assert parse(b"boot=7\nnonce=ab") == {"boot": "7", "nonce": "ab"}


def test_an_empty_body_has_no_lines():
    assert parse(b"") == {}


def test_a_value_may_be_empty_and_hold_encoded_equals_signs():
    assert parse(b"a=\nb=x%3Dy%0A\n") == {"a": "", "b": "x=y\n"}


def test_bytes_of_firmware_that_are_no_utf8_do_not_keep_a_machine_out():
    assert parse(b"fact.vendor=M%FCller\n") == {"fact.vendor": "M�ller"}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"boot=1\nboot=2\n", "line 2: boot comes twice"),
        (b"boot=1\nnonsense\n", "line 2 has no '='"),
        (b"boot=1\n\nnonce=2\n", "line 2 has no '='"),
        (b"Boot=1\n", "line 1: the key 'Boot'"),
        (b"=1\n", "line 1: the key ''"),
        (b"a=b c\n", "line 1: the value of a is not percent-encoded"),
        (b"a=b\r\n", "line 1: the value of a"),
        (b"a=%4\n", "line 1: the value of a"),
        (b"a=b=c\n", "line 1: the value of a"),
        (b"a=\xc3\xa4\n", "byte 2 of the message is not ASCII"),
        (b"a=" + b"x" * MAX_BODY, f"at most {MAX_BODY}"),
    ],
)
def test_a_malformed_body_is_refused_with_its_place(body, why):
    with pytest.raises(BadMessage, match=r"^.+$") as refused:
        parse(body)
    assert why in str(refused.value)


@pytest.mark.parametrize("lines", [{"Bad": "x"}, {"": "x"}, {"a b": "x"}, {"a": "x" * MAX_BODY}])
def test_nothing_is_rendered_that_could_not_be_read(lines):
    with pytest.raises(BadMessage):
        render(lines)

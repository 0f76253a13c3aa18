"""The small language that chooses machines."""

import pytest

from nodepool.config.records import MachineSpec
from nodepool.config.where import WhereError, facts, parse

MACHINE = {"name": "r1n1", "rack": "r1", "firmware": "uefi", "class": "small", "note": "a b"}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("class == small", True),
        ("class==small", True),
        ("class != small", False),
        ("class == small and rack != r2", True),
        ("class == small and rack == r2", False),
        ("class == large or rack == r1", True),
        ("class == large or rack == r1 and firmware == bios", False),
        ("(class == large or rack == r1) and firmware == uefi", True),
        ("not class == large", True),
        ("not (class == small and rack == r1)", False),
        ("rack in (r1, r2)", True),
        ("rack not in (r1, r2)", False),
        ("note == 'a b'", True),
        ('note == "a b"', True),
        ("gpus == 4", False),
        ("gpus != 4", True),
        ("gpus == ''", True),
        ("name == r1n1", True),
    ],
)
def test_an_expression_chooses(text, matches):
    assert parse(text).matches(MACHINE) is matches


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found the end of the expression"),
        ("class", "allowed: ==, !=, in or not in"),
        ("class = small", "found '= small'"),
        ("class == 'small", "found"),
        ("class == small rack == r1", "found 'rack'; allowed: and, or, or the end"),
        ("class in ()", "a word"),
        ("(" * 30 + "a == b" + ")" * 30, "found deeper nesting; allowed: 20 levels"),
        ("not " * 30 + "a == b", "found deeper nesting"),
        ("a" * 2000, "found 2000 characters; allowed: 1000"),
        ("__import__('os').system('id') == 0", "found '('"),
    ],
)
def test_what_cannot_be_read_says_what_is_allowed(text, words):
    with pytest.raises(WhereError) as caught:
        parse(text)
    assert words in str(caught.value)


def test_an_expression_tells_what_it_looks_at():
    assert parse("class == a or rack == b or class == c").names == ("class", "rack")


def test_a_machine_can_be_chosen_by_its_own_entries():
    machine = MachineSpec("m1", "p", rack="r1", firmware="uefi", properties={"class": "big"})
    assert facts(machine) == {"name": "m1", "rack": "r1", "firmware": "uefi", "class": "big"}

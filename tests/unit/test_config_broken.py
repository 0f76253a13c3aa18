"""Files that people have broken; the head of each says what must be told: `# expect: line N: WORDS … WORDS`."""

import re
from pathlib import Path

import pytest

from nodepool.config import load
from nodepool.errors import ConfigError

BROKEN = sorted((Path(__file__).parent / "broken").glob("*.yaml"))


@pytest.fixture
def secure(tmp_path):
    path = tmp_path / "secure.yaml"
    path.write_text("credentials:\n  - {name: rack1, username: admin, password: hunter2}\n")
    path.chmod(0o600)
    return path


def problems_of(path, secure):
    with pytest.raises(ConfigError) as caught:
        load(path, secure, {})
    return caught.value.problems


def expectations(path):
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    matches = (re.fullmatch(r"# expect: line (\d+): (.*)", line) for line in lines)
    return [(int(match[1]), match[2].split(" … ")) for match in matches if match]


def test_there_are_thirty_broken_files():
    assert len(BROKEN) >= 30


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_a_broken_file_gives_all_its_problems_and_no_others(path, secure):
    problems = list(problems_of(path, secure))
    for line, words in expectations(path):
        fits = [p for p in problems if p.startswith(f"{path}:{line}: ") and all(word in p for word in words)]
        assert fits, f"line {line}: {words} is not among\n" + "\n".join(problems)
        problems.remove(fits[0])
    assert problems == []


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_every_problem_is_one_line_that_says_what_was_found_and_what_is_allowed(path, secure):
    for problem in problems_of(path, secure):
        assert "\n" not in problem
        assert re.match(re.escape(str(path)) + r":\d+: .*found .*; allowed: .", problem)


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_no_problem_shows_a_password(path, secure):
    assert "hunter2" not in "\n".join(problems_of(path, secure))


def test_five_mistakes_in_one_file_are_told_in_one_run(tmp_path):
    path = tmp_path / "five.yaml"
    path.write_text(
        "version: 1\n"
        "labels:\n"
        "  - {name: a, min-ready: many}\n"
        "  - {name: b, min-redy: 1}\n"
        "providers:\n"
        "  - name: p\n"
        "    driver: fake\n"
        "    count: lots\n"
        "    pools:\n"
        "      - {name: main, max-servers: -1, labels: [{name: c, diskimage: debian}]}\n"
        "diskimages: [{name: debian, elements: [debian-minimal]}]\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(path, env={})
    lines = [int(problem.removeprefix(f"{path}:").split(":")[0]) for problem in caught.value.problems]
    assert lines == [3, 4, 8, 10, 10]

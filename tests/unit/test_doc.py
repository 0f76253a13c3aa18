"""The documents do not drift from the code."""

import re
import runpy
from pathlib import Path

import pytest
from test_floors import ASIDE, FLOORS

from nodepool.cmd.cli import COMMANDS, LOCAL
from nodepool.errors import Code

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = sorted([ROOT / "README.rst", *(ROOT / "doc").rglob("*.rst")])
FOLDERS = {"nodepool", "doc", "tests", "tools", ".ci"}
FILES = {"Makefile", "README.rst", "bindep.txt", "nodepool.yaml.sample", "pyproject.toml", "setup.py"}


def literals(text):
    return re.findall(r"``([^`]+)``", text)


def named(document):
    """The project's own paths among what a document sets in ``literals``; words after a path are arguments."""
    for literal in literals(document.read_text()):
        path = literal.split()[0]
        if path in FILES or ("/" in path and path.split("/")[0] in FOLDERS):
            yield path


def rows(document, first):
    """The rows of a simple table whose first cell fits `first`, as the words of their first two cells."""
    for line in document.read_text().splitlines():
        if match := re.match(rf"({first}) {{2,}}(\S+)", line):
            yield match[1], match[2]


def test_the_picture_of_the_lifecycles_is_the_one_that_the_tables_give():
    draw = runpy.run_path(str(ROOT / "tools" / "draw_lifecycles.py"))["draw"]
    assert (ROOT / "doc" / "lifecycle.svg").read_text() == draw(), "stale: run make doc"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_that_a_document_names_exists(document):
    assert [path for path in named(document) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_links_to_exists(document):
    links = re.findall(r"<([\w./-]+\.(?:rst|svg))>`_", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_that_a_document_names_exists(document):
    text = document.read_text()
    words = re.findall(r"(?:``|\$ |^    )nodepool ([a-z][a-z-]*)", text, re.MULTILINE)
    assert set(words) <= COMMANDS.keys() | LOCAL.keys()


def test_every_failure_code_is_explained_with_whose_fault_it_is():
    told = dict(rows(ROOT / "doc" / "operations.rst", r"``[a-z-]+``"))
    assert {str(code): told.get(f"``{code}``") for code in Code} == {str(code): str(code.fault) for code in Code}


def test_the_floors_are_those_that_are_enforced():
    told, floor = {}, None
    for line in (ROOT / "doc" / "architecture.rst").read_text().splitlines():
        if match := re.match(r"([0-6]|aside| {5}) {2,}``nodepool/", line):
            floor = match[1].strip() or floor
            told |= {Path(path).stem: floor for path in literals(line) if path.startswith("nodepool/")}
    assert told == {room: str(level) for room, level in FLOORS.items()} | dict.fromkeys(ASIDE, "aside")


def test_every_decision_is_in_the_index():
    index = (ROOT / "doc" / "adr" / "index.rst").read_text()
    assert [path.name for path in sorted((ROOT / "doc" / "adr").glob("0*.rst")) if f"<{path.name}>" not in index] == []


def test_every_document_is_named_in_the_readme():
    told = set(literals((ROOT / "README.rst").read_text()))
    assert {f"doc/{path.name}" for path in (ROOT / "doc").glob("*.rst")} <= told

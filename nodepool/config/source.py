"""A YAML file read for people who make mistakes: plain data, and the line that every piece of it stands on.

Scalars stay text, and what they mean is decided by the schema that expects a number or a duration there.  So a release
`22.04` stays `22.04`, a MAC of digits is no sexagesimal number and `no` is a name where a name is wanted.  Only a plain
`null`, `~` or nothing at all is None.  Collections become dict and list; anchors, aliases and merges (`<<`) are kept,
duplicate keys and tags outside YAML's core are problems.

`%(NODEPOOL_X)` anywhere in a value is replaced by the environment's variable, as in Zuul's Nodepool;
`%(NODEPOOL_X:-word)` gives a word for a variable that is unset or empty, as the shell does.  Other variables are never
looked at.  Unlike there, substitution happens after parsing: a value cannot add keys, and comments are left alone.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nodepool.config.compose import DEEPEST, Node, TooDeep, compose
from nodepool.config.problems import Document, Place

_VARIABLE = re.compile(r"%\((NODEPOOL_\w*)(?::-([^)]*))?\)", re.ASCII)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufeff\uff00-\ufffd\U00010000-\U0010ffff]")

LARGEST_FILE = 32 << 20
SPARE_NODES = 100_000  # beyond one node per character: what aliases may add


def read(path: Path, env: Mapping[str, str], *, secret: bool = False) -> Document:
    """Read one file; what is wrong with it is in the document's `problems`, and its `data` is then None.

    A `secret` file has to belong to us or root and to be closed to group and others; nothing of its content is ever
    quoted.
    """
    doc = Document(str(path), secret=secret)
    doc.content = _content(doc, path)
    if doc.content is None or (text := _decode(doc, doc.content)) is None:
        return doc
    try:
        root = compose(text)
        if root is None:
            return doc
        doc.data = _Builder(doc, env, SPARE_NODES + len(text)).build(root, ())
    except yaml.MarkedYAMLError as error:
        _explain_syntax(doc, error, text)
    except yaml.YAMLError:
        doc.problem_at(1, (), "found something that is not YAML")
    except TooDeep as error:
        doc.problem_at(
            error.line, (), f"found aliases or levels without end; allowed: {DEEPEST} levels, aliases that add little"
        )
    return doc


def _content(doc: Document, path: Path) -> bytes | None:
    try:
        # Without O_NONBLOCK a FIFO would keep us waiting for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        doc.problem_at(0, (), "found no such file; allowed: the path of a YAML file")
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        doc.problem_at(0, (), f"cannot be read: {reason}; allowed: a file that this user may read")
        return None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            doc.problem_at(0, (), f"found {kind}; allowed: a plain file")
        elif status.st_size > LARGEST_FILE:
            doc.problem_at(0, (), f"found {status.st_size} bytes; allowed: {LARGEST_FILE}")
        elif not doc.secret or _is_private(doc, path, status):
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read(LARGEST_FILE)
    except OSError as error:
        doc.problem_at(0, (), f"cannot be read: {error.strerror}; allowed: a file that this user may read")
    finally:
        os.close(handle)
    return None


def _is_private(doc: Document, path: Path, status: os.stat_result) -> bool:
    if status.st_uid not in (os.geteuid(), 0):
        doc.problem_at(
            0,
            (),
            f"refused: it holds secrets and belongs to user {status.st_uid}; allowed: root's or this user's;"
            f" remedy: chown {os.geteuid()} {path}",
        )
        return False
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        doc.problem_at(
            0,
            (),
            f"refused: it holds secrets and others may use it (mode {mode:04o}); allowed: mode 0600;"
            f" remedy: chmod 600 {path}",
        )
        return False
    return True


def _decode(doc: Document, content: bytes) -> str | None:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = "an odd byte" if doc.secret else f"byte 0x{content[error.start]:02x}"
        doc.problem_at(line, (), f"found {byte}; allowed: text in UTF-8")
        return None
    if odd := _UNPRINTABLE.search(text):
        line = text.count("\n", 0, odd.start()) + 1
        doc.problem_at(line, (), f"found control character U+{ord(odd[0]):04X}; allowed: printable text")
        return None
    return text


class _Builder:
    """Nodes to plain data; notes the line of each place and says what is wrong on the way."""

    def __init__(self, doc: Document, env: Mapping[str, str], budget: int) -> None:
        self.doc = doc
        self.env = env
        self.budget = budget

    def build(self, node: Node, place: Place) -> Any:
        """The node's value; `place` is where it stands."""
        self.budget -= 1
        if self.budget < 0 or len(place) > DEEPEST:
            raise TooDeep(node.line)
        self.doc.lines.setdefault(place, node.line)
        if node.tag:
            self.doc.problem(
                place, f"found the tag {self.doc.found(node.tag)}", "plain text, lists and mappings", hush=True
            )
            return None
        if node.items is not None:
            return [self.build(item, (*place, index)) for index, item in enumerate(node.items)]
        if node.entries is not None:
            return self._mapping(node, place)
        return None if node.text is None else self._substitute(node.text, place)

    def _mapping(self, node: Node, place: Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in self._entries(node, place):
            here = (*place, str(key.text))
            self.doc.lines.setdefault(here, key.line)
            result[str(key.text)] = self.build(value, here)
        return result

    def _entries(self, node: Node, place: Place, depth: int = 0) -> list[tuple[Node, Node]]:
        """The mapping's own entries, then those of its merges that it does not have itself."""
        self.budget -= len(node.entries or ())
        if self.budget < 0 or depth > DEEPEST:
            raise TooDeep(node.line)
        own: dict[str, tuple[Node, Node]] = {}
        merges: list[Node] = []
        for key, value in node.entries or ():
            if key.text == "<<":
                merges.extend(value.items if value.items is not None else [value])
            elif key.text is not None and key.text not in own:
                own[key.text] = (key, value)
            elif depth == 0:  # else it is told about where the mapping stands
                self._odd_key(key, own, place)
        for source in merges:
            if source.entries is None:
                what = "found << with something else; allowed: an alias of a mapping"
                self.doc.problem_at(source.line, place, what)
                continue
            for key, value in self._entries(source, place, depth + 1):
                own.setdefault(str(key.text), (key, value))
        return list(own.values())

    def _odd_key(self, key: Node, own: Mapping[str, tuple[Node, Node]], place: Place) -> None:
        if key.text is None:
            kind = "a list" if key.items is not None else "nothing" if key.entries is None else "a mapping"
            self.doc.problem_at(key.line, place, f"found {kind} as a key; allowed: text")
        else:
            first = own[key.text][0].line
            self.doc.problem_at(
                key.line, (*place, key.text), f"found this key again; allowed: once (it is on line {first})"
            )

    def _substitute(self, text: str, place: Place) -> str:
        if "%(" not in text:
            return text
        missing: list[str] = []

        def value(match: re.Match[str]) -> str:
            name, default = match[1], match[2]
            given = self.env.get(name)
            self.doc.variables[name] = given
            if given is None and default is None:
                missing.append(name)
            if default is not None:
                return given or default
            return given or ""

        result = _VARIABLE.sub(value, text)
        for name in missing:
            self.doc.problem(
                place,
                f"found %({name}), which is not set",
                f"a variable of the environment, or %({name}:-WORD) with a word for when it is not set",
            )
        if missing:
            self.doc.hushed.add(place)
        return result


def _explain_syntax(doc: Document, error: yaml.MarkedYAMLError, text: str) -> None:
    """One plain sentence for what the parser said; parsing cannot go on behind it."""
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark else (0, 0)
    lines = text.splitlines()
    rest = lines[line][column:] if line < len(lines) else ""
    said = error.problem or ""
    if error.context_mark and error.context_mark.line != line:
        said += f" in what begins on line {error.context_mark.line + 1}"
    what = f"found what YAML cannot read ({said})"
    remedy = "entries of one list or mapping in one column; a value that contains ': ' or ' #' in quotes"
    if rest[:1] == "\t":
        what, remedy = "found a tab", "spaces for indentation"
    elif rest[:1] in ("%", "@", "`"):
        what, remedy = f"found a value that begins with {rest[0]}", "such a value in quotes"
    elif "second document" in said:
        what, remedy = said, "one document per file"
    elif "undefined alias" in said:
        what, remedy = said, "*NAME after an &NAME, or the value in quotes"
    if doc.secret:
        what = "found what YAML cannot read"  # the parser quotes what it found
    doc.problem_at(line + 1, (), f"column {column + 1}: {what}; allowed: {remedy}")

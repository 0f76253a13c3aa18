"""What is wrong with a file, each in one line that names the place: `FILE:LINE: PATH: found X; allowed: Y`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Place = tuple[str | int, ...]  # keys and indexes from the top of a document

SECRET_WORDS = ("credentials", "database", "diskimages", "env-vars", "name", "password", "username")
_PASSWORD = re.compile(r"(//[^/:@\s]*:)\S*@")  # of an URL
_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,64}")


@dataclass(slots=True)
class Document:
    """A file that was read: its data, where each piece stands, and what was found wrong with it so far."""

    name: str
    secret: bool = False  # nothing of the content is quoted
    content: bytes | None = None
    data: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    variables: dict[str, str | None] = field(default_factory=dict)  # of the environment, with their values
    hushed: set[Place] = field(default_factory=set)  # places whose problem makes all others there mere echoes
    _problems: list[tuple[int, Place, str]] = field(default_factory=list)
    _warnings: list[tuple[int, Place, str]] = field(default_factory=list)

    def problem(self, place: Place, what: str, allowed: str, *, hush: bool = False) -> None:
        """`what` was found at `place`, where `allowed` is."""
        if place in self.hushed:
            return
        if hush:
            self.hushed.add(place)
        self.problem_at(self.line(place), place, f"{what}; allowed: {allowed}")

    def problem_at(self, line: int, place: Place, text: str) -> None:
        """Like `problem`, on a line of its own; 0 is the file as a whole."""
        self._problems.append((line, place, text))

    def warn(self, place: Place, text: str) -> None:
        """Something that can be lived with."""
        self._warnings.append((self.line(place), place, text))

    @property
    def problems(self) -> tuple[str, ...]:
        """A line each, in the order of the file."""
        return self._shown(self._problems)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line each, in the order of the file."""
        return self._shown(self._warnings)

    def _shown(self, entries: list[tuple[int, Place, str]]) -> tuple[str, ...]:
        shown = []
        for line, place, text in sorted(entries, key=lambda entry: entry[0]):
            where = f"{self.name}:{line}" if line else self.name
            path = self.path(place)
            sentence = f"{where}: {path}: {text}" if path else f"{where}: {text}"
            # Names from the file can contain anything; a problem stays one line that no terminal obeys.
            shown.append("".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence))
        return tuple(dict.fromkeys(shown))

    def line(self, place: Place) -> int:
        """The line of a place, or of the nearest place above that is in the file."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def path(self, place: Place) -> str:
        """A place as people read it: `providers[rack1].machines[r1n1].bmc`, by names where entries have one."""
        shown, data = "", self.data
        for step in place:
            below = _below(data, step)
            if isinstance(step, int):
                name = below.get("name") if isinstance(below, dict) else None
                shown += f"[{name}]" if isinstance(name, str) and _WORD.fullmatch(name) else f"[{step}]"
            else:
                word = self._word(step, shown)
                shown += f".{word}" if shown else word
            data = below
        return shown

    def value(self, place: Place) -> Any:
        """What stands at a place; None when there is nothing."""
        data = self.data
        for step in place:
            data = _below(data, step)
        return data

    def _word(self, step: str, above: str) -> str:
        if self.secret and not above.endswith(".env-vars") and step not in SECRET_WORDS:
            return "?"  # who forgets a colon makes a key of a password
        return step if _WORD.fullmatch(step) else found(step)

    def found(self, value: Any) -> str:
        """A value in the words of a sentence; a secret file's stay secret."""
        return "a value that does not fit" if self.secret and isinstance(value, str) else found(value)


def _below(data: Any, step: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(step)
    if isinstance(data, list) and isinstance(step, int) and step < len(data):
        return data[step]
    return None


def found(value: Any) -> str:
    """A value in the words of a sentence, on one line and of bounded length."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    text = _PASSWORD.sub(r"\1***@", str(value))
    return repr(text if len(text) <= 80 else text[:77] + "...")


@dataclass(frozen=True, slots=True)
class Item:
    """A mapping somewhere in a document, for checks that must bear with whatever else is wrong there."""

    place: Place
    data: dict[str, Any]

    def at(self, *steps: str | int) -> Place:
        """The place of something below."""
        return (*self.place, *steps)

    def text(self, key: str) -> str:
        """The text under `key`; empty when it is missing or something else."""
        value = self.data.get(key)
        return value if isinstance(value, str) else ""

    def items(self, key: str) -> Iterator[Item]:
        """The mappings in the list under `key`."""
        value = self.data.get(key)
        for index, entry in enumerate(value if isinstance(value, list) else ()):
            if isinstance(entry, dict):
                yield Item(self.at(key, index), entry)

    def texts(self, key: str) -> Iterator[tuple[Place, str]]:
        """The texts in the list under `key`, with their places."""
        value = self.data.get(key)
        for index, entry in enumerate(value if isinstance(value, list) else ()):
            if isinstance(entry, str):
                yield self.at(key, index), entry


def top(doc: Document) -> Item:
    """The whole document."""
    return Item((), doc.data if isinstance(doc.data, dict) else {})

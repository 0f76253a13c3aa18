"""`where: "class == small and rack != r2"`: which machines, said in their properties.

    expression  or-terms of `and`-terms of `not`-terms, parentheses
    comparison  NAME == WORD | NAME != WORD | NAME in (WORD, WORD, ...) | NAME not in (WORD, ...)

A NAME is a machine's property, or `name`, `rack`, `firmware`.  A WORD needs quotes only when it contains blanks or one
of `()=!,'"` or is one of the words above.  Everything is compared as text; a property that a machine does not have is
empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nodepool.config.records import MachineSpec

Test = Callable[[Mapping[str, str]], bool]

LONGEST = 1000  # characters
DEEPEST = 20  # parentheses and nots within each other
_TOKEN = re.compile(r"""\s*(?:(?P<sign>==|!=|[(),])|"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<word>[^\s()=!,'"]+))""")
_KEYWORDS = {"and", "or", "not", "in"}
_GRAMMAR = """NAME == WORD, NAME != WORD, NAME in (WORD, ...), joined by and, or, not and parentheses"""


class WhereError(ValueError):
    """The expression cannot be read; the message says what was found and what is allowed."""


def facts(machine: MachineSpec) -> dict[str, str]:
    """What an expression can look at."""
    own = {"name": machine.name, "rack": machine.rack, "firmware": machine.firmware}
    return {**machine.properties, **own}


@dataclass(frozen=True, slots=True)
class Where:
    """An expression that was understood."""

    text: str
    names: tuple[str, ...]  # the properties it looks at, in order of appearance
    test: Test

    def matches(self, properties: Mapping[str, str]) -> bool:
        """Whether a machine with these properties is meant."""
        return self.test(properties)


def parse(text: str) -> Where:
    """Read an expression; raises WhereError."""
    if len(text) > LONGEST:
        raise WhereError(f"found {len(text)} characters; allowed: {LONGEST}")
    reader = _Reader(_tokens(text))
    test = reader.either(0)
    if reader.peek() is not None:
        raise reader.error("and, or, or the end")
    return Where(text, tuple(dict.fromkeys(reader.names)), test)


def _tokens(text: str) -> list[tuple[str, str]]:
    """Pairs of kind (sign, keyword, word) and text."""
    tokens, position, end = [], 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            rest = text[position:].strip()
            raise WhereError(f"found {rest[:20]!r}; allowed: {_GRAMMAR}")
        position = match.end()
        word = match["word"]
        if match["sign"]:
            tokens.append(("sign", match["sign"]))
        elif word is not None:
            tokens.append(("keyword" if word in _KEYWORDS else "word", word))
        else:
            tokens.append(("word", match["double"] if match["double"] is not None else match["single"]))
    return tokens


class _Reader:
    """Recursive descent over the tokens; each method answers with the test for what it has read."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.position = 0
        self.names: list[str] = []

    def peek(self) -> tuple[str, str] | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self, kind: str, text: str | None = None) -> str | None:
        """The next token's text when it is of this kind, and this text."""
        token = self.peek()
        if token is None or token[0] != kind or (text is not None and token[1] != text):
            return None
        self.position += 1
        return token[1]

    def error(self, allowed: str) -> WhereError:
        token = self.peek()
        return WhereError(f"found {repr(token[1]) if token else 'the end of the expression'}; allowed: {allowed}")

    def either(self, depth: int) -> Test:
        tests = [self.both(depth)]
        while self.take("keyword", "or"):
            tests.append(self.both(depth))
        return tests[0] if len(tests) == 1 else lambda properties: any(test(properties) for test in tests)

    def both(self, depth: int) -> Test:
        tests = [self.term(depth)]
        while self.take("keyword", "and"):
            tests.append(self.term(depth))
        return tests[0] if len(tests) == 1 else lambda properties: all(test(properties) for test in tests)

    def term(self, depth: int) -> Test:
        if depth > DEEPEST:
            raise WhereError(f"found deeper nesting; allowed: {DEEPEST} levels")
        if self.take("keyword", "not"):
            inner = self.term(depth + 1)
            return lambda properties: not inner(properties)
        if self.take("sign", "("):
            inner = self.either(depth + 1)
            if not self.take("sign", ")"):
                raise self.error("and, or, or )")
            return inner
        return self.comparison()

    def comparison(self) -> Test:
        name = self.take("word")
        if name is None:
            raise self.error(_GRAMMAR)
        self.names.append(name)
        if self.take("sign", "=="):
            words, wanted = {self.word()}, True
        elif self.take("sign", "!="):
            words, wanted = {self.word()}, False
        else:
            wanted = not self.take("keyword", "not")
            if not self.take("keyword", "in"):
                raise self.error("==, !=, in or not in")
            words = self.words()
        return lambda properties: (properties.get(name, "") in words) is wanted

    def words(self) -> set[str]:
        if not self.take("sign", "("):
            raise self.error("a list of words such as (r1, r2)")
        words = {self.word()}
        while self.take("sign", ","):
            words.add(self.word())
        if not self.take("sign", ")"):
            raise self.error("a comma or )")
        return words

    def word(self) -> str:
        word = self.take("word")
        if word is None:
            raise self.error("a word, in quotes when it contains blanks")
        return word

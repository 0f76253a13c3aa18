"""YAML text to nodes, each with its line; text stays text.

PyYAML's own composer calls itself once per level, and the C one dies of a segmentation fault on text that nests some
ten thousand levels deep.  This one works on the parser's events with a list as its stack, and bounds the depth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CORE = "tag:yaml.org,2002:"
_CORE_TAGS = {"!", *(_CORE + kind for kind in ("str", "int", "float", "bool", "null", "seq", "map"))}
_NULLS = {"", "~", "null", "Null", "NULL"}

DEEPEST = 40  # levels: no configuration has more


class TooDeep(Exception):
    """The text nests deeper, or its aliases add more, than any configuration does; `line` is where we gave up."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


@dataclass(slots=True)
class Node:
    """A piece of YAML: text (str, or None for null), items, or entries (pairs of key and value)."""

    line: int  # from 1
    text: str | None = None
    items: list[Node] | None = None
    entries: list[tuple[Node, Node]] | None = None
    tag: str = ""  # only when it is not one of the core's
    _key: Node | None = field(default=None, repr=False)  # whose value comes next

    def add(self, node: Node) -> None:
        """Take the next child, in the order of the text."""
        if self.items is not None:
            self.items.append(node)
        elif self._key is None:
            self._key = node
        elif self.entries is not None:
            self.entries.append((self._key, node))
            self._key = None


def compose(text: str) -> Node | None:
    """The document's top node, None when it is empty.  Raises yaml.YAMLError and TooDeep."""
    composer = _Composer()
    for event in yaml.parse(text, Loader=_PARSER):
        composer.take(event)
    return composer.root


class _Composer:
    def __init__(self) -> None:
        self.root: Node | None = None
        self.stack: list[tuple[Node, str | None]] = []
        self.anchors: dict[str, Node] = {}

    def take(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent):
            self.put(self.alias(event))
        elif isinstance(event, yaml.CollectionStartEvent):
            self.stack.append((_node(event), event.anchor))
            if len(self.stack) > DEEPEST:
                raise TooDeep(_line(event))
        elif isinstance(event, yaml.CollectionEndEvent):
            self.put(*self.stack.pop())
        elif isinstance(event, yaml.ScalarEvent):
            self.put(_node(event), event.anchor)
        elif isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
            raise yaml.MarkedYAMLError(problem="found a second document", problem_mark=_mark(event))

    def alias(self, event: Any) -> Node:
        """The node that was anchored; one that is not complete yet would contain itself and is not there."""
        node = self.anchors.get(event.anchor)
        if node is None:
            raise yaml.MarkedYAMLError(problem=f"found undefined alias '{event.anchor}'", problem_mark=_mark(event))
        return node

    def put(self, node: Node, anchor: str | None = None) -> None:
        """A node is complete: it belongs to what is open, or is the top."""
        if anchor:
            self.anchors[anchor] = node
        if self.stack:
            self.stack[-1][0].add(node)
        else:
            self.root = node


def _mark(event: Any) -> Any:
    return event.start_mark


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _node(event: Any) -> Node:
    line = _line(event)
    tag = "" if event.tag is None or event.tag in _CORE_TAGS else event.tag
    if isinstance(event, yaml.SequenceStartEvent):
        return Node(line, items=[], tag=tag)
    if isinstance(event, yaml.MappingStartEvent):
        return Node(line, entries=[], tag=tag)
    is_null = not event.style and event.value in _NULLS and event.tag in (None, _CORE + "null")
    return Node(line, text=None if is_null else event.value, tag=tag)

"""Tables for terminals, with the borders that users of upstream's `nodepool list` know."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

_GREEN, _YELLOW, _RED, _MAGENTA, _CYAN = "32", "33", "31", "35", "36"  # SGR parameters (ECMA-48, 8.3.117)
_COLOURS = {
    **dict.fromkeys(("ready", "available", "fulfilled"), _GREEN),
    **dict.fromkeys(("in-use", "occupied"), _CYAN),
    **dict.fromkeys(("building", "deleting", "inspecting", "cleaning", "testing", "pending", "requested"), _YELLOW),
    **dict.fromkeys(("failed", "broken", "expired"), _RED),
    **dict.fromkeys(("hold", "inspected"), _MAGENTA),  # wait for people
}


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows of cells under headers, left-aligned between `+---+` borders; None is an empty cell.

    States (what is under a header `State`) are coloured where `colours` says so.
    """
    lines = [[plain(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    border = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    form = "| " + " | ".join(f"{{:<{width}}}" for width in widths) + " |"
    head, *body = [form.format(*line) for line in lines]
    if "State" in headers and colours():
        begins = 2 + sum(width + 3 for width in widths[: headers.index("State")])
        states = [line[headers.index("State")] for line in lines[1:]]
        body = [row[:begins] + state(text) + row[begins + len(text) :] for row, text in zip(body, states, strict=True)]
    return "\n".join([border, head, border, *body, *([border] if body else [])])


def pairs(values: Iterable[tuple[str, object]], indent: str = "  ") -> str:
    """Names and values, one pair a line, the values under one another; pairs without a value are left out."""
    kept = [(name, plain(value)) for name, value in values if value not in (None, "", [])]
    width = max((len(name) for name, _ in kept), default=0)
    return "\n".join(f"{indent}{name:<{width}}  {value}" for name, value in kept)


def plain(cell: object) -> str:
    """A cell as text that cannot move the cursor: what came from machines is shown, not obeyed."""
    text = "" if cell is None else str(cell)
    return text if text.isprintable() else "".join(char if char.isprintable() else " " for char in text)


def colours() -> bool:
    """Whether states are coloured: on a terminal that can, unless NO_COLOR says no (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def state(text: str) -> str:
    """A state in its colour, where states are coloured."""
    colour = _COLOURS.get(text)
    return f"\x1b[{colour}m{text}\x1b[0m" if colour and colours() else text

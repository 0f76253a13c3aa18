"""Tables for terminals, with the borders that users of upstream's `nodepool list` know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows of cells under headers, left-aligned between `+---+` borders; None is an empty cell."""
    lines = [[plain(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    border = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    form = "| " + " | ".join(f"{{:<{width}}}" for width in widths) + " |"
    head, *body = [form.format(*line) for line in lines]
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

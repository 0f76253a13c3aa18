"""Draw doc/lifecycle.svg from the tables of nodepool.lifecycle: never by hand, so that it cannot drift from the code.

usage: tools/draw_lifecycles.py FILE     (`make doc`; a unit test says when the file is stale)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import StrEnum
from html import escape
from pathlib import Path

from nodepool.lifecycle import FINAL, TABLES, WAITING, WAY_OUT

BOX_WIDTH, BOX_HEIGHT, GAP_Y, LEFT, TOP = 130, 30, 26, 40, 56
COLUMN = 660
COLOURS = {"final": "#e5e7eb", "waits": "#dbeafe", "works": "#fde68a"}


def draw() -> str:
    """The whole picture as SVG: one column per lifecycle, states from top to bottom, events as arcs to their right."""
    columns, height = [], 0
    for number, kind in enumerate(TABLES):
        body, used = _column(kind, LEFT + (number % 2) * COLUMN, TOP + (number // 2) * 510)
        columns.append(body)
        height = max(height, used)
    legend = "".join(
        f'<rect x="{LEFT + i * 250}" y="12" width="16" height="16" fill="{colour}" stroke="#374151"/>'
        f'<text x="{LEFT + 22 + i * 250}" y="25">{meaning}</text>'
        for i, (colour, meaning) in enumerate(
            (
                (COLOURS["works"], "works: has a way out by time"),
                (COLOURS["waits"], "waits for people or the plan"),
                (COLOURS["final"], "final"),
            )
        )
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * COLUMN + LEFT}" height="{height + 30}"'
        ' font-family="sans-serif" font-size="12">\n'
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
        '<path d="M0,0 L7,3 L0,6 z" fill="#374151"/></marker></defs>\n'
        '<rect width="100%" height="100%" fill="white"/>\n'
    )
    return head + legend + "\n" + "\n".join(columns) + "\n</svg>\n"


def _column(kind: str, x: int, y: int) -> tuple[str, int]:
    table = TABLES[kind]
    states = _states(kind, table)
    tops = {state: y + 24 + index * (BOX_HEIGHT + GAP_Y) for index, state in enumerate(states)}
    parts = [f'<text x="{x}" y="{y + 8}" font-size="16" font-weight="bold">{kind}</text>']
    merged: dict[tuple[StrEnum, StrEnum], list[str]] = {}
    for (state, event), target in table.items():
        merged.setdefault((state, target), []).append(str(event))
    ordered = sorted(merged.items(), key=lambda item: abs(states.index(item[0][0]) - states.index(item[0][1])))
    for lane, ((state, target), events) in enumerate(ordered):
        parts.append(_arc(x, tops[state], tops[target], lane, ", ".join(events)))
    for state, top in tops.items():
        colour = COLOURS["works" if state in WAY_OUT[kind] else "final" if state in FINAL[kind] else "waits"]
        parts.append(
            f'<rect x="{x}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="{colour}"'
            ' stroke="#374151"/>'
            f'<text x="{x + BOX_WIDTH / 2}" y="{top + 20}" text-anchor="middle">{escape(str(state))}</text>'
        )
    return "\n".join(parts), max(tops.values()) + BOX_HEIGHT


def _states(kind: str, table: Iterable[tuple[StrEnum, StrEnum]]) -> list[StrEnum]:
    known = {*WAY_OUT[kind], *WAITING[kind], *FINAL[kind]}
    order = list(type(next(iter(known))))
    assert {state for state, _ in table} <= known
    return [state for state in order if state in known]


def _arc(x: int, start: int, end: int, lane: int, label: str) -> str:
    """One transition: out of the box to the right, along a lane of its own, back in; its events beside the lane."""
    right = x + BOX_WIDTH
    out, back = start + 9 + lane % 3 * 6, end + 9 + lane % 3 * 6
    reach = right + 24 + lane * 26
    return (
        f'<path d="M{right},{out} C{reach},{out} {reach},{back} {right},{back}" fill="none" stroke="#6b7280"'
        ' marker-end="url(#tip)"/>'
        f'<text x="{right + (reach - right) * 0.76:.0f}" y="{(out + back) / 2 + 4:.0f}" fill="#111827" font-size="11"'
        f' stroke="white" stroke-width="3" paint-order="stroke">{escape(label)}</text>'
    )


def main() -> int:
    """Write the picture."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

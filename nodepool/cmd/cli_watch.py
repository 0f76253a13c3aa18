"""`--watch`: the same look again and again, drawn over the last one where there is a terminal."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable

from nodepool.cmd.client import DONE, FAILED, CommandError

_CLEAR, _HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[J"
_CUT_LINES, _WRAP_LINES = "\x1b[?7l", "\x1b[?7h"  # DECAWM: a line that is too long does not push the others down


class _Look(io.StringIO):
    """What one look prints; it is for a terminal when what we print on is one."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def watch(look: Callable[[], int], seconds: float, between: str = "\n") -> int:
    """Print what `look` prints every `seconds` until Ctrl-C, which is a good end.

    On a terminal each look takes the place of the one before; elsewhere `between` is printed between two.  A daemon
    that does not answer is said and waited for, unless the first look finds none.
    """
    terminal = sys.stdout.isatty()
    first = True
    try:
        while True:
            text = _looked(look, terminal=terminal, first=first)
            if terminal:
                sys.stdout.write((_CLEAR + _CUT_LINES if first else "") + _screen(text, seconds))
            else:
                sys.stdout.write(("" if first else between) + text)
            sys.stdout.flush()
            first = False
            time.sleep(seconds)
    except KeyboardInterrupt:
        return DONE
    finally:
        if terminal and not first:
            sys.stdout.write(f"{_WRAP_LINES}\n")


def _looked(look: Callable[[], int], *, terminal: bool, first: bool) -> str:
    out, sys.stdout = sys.stdout, _Look(terminal)
    try:
        look()
        return sys.stdout.getvalue()
    except CommandError as error:
        if first or error.status != FAILED:
            raise
        return f"nodepool: {error}\n"
    finally:
        sys.stdout = out


def _screen(text: str, seconds: float) -> str:
    """What draws a look from the top: as many lines as there is room for, and nothing left of the last one."""
    try:
        room = os.get_terminal_size(sys.stdout.fileno()).lines or 24
    except OSError:
        room = 24
    head = f"{time.strftime('%H:%M:%S')}, every {seconds:g} s; Ctrl-C ends"
    lines = [head, "", *text.splitlines()]
    if len(lines) > room - 1:
        lines = [*lines[: room - 2], f"... {len(lines) - room + 2} more lines; this terminal has {room}"]
    return _HOME + "\n".join(line + _REST_OF_LINE for line in lines) + _REST_OF_SCREEN

"""The documents do not drift from the code."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_picture_of_the_lifecycles_is_the_one_that_the_tables_give():
    draw = runpy.run_path(str(ROOT / "tools" / "draw_lifecycles.py"))["draw"]
    assert (ROOT / "doc" / "lifecycle.svg").read_text() == draw(), "stale: run make doc"

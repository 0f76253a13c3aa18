"""What commands print for programs: the same values as JSON, YAML or CSV; nothing is imported that is not asked for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from nodepool.cmd.client import DONE
from nodepool.cmd.tables import plain

FORMATS = ("table", "json", "yaml", "csv")


def output(args: argparse.Namespace, value: Any, text: Callable[[], str]) -> int:
    """Print `value` in the format that was asked for; `text` makes what people are shown."""
    told = text() if args.format == "table" else structured(value, args.format)
    sys.stdout.write(told if told.endswith("\n") or not told else f"{told}\n")
    return DONE


def structured(value: Any, form: str) -> str:
    """`value` (an item or a list of items, as the API gives them) as json, yaml or csv."""
    if form == "json":
        return json.dumps(value, indent=2, ensure_ascii=False)
    return _yaml(value) if form == "yaml" else _csv(value)


def _yaml(value: Any) -> str:
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120))


def _csv(value: Any) -> str:
    """RFC 4180 with LF: a header of the fields' names, a row per item; what has parts is JSON.  No items, no header."""
    import csv
    import io

    items = value if isinstance(value, list) else [value]
    fields = list(dict.fromkeys(field for item in items for field in item))
    told = io.StringIO()
    writer = csv.writer(told, lineterminator="\n")
    writer.writerows([fields] if fields else [])
    writer.writerows([_cell(item.get(field)) for field in fields] for item in items)
    return told.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, str) or value is None:
        return plain(value)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

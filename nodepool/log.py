"""Logging: sentences with a time, a level and the part of the daemon that says them."""

from __future__ import annotations

import json
import logging
import logging.config
import sys
import time
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class _Utc(logging.Formatter):
    """RFC 3339 times in UTC, as everywhere else."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"


def configure(file: Path | None, *, debug: bool = False, target: Path | None = None) -> None:
    """Log as `file` says (YAML or JSON for dictConfig, or INI for fileConfig), else to stdout or the file `target`.

    Raises OSError or ValueError when the file cannot be used.
    """
    if file is not None:
        _from_file(file)
        return
    handler: logging.Handler = logging.FileHandler(target) if target else logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Utc(FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("nodepool").setLevel(logging.DEBUG if debug else logging.INFO)
    for chatty in ("alembic", "asyncssh", "aiohttp.access", "uvicorn", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _from_file(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if file.suffix in {".yaml", ".yml"}:
        import yaml

        logging.config.dictConfig(yaml.safe_load(text))
    elif file.suffix == ".json":
        logging.config.dictConfig(json.loads(text))
    else:
        logging.config.fileConfig(file, disable_existing_loggers=False)

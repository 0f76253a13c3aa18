"""The form of the agent's protocol: lines `key=value`, as doc/agent-protocol.rst says.  Pure.

Values are percent-encoded (RFC 3986, section 2.1; everything but its unreserved characters).  Bytes that are no UTF-8
become U+FFFD: serial numbers come from firmware, and a strange one must not keep its machine out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

from nodepool.errors import NodepoolError

MAX_BODY = 64 * 1024  # bytes

_KEY = re.compile(r"[a-z0-9._-]+")
_VALUE = re.compile(r"(?:[A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})*")


class BadMessage(NodepoolError):
    """A body that is not in the form of the protocol; the sentence says which line and why."""


def parse(body: bytes) -> dict[str, str]:
    """The lines of a body by key, values decoded; the last LF may be missing.  Raises BadMessage."""
    if len(body) > MAX_BODY:
        raise BadMessage(f"the message has {len(body)} bytes; at most {MAX_BODY} are allowed")
    try:
        text = body.decode("ascii")
    except UnicodeDecodeError as error:
        raise BadMessage(f"byte {error.start} of the message is not ASCII; values are percent-encoded") from error
    lines: dict[str, str] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        key, equals, value = line.partition("=")
        if not equals:
            raise BadMessage(f"line {number} has no '='; every line is key=value")
        if not _KEY.fullmatch(key):
            raise BadMessage(f"line {number}: the key {key[:40]!r} may only have a-z 0-9 . _ -")
        if not _VALUE.fullmatch(value):
            raise BadMessage(f"line {number}: the value of {key[:40]} is not percent-encoded")
        if key in lines:
            raise BadMessage(f"line {number}: {key[:40]} comes twice")
        lines[key] = unquote(value, errors="replace")
    return lines


def render(lines: Mapping[str, str]) -> bytes:
    """A body that `parse` reads back as `lines`.  Raises BadMessage for keys that are none, and for too much."""
    for key in lines:
        if not _KEY.fullmatch(key):
            raise BadMessage(f"{key[:40]!r} cannot be a key; a key may only have a-z 0-9 . _ -")
    body = "".join(f"{key}={quote(value, safe='', errors='replace')}\n" for key, value in lines.items()).encode()
    if len(body) > MAX_BODY:
        raise BadMessage(f"the message would have {len(body)} bytes; at most {MAX_BODY} are allowed")
    return body

"""Answers: JSON as it is, errors as problems (RFC 9457) with a code that never changes.

Codes: `not-found` 404, `refused` `conflict` `illegal-transition` 409, `malformed` 400, `invalid` 422,
`method-not-allowed` 405, `unavailable` 503, `unexpected` 500.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from nodepool.errors import Conflict, IllegalTransition, NodepoolError, NotFound, Refused, StoreUnavailable

log = logging.getLogger("nodepool.api")

RETRY_AFTER = 5  # seconds after which to try again when the database does not answer
_KINDS: Mapping[type[NodepoolError], tuple[int, str]] = {
    NotFound: (404, "not-found"),
    Refused: (409, "refused"),
    Conflict: (409, "conflict"),
    IllegalTransition: (409, "illegal-transition"),
    StoreUnavailable: (503, "unavailable"),
}
_TITLES = {
    "not-found": "There is no such thing",
    "refused": "Refused",
    "conflict": "Changed by somebody else in the meantime",
    "illegal-transition": "Not possible in this state",
    "malformed": "The request cannot be read",
    "invalid": "The request is not valid",
    "unavailable": "The database does not answer",
    "method-not-allowed": "Not possible here",
    "unexpected": "An error of nodepool",
}
_BY_STATUS = {404: "not-found", 405: "method-not-allowed", 400: "malformed"}


def answer(view: Mapping[str, Any], status: int = 200, *, version: int | None = None, location: str = "") -> Response:
    """`view` as JSON; `version` of the row becomes the ETag."""
    headers = {"Cache-Control": "no-store"}
    if version is not None:
        headers["ETag"] = f'"{version}"'
    if location:
        headers["Location"] = location
    body = json.dumps(view, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(body, status, headers, media_type="application/json")


def problem(status: int, code: str, detail: str, errors: Sequence[Mapping[str, str]] = ()) -> Response:
    """An error; `detail` is a sentence with the remedy, `errors` say what is wrong where."""
    body: dict[str, Any] = {"title": _TITLES[code], "status": status, "code": code, "detail": detail}
    if errors:
        body["errors"] = list(errors)
    headers = {"Retry-After": str(RETRY_AFTER)} if status == 503 else {}
    return Response(json.dumps(body, ensure_ascii=False).encode(), status, headers, "application/problem+json")


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem."""
    app.add_exception_handler(NodepoolError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _known(_: HttpRequest, error: Exception) -> Response:
    for kind in type(error).__mro__:
        if kind in _KINDS:
            status, code = _KINDS[kind]
            return problem(status, code, str(error))
    log.error("unexpected: %s", error, exc_info=error)
    return problem(500, "unexpected", str(error))


async def _invalid(_: HttpRequest, error: Exception) -> Response:
    """What is wrong and where, without what was sent: it may have been a secret."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        return problem(400, "malformed", "the body is not JSON")
    errors = [
        {"where": ".".join(str(step) for step in item["loc"]), "message": item["msg"].removeprefix("Value error, ")}
        for item in found
    ]
    return problem(422, "invalid", "; ".join(f"{item['where']}: {item['message']}" for item in errors), errors)


async def _http(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _BY_STATUS.get(error.status_code, "invalid" if error.status_code < 500 else "unexpected")
    detail = str(error.detail)
    if error.status_code in {404, 405}:
        detail = f"there is no {request.method} {request.url.path}; /api/v1/openapi.json says what there is"
    return problem(error.status_code, code, detail)


async def _unexpected(_: HttpRequest, error: Exception) -> Response:
    return problem(500, "unexpected", f"unexpected {type(error).__name__}; the daemon's log has more")

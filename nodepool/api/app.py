"""The REST API under /api/v1: thin handlers over the use cases and the views.

Lists are `{"items": [...], "next": CURSOR or null}`; errors are problems (`answers`); a single row has its version as
ETag.  Plain handlers run in threads; whoever waits, waits in the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI

from nodepool import __version__
from nodepool.api import answers, images, overview, pool, requests
from nodepool.api.desk import Changes, Desk
from nodepool.plan import Catalog
from nodepool.store import Store

PREFIX = "/api/v1"


def create_app(
    store: Store,
    catalog: Callable[[], Catalog],
    reasons: Callable[[], Mapping[str, Sequence[str]]],
    status: Callable[[], Mapping[str, Any]],
) -> FastAPI:
    """The application over `store`.

    `catalog` gives the configuration in force, `reasons` the planner's sentences by label, `status` what the daemon
    says of itself (JSON-ready).
    """
    app = FastAPI(
        title="nodepool",
        version=__version__,
        description="Pools of bare-metal machines, kept ready.",
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,  # its page would load scripts from the network
        redoc_url=None,
        redirect_slashes=False,
    )
    answers.install(app)
    desk = Desk(store, catalog, reasons, status, Changes(store))
    app.state.changes = desk.changes
    for room in (pool, images, requests, overview):
        app.include_router(room.router(desk), prefix=PREFIX)
    return app

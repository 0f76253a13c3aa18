"""What people and programs are shown of images: builds, and the copies of them that providers have (as `views`)."""

from __future__ import annotations

from nodepool.clock import seconds_between
from nodepool.model import Build, BuildState, Copy
from nodepool.plan import Catalog
from nodepool.service.views import View, trouble, when
from nodepool.store import Tx
from nodepool.store import tables as t

FAILURES_LISTED = 10  # newest failed builds that the list of builds has
OPEN = frozenset({BuildState.REQUESTED, BuildState.BUILDING, BuildState.TESTING})
_FAILED = [str(BuildState.FAILED), str(BuildState.CANCELLED)]
_RETRIED = "the builder tries again by itself, each time later; nodepool explain LABEL says when"


def build(record: Build, now: int) -> View:
    """A build of an image; `phase` and `progress` while it runs."""
    return {
        "id": record.id,
        "image": record.image,
        "state": str(record.state),
        "since": when(record.since),
        "age": round(seconds_between(record.since, now), 3),
        "created_at": when(record.created_at),
        "finished_at": when(record.finished_at),
        "builder": record.builder,
        "requested_by": record.requested_by,
        "formats": sorted(record.files),
        "files": dict(record.files),
        "size": record.size,
        "sha256": record.sha256,
        "seconds": record.seconds,
        "log": record.log,
        "phase": record.work.step,
        "progress": record.work.waiting,
        "at": " ".join(filter(None, (record.work.step, record.work.waiting))),
        "trouble": trouble(record.work.step or "build", record.work.error, record.work.code, _RETRIED)
        if record.work.error
        else None,
    }


def builds(tx: Tx, image: str = "", state: str = "") -> View:
    """Builds, oldest first: those in `state`, or ("") those that are not over and the newest that failed."""
    c = t.builds.c
    where = [c.image == image] if image else []
    if state:
        found = tx.select(Build, c.state == state, *where, order=c.created_at)
    else:
        over = [*_FAILED, str(BuildState.DELETED)]
        found = tx.select(Build, c.state.not_in(over), *where)
        newest = c.created_at.desc()
        found += tx.select(Build, c.state.in_(_FAILED), *where, order=newest, limit=FAILURES_LISTED)
        found.sort(key=lambda record: (record.created_at, record.id))
    return {"items": [build(record, tx.now) for record in found], "next": None}


def copies(tx: Tx, catalog: Catalog) -> View:
    """Where builds are published, and for each provider that uses an image the build that is under way for it."""
    of_build = {record.id: record for record in tx.select(Build, t.builds.c.state != str(BuildState.DELETED))}
    items = [copy(record, of_build.get(record.build_id), tx.now) for record in tx.select(Copy)]
    for record in sorted(of_build.values(), key=lambda found: (found.created_at, found.id)):
        if record.state in OPEN:
            items += [
                copy(Copy(0, record.id, record.image, provider, str(record.state), record.since), record, tx.now)
                for provider in catalog.images.get(record.image, ())
            ]
    return {"items": items, "next": None}


def copy(record: Copy, of: Build | None, now: int) -> View:
    """One build at one provider; without an id it is still to be published."""
    return {
        "id": str(record.id) if record.id else None,
        "build_id": record.build_id,
        "provider": record.provider,
        "image": record.image,
        "name": record.name,
        "external_id": record.external_id,
        "state": record.state,
        "created_at": when(record.created_at),
        "age": round(seconds_between(record.created_at, now), 3),
        "size": of.size if of else 0,
        "build_state": str(of.state) if of else "",
        "at": build(of, now)["at"] if of else "",
    }

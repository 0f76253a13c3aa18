"""Images: builds begun, ended and removed, and the copies that providers make nodes from."""

from __future__ import annotations

import uuid
from dataclasses import replace

from nodepool.clock import SECOND, micros
from nodepool.config.records import Config
from nodepool.errors import Code, NotFound, Refused
from nodepool.image.make import ImageResult
from nodepool.lifecycle import BuildEvent
from nodepool.model import Build, BuildState, Copy, Node, NodeState, Owner, Work
from nodepool.service.moves import move
from nodepool.service.pool import request_build
from nodepool.store import Tx
from nodepool.store import tables as t


def ask(tx: Tx, config: Config, image: str, actor: str) -> Build:
    """Build an image now, whether it is needed or not."""
    recipe = config.diskimages.get(image)
    if recipe is None:
        known = ", ".join(sorted(config.diskimages)) or "none"
        raise NotFound(f"there is no diskimage {image} (diskimages: {known})")
    if recipe.pause:
        raise Refused(f"{image} is paused in the YAML (pause: true)")
    under_way = tx.select(
        Build, t.builds.c.image == image, t.builds.c.state.in_([str(BuildState.REQUESTED), str(BuildState.BUILDING)])
    )
    if under_way:
        raise Refused(f"{image} is being built already (build {under_way[0].id})")
    return request_build(tx, image, actor, "asked for")


def begin(tx: Tx, build_id: str, builder: str, timeout: float, log: str) -> Build:
    """Take a build up."""
    build = tx.get(Build, build_id)
    work = Work(step="start", since=tx.now, deadline=tx.now + micros(timeout), next_at=tx.now)
    return move(tx, build, BuildEvent.START, f"on {builder}", builder=builder, log=log, work=work)


def progress(tx: Tx, build_id: str, phase: str, share: float | None) -> None:
    """Note what a build is at; the phase `testing` is a state of its own."""
    build = tx.get(Build, build_id)
    waiting = f"{share:.0%}" if share is not None else ""
    if phase == "testing" and build.state is BuildState.BUILDING:
        work = replace(build.work, step=phase, since=tx.now, waiting=waiting)
        move(tx, build, BuildEvent.TEST, "the result is looked at", work=work)
    elif build.state in {BuildState.BUILDING, BuildState.TESTING}:
        since = build.work.since if build.work.step == phase else tx.now
        tx.put(replace(build, work=replace(build.work, step=phase[:40], since=since, waiting=waiting)))


def finish(tx: Tx, config: Config, build_id: str, made: ImageResult) -> Build:
    """A build is good: it is published for every provider that uses it."""
    build = tx.get(Build, build_id)
    if build.state is BuildState.BUILDING:
        build = move(tx, build, BuildEvent.TEST, "the result is looked at")
    build = move(
        tx,
        build,
        BuildEvent.PASS,
        f"{made.size / 1e6:.0f} MB in {made.seconds:.0f} s",
        files={name: str(path) for name, path in made.files.items()},
        size=made.size,
        sha256=made.sha256,
        seconds=made.seconds,
        log=str(made.log),
        finished_at=tx.now,
    )
    for provider in config.providers.values():
        if any(offer.diskimage == build.image for pool in provider.pools for offer in pool.labels):
            name = f"{build.image}-{build.finished_at // SECOND}"
            tx.add(Copy(0, build.id, build.image, provider.name, "ready", tx.now, name, build.id))
    return build


def fail(tx: Tx, build_id: str, why: str, code: Code) -> Build:
    """A build has failed; its log stays."""
    build = tx.get(Build, build_id)
    work = Work(error=why, code=str(code))
    return move(tx, build, BuildEvent.FAIL, why, work=work, finished_at=tx.now)


def interrupt(tx: Tx, build_id: str, why: str) -> Build:
    """A build ends through no fault of its own; the planner asks for another."""
    return move(tx, tx.get(Build, build_id), BuildEvent.CANCEL, why, work=Work(error=why), finished_at=tx.now)


def delete(tx: Tx, build_id: str, actor: str) -> Build:
    """Remove a build, unless a node is just being built from it; nodes that are READY do not need it any more."""
    build = tx.get(Build, build_id)
    if build.state in {BuildState.DELETING, BuildState.DELETED}:
        return build
    building = t.nodes.c.state == str(NodeState.BUILDING)
    needs_it = tx.select(Node, t.nodes.c.build_id == build.id, building, limit=1)
    if needs_it:
        raise Refused(f"build {build.id} is being written: node {needs_it[0].id} is built from it; delete that first")
    return move(tx, build, BuildEvent.DELETE, "deleted by hand", actor)


def lost(tx: Tx, build_id: str, path: str) -> None:
    """A build that is ready has lost its file."""
    move(tx, tx.get(Build, build_id), BuildEvent.DELETE, f"its file {path} is missing")


def database_id(tx: Tx) -> str:
    """What tells this database from every other: files beside it carry it, so that none removes another's."""
    known = tx.find(Owner, "database")
    return (known or tx.add(Owner("database", 0, uuid.uuid4().hex, 0))).holder


def gone(tx: Tx, build_id: str) -> None:
    """The files of a build are removed: so are its copies."""
    move(tx, tx.get(Build, build_id), BuildEvent.GONE, "its files are removed")
    tx.remove(Copy, t.copies.c.build_id == build_id)

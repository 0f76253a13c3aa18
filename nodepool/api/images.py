"""Images: builds, and the copies of them that providers have."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from starlette.responses import Response

from nodepool.api.answers import answer
from nodepool.api.desk import Actor, Desk
from nodepool.model import Build, BuildState
from nodepool.service import image_views, images

BuildId = Annotated[str, Path(max_length=40)]


def router(desk: Desk) -> APIRouter:
    """`/images` and `/builds`."""
    routes = APIRouter()

    @routes.get("/images", summary="Which builds are published where, and those under way")
    def list_images() -> Response:
        return answer(desk.read(lambda tx: image_views.copies(tx, desk.catalog())))

    @routes.post("/images/{name}/builds", summary="Build an image now, whether it is needed or not")
    def ask_for_build(name: str, actor: Actor) -> Response:
        build = desk.write(lambda tx: images.ask(tx, desk.catalog().config, name, actor))
        return _changed(desk, build, f"/api/v1/builds/{build.id}")

    @routes.get("/builds", summary="Builds that are not over, and the newest that failed; others with state=...")
    def list_builds(image: str = "", state: BuildState | None = None) -> Response:
        return answer(desk.read(lambda tx: image_views.builds(tx, image, str(state or ""))))

    @routes.get("/builds/{build_id}", summary="A build")
    def show_build(build_id: BuildId) -> Response:
        build = desk.read(lambda tx: tx.get(Build, build_id))
        return answer(image_views.build(build, desk.store.clock.now()), version=build.version)

    @routes.delete("/builds/{build_id}", summary="Remove a build and its copies")
    def delete_build(build_id: BuildId, actor: Actor) -> Response:
        return _changed(desk, desk.write(lambda tx: images.delete(tx, build_id, actor)))

    return routes


def _changed(desk: Desk, build: Build, location: str = "") -> Response:
    view = image_views.build(build, desk.store.clock.now())
    return answer(view, 202, version=build.version, location=location)

"""The builder: makes the images that are asked for, one after the other, and removes those that are over."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from nodepool.clock import SECOND
from nodepool.config.records import Config, DiskImage
from nodepool.errors import Code, StepError, StoreUnavailable
from nodepool.image.make import ImageResult
from nodepool.image.retention import leftovers, log_of, remove
from nodepool.loops.launcher import Executor
from nodepool.metrics import Metrics
from nodepool.model import Build, BuildState, Record
from nodepool.plan import Catalog
from nodepool.service import images
from nodepool.store import Office, Store, Tx
from nodepool.store import tables as t

log = logging.getLogger("nodepool.builder")

MISSING_EVERY = 60  # seconds between two looks at the files of what is ready
Progress = Callable[[str, float | None], None]
Make = Callable[[DiskImage, str, Config, Progress, threading.Event], ImageResult]
REMOVE_AGAIN = 300  # seconds
_OPEN = [str(state) for state in (BuildState.REQUESTED, BuildState.BUILDING, BuildState.TESTING, BuildState.DELETING)]


def _open_builds(tx: Tx) -> list[Record]:
    return [*tx.select(Build, t.builds.c.state.in_(_OPEN))]


class Builder:
    """One pass writes what builds have come to, and takes up the next."""

    def __init__(
        self, store: Store, catalog: Callable[[], Catalog], make: Make, executor: Executor, metrics: Metrics
    ) -> None:
        self.office: Office | None = None
        self.name = "builder"
        self.wake: Callable[[], None] = lambda: None
        self.sentence = "nothing to build"
        self._store = store
        self._catalog = catalog
        self._make = make
        self._executor = executor
        self._metrics = metrics
        self._feed = store.feed()
        self._open: dict[str, Build] = {}
        self._running: dict[str, threading.Event] = {}
        self._results: deque[tuple[str, ImageResult | StepError]] = deque()
        self._progress: dict[str, tuple[str, float | None]] = {}
        self._remove_at: dict[str, int] = {}  # when to try again what could not be removed
        self._first = True
        self._missed_at = 0

    def pass_once(self) -> int:
        """Do what can be done now; gives when to look again (microseconds UTC), 0 when only a change can bring more."""
        try:
            self._fold()
            if self._first:
                self._after_a_start()
            self._miss(self._store.clock.now())
            self._write_progress()
            while self._write_results() or self._take_up():
                self._fold()
        except StoreUnavailable as error:
            log.warning("%s; trying again, nothing is lost", error)
            self._feed.lose()
            return self._store.clock.now() + SECOND
        later = [at for build_id, at in self._remove_at.items() if build_id in self._open]
        later.append(self._missed_at)
        return min([*later, self._store.clock.now() + 2 * SECOND] if self._running else later)

    def stop(self) -> None:
        """End the builds that run; the planner asks for them again after the next start."""
        for cancelled in self._running.values():
            cancelled.set()

    def _fold(self) -> None:
        changes, whole = self._store.follow(self._feed, _open_builds)
        if not whole:
            self._open = {}
        for record in changes:
            if isinstance(record, Build):
                self._open.pop(record.id, None)
                if record.state in _OPEN:
                    self._open[record.id] = record

    def _after_a_start(self) -> None:
        """Builds that an earlier daemon has left half done are over."""
        for build in self._open.values():
            if build.state in {BuildState.BUILDING, BuildState.TESTING}:
                self._write(lambda tx, b=build: images.interrupt(tx, b.id, "its builder was stopped"))  # type: ignore[misc]
        self._tidy(self._catalog().config.images_dir)
        self._first = False
        self._fold()

    def _tidy(self, folder: Path) -> None:
        """Remove what stopped builds have left, in a folder that is this database's own."""
        kept = [str(state) for state in (BuildState.REQUESTED, BuildState.READY, BuildState.DELETING)]
        known = {build.id for build in self._store.read(lambda tx: tx.select(Build, t.builds.c.state.in_(kept)))}
        stale = leftovers(folder, known)
        ours = self._store.write(images.database_id, self.office)
        owner = folder / "database.id"
        if stale and (not owner.exists() or owner.read_text().strip() != ours):
            log.warning("%s has images of another database; they are left alone: %s", folder, stale[0].name)
            return
        if stale:
            log.info("removing what builds that were stopped have left: %s", ", ".join(path.name for path in stale))
            remove(stale)
        folder.mkdir(parents=True, exist_ok=True)
        owner.write_text(f"{ours}\n")

    def _miss(self, now: int) -> None:
        """A build whose file somebody has removed is no build: the planner asks for another."""
        if now < self._missed_at:
            return
        self._missed_at = now + MISSING_EVERY * SECOND
        for build in self._store.read(lambda tx: tx.select(Build, t.builds.c.state == str(BuildState.READY))):
            gone = [path for path in build.files.values() if not Path(path).exists()]
            if gone:
                self._write(lambda tx, b=build, g=gone: images.lost(tx, b.id, g[0]))  # type: ignore[misc]

    def _write(self, use_case: Callable[[Tx], object]) -> None:
        self._store.write(use_case, self.office)

    def _write_progress(self) -> None:
        told, self._progress = self._progress, {}
        for build_id, (phase, share) in told.items():
            self._write(lambda tx, b=build_id, p=phase, s=share: images.progress(tx, b, p, s))  # type: ignore[misc]

    def _write_results(self) -> bool:
        if not self._results:
            return False
        build_id, result = self._results[0]
        config = self._catalog().config
        if build_id not in self._open:
            return self._forget(build_id)
        image = self._open[build_id].image
        if isinstance(result, ImageResult):
            self._write(lambda tx: images.finish(tx, config, build_id, result))
            self._metrics.build(image, result.seconds, result.size, good=True)
            self.sentence = f"{image} built in {result.seconds:.0f} s"
        elif result.code is Code.CANCELLED:
            self._write(lambda tx: images.interrupt(tx, build_id, str(result)))
        else:
            log.warning("building %s failed: %s", image, result)
            self._write(lambda tx: images.fail(tx, build_id, str(result), result.code))
            self._metrics.build(image, 0.0, 0, good=False)
            self.sentence = f"building {image} failed: {result}"
        return self._forget(build_id)

    def _forget(self, build_id: str) -> bool:
        self._results.popleft()
        self._running.pop(build_id, None)
        return True

    def _take_up(self) -> bool:
        for build in sorted(self._open.values(), key=lambda build: build.created_at):
            if build.state is BuildState.DELETING:
                if self._remove(build):
                    return True
            elif build.state is not BuildState.REQUESTED and build.id not in self._running:
                self._write(lambda tx, b=build: images.interrupt(tx, b.id, "nobody is at work on it"))  # type: ignore[misc]
                return True
            if build.state is BuildState.REQUESTED and build.id not in self._running and self._executor.free() > 0:
                self._begin(build)
                return True
        return False

    def _begin(self, build: Build) -> None:
        config = self._catalog().config
        recipe = config.diskimages.get(build.image)
        if recipe is None:
            self._write(lambda tx: images.interrupt(tx, build.id, "the YAML has no such diskimage any more"))
            return
        cancelled = threading.Event()
        log_file = log_of(config.build_log_dir or config.images_dir / "logs", build.image, build.id)
        self._write(lambda tx: images.begin(tx, build.id, self.name, recipe.build_timeout, str(log_file)))
        self._running[build.id] = cancelled
        self.sentence = f"building {build.image}"
        log.info("building %s (%s)", build.image, build.id)

        def progress(phase: str, share: float | None) -> None:
            self._progress[build.id] = (phase, share)
            self.wake()

        def work() -> ImageResult | StepError:
            try:
                return self._make(recipe, build.id, config, progress, cancelled)
            except StepError as error:
                return error
            except Exception as error:
                log.exception("building %s failed unexpectedly", build.image)
                return StepError(f"unexpected {type(error).__name__}: {error}", Code.IMAGE_BUILD)

        def then(result: ImageResult | StepError) -> None:
            self._results.append((build.id, result))
            self.wake()

        self._executor.submit(work, then)

    def _remove(self, build: Build) -> bool:
        """Remove the files of a build; one that cannot be removed now is tried again later, and holds up nobody."""
        now = self._store.clock.now()
        if now < self._remove_at.get(build.id, 0):
            return False
        try:
            for path in build.files.values():
                Path(path).unlink(missing_ok=True)
        except OSError as error:
            log.warning("build %s of %s cannot be removed: %s", build.id, build.image, error)
            self._remove_at[build.id] = now + REMOVE_AGAIN * SECOND
            return False
        self._write(lambda tx: images.gone(tx, build.id))
        self._remove_at.pop(build.id, None)
        return True

"""The tasks that are served: each with the release that its `current` names, changed under way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve import release as releases
from serve.confidence import ConfidenceModel, Field, Neighbours
from serve.errors import ServeError
from serve.manifest import OutputField
from serve.release import Release, ReleaseInvalid
from serve.upstreams.local import Local, LocalModel
from serve.upstreams.teacher import Teacher, Teachers

RETRY_S = 30.0
"""After this a release that could not be used is tried again, in case a file or a runtime came back. One that is
certified for another runtime is not: only another `current` helps, and to look means to hash a whole model."""
LATEST = ":latest"
"""What Ollama's lists put behind a name."""

logger = logging.getLogger("serve")


@dataclass(frozen=True)
class Served:
    """A release, checked and ready to answer."""

    release: Release
    local: LocalModel | None
    """None where it must not or cannot run: `problem` says why."""
    teacher: Teacher | None
    """None offline."""
    model: ConfidenceModel | None
    neighbours: Neighbours | None
    fields: dict[str, list[Field]]
    """Output fields by predictor."""
    problem: str = ""
    refused: bool = False
    """What runs here is not what was certified."""

    @property
    def guarantee(self) -> str:
        router = self.release.router
        return f"{router.keep:g}@{router.confidence:g}" if router.certified else "none"


@dataclass(frozen=True)
class _Seen:
    """The `current` file as it was when it was last read, and when to look again though it did not change."""

    stamp: tuple[int, int, int]
    again: float = float("inf")


class Tasks:
    """Every task below `folder` that has a release.

    Args:
        folder: `releases/`, one folder a task.
        runtime: what the releases have to be certified for: ollama, embedded or url.
        local: runs their models.
        teachers: None offline.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        folder: Path,
        runtime: str,
        local: Local,
        teachers: Teachers | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._runtime = runtime
        self._local = local
        self._teachers = teachers
        self._clock = clock
        self._served: dict[str, Served] = {}
        self._seen: dict[str, _Seen] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self.problems: dict[str, str] = {}
        """Why the release that a task's `current` names is not in use."""

    @property
    def served(self) -> dict[str, Served]:
        """What answers now, by task."""
        return self._served

    async def watch(self, every: float = 1.0) -> None:
        """Refresh for ever."""
        while True:
            await asyncio.sleep(every)
            try:
                await self.refresh()
            except Exception:  # whatever a broken release brings up, the next one must be noticed
                logger.exception("the releases could not be looked at")

    async def refresh(self) -> None:
        """Look at every `current`; take up what changed, let go what is gone."""
        found = _stamps(self._folder)
        for name in [name for name in self._seen if name not in found]:
            del self._seen[name]
            self.problems.pop(name, None)
            self._swap(name, None)
        for name, stamp in found.items():
            seen = self._seen.get(name)
            if seen is None or seen.stamp != stamp or self._clock() >= seen.again:
                await self._take_up(name, stamp)

    async def close(self) -> None:
        """Stop every local model, after the answers under way."""
        for name in list(self._served):
            self._swap(name, None)
        await asyncio.gather(*self._retiring)

    async def _take_up(self, name: str, stamp: tuple[int, int, int]) -> None:
        """Serve what `current` names. What cannot be used changes nothing: the release before it stays."""
        try:
            served = await self._load(name)
            problem, hopeless = served.problem, served.refused
        except (ReleaseInvalid, OSError, ValueError) as error:
            served, problem, hopeless = None, str(error), False
        again = problem and not hopeless
        self._seen[name] = _Seen(stamp, self._clock() + RETRY_S if again else float("inf"))
        if problem and self.problems.get(name) != problem:
            logger.error("task %s: the release is not used: %s", name, problem)
        self.problems[name] = problem
        if not problem:
            del self.problems[name]
        if served and (not problem or name not in self._served):
            self._swap(name, served)

    async def _load(self, name: str) -> Served:
        release = await asyncio.to_thread(releases.current, self._folder / name)
        if release is None:
            raise ReleaseInvalid([f"{self._folder / name} has no release; run the task"])
        if release.manifest.task != name:
            raise ReleaseInvalid([f"{release.folder} is a release of {release.manifest.task}; move it there"])
        faults = release.router.mismatches(runtime=self._runtime)
        router, neighbours = release.router, release.neighbours
        teacher = self._teachers.of(release) if self._teachers else None
        model = ConfidenceModel.from_json(router.model.model_dump()) if router.model else None
        fields = {predictor.name: _fields(predictor.fields) for predictor in router.predictors}
        known = await asyncio.to_thread(Neighbours.load, neighbours) if neighbours else None
        local, problem = (None, "\n".join(faults)) if faults else await self._start(release)
        return Served(release, local, teacher, model, known, fields, problem, refused=bool(faults))

    async def _start(self, release: Release) -> tuple[LocalModel | None, str]:
        try:
            return await self._local.start(release), ""
        except ServeError as error:
            return None, str(error)

    def _swap(self, name: str, served: Served | None) -> None:
        """Change who answers from the next request on; requests under way keep what they began with."""
        before = self._served.pop(name, None)
        if served:
            self._served[name] = served
            how = "in use" if served.local else "known, but its local model does not answer"
            logger.warning("task %s: release %s is %s", name, served.release.version, how)
        if before and before.local:
            retiring = asyncio.create_task(before.local.retire())
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)


def _stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells a changed `current` file from the one before, by task."""
    found = {}
    for current in folder.glob("*/current"):
        try:
            status = current.stat()
        except FileNotFoundError:  # removed since it was listed
            continue
        found[current.parent.name] = (status.st_mtime_ns, status.st_ino, status.st_size)
    return found


def _fields(fields: Sequence[OutputField]) -> list[Field]:
    return [Field(field.name, tuple(field.labels or ())) for field in fields]

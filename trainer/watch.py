"""Watch: every task below a folder runs again by itself when there is reason to, one at a time.

A look costs nothing while nothing changes: the task's files are compared by size and time, and only what
changed is read. Runs are processes of their own, so what they hold (memory, the GPU) is free when they end;
the pipeline's locks keep a person's own runs and ours apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from trainer import pipeline
from trainer.errors import HomestillError, TaskError
from trainer.runs import Home, read_json, write_json
from trainer.task import Task, load

FIRST_RETRY = timedelta(seconds=10)
LONGEST_RETRY = timedelta(hours=1)
STATE = "watch.json"

log = logging.getLogger("homestill.watch")


class Stop(Protocol):
    """Tells when to end, and lets nobody wait longer than that."""

    def is_set(self) -> bool: ...

    def wait(self, timeout: float) -> bool: ...


class Work(Protocol):
    """What a watch does for a task; `trainer.watching.Child` does it for real."""

    def run(self, folder: Path) -> int:
        """Bring the task up to date; the exit code, 0 when it is."""

    def harvest(self, folder: Path) -> int:
        """Take the teacher's journaled answers as traces; the exit code."""


@dataclass(frozen=True)
class Memory:
    """What a watch knows of a task from one start to the next; kept in HOMESTILL_HOME/watch.json."""

    run: str = ""
    """The run that was started last: its name follows from task, program and data."""
    started: str = ""
    """When (UTC, ISO 8601); the answers at the endpoint are counted from then on."""
    ended: str = ""
    failures: int = 0
    """Of this run, one after the other."""


@dataclass
class Watch:
    """The tasks below `folder`, looked at again and again.

    Args:
        home: HOMESTILL_HOME.
        folder: a folder of task folders, or one task folder.
        work: brings a task up to date.
        stop: ends `forever`.
        clock: the time, with a time zone.
        new_answers: how many requests of a task the teacher answered at the endpoint since a moment.
        pulse: called at every look.
    """

    home: Home
    folder: Path
    work: Work
    stop: Stop
    new_answers: Callable[[str, datetime], int]
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    pulse: Callable[[], None] = lambda: None
    _names: dict[Path, tuple[Any, str]] = field(default_factory=dict)
    """Run names by task folder, each with the state of the files that it was made from."""
    _seen: set[Path] = field(default_factory=set)
    """Tasks that were run since this process started."""
    _faults: dict[Path, str] = field(default_factory=dict)

    def forever(self, every_s: float) -> None:
        """Look until `stop` is set."""
        while not self.stop.is_set():
            self.look()
            self.stop.wait(every_s)

    def look(self) -> list[str]:
        """Run each task that is due, in order of name; the names of those that were run."""
        done = []
        for folder in self.folders():
            self.pulse()
            if self.stop.is_set():
                break
            name = self._look_at(folder)
            if name:
                done.append(name)
        return done

    def folders(self) -> list[Path]:
        """The task folders that there are now."""
        if (self.folder / "task.yaml").is_file():
            return [self.folder]
        return sorted(file.parent for file in self.folder.glob("*/task.yaml"))

    def _look_at(self, folder: Path) -> str:
        try:
            task = load(folder)
            name = self._run_name(task)
        except (HomestillError, OSError) as error:
            self._say_once(folder, f"{folder.name} is left out: {error}")
            return ""
        self._faults.pop(folder, None)
        known = self._memory().get(task.name, Memory())
        if self._rests(name, known):
            return ""
        reason, traffic = self._reason(task, name, known), self._traffic(task, known)
        if not reason and not traffic:
            return ""
        log.warning("%s: %s", task.name, reason or traffic)
        self._run(task, name, known, harvest=bool(traffic))
        return task.name

    def _rests(self, name: str, known: Memory) -> bool:
        """Whether the run has failed so lately that it is left alone."""
        if known.run != name or not known.failures:
            return False
        return self.clock() < _time(known.ended) + retry_after(known.failures)

    def _reason(self, task: Task, name: str, known: Memory) -> str:
        """Why the task is run now, whatever the endpoint was asked; empty where it is not."""
        if known.run == name and known.failures:
            return f"tried again, after {_times(known.failures)}"
        finished = self._finished(task, name)
        if task.folder not in self._seen and finished:
            return "looked over at the start"  # another version of Homestill may have something to do
        if finished:
            return ""
        if not known.started:
            return "runs for the first time"
        if known.run == name:
            return "goes on where it was interrupted"
        return "task, program or data changed" if self._may(task, known) else ""

    def _may(self, task: Task, known: Memory) -> bool:
        """Whether the policy lets a change be taken up now."""
        waits = task.settings.retrain.schedule
        return not waits or slot_between(waits, _time(known.started), self.clock())

    def _traffic(self, task: Task, known: Memory) -> str:
        """Why the endpoint's requests are trained on now; empty where they are too few, or it is not yet time."""
        if not known.started or not self._may(task, known):
            return ""
        try:
            count = self.new_answers(task.name, _time(known.started))
        except (HomestillError, OSError) as error:
            self._say_once(self.home.root, f"what the endpoint was asked is not trained on: {error}")
            return ""
        self._faults.pop(self.home.root, None)
        enough = count >= task.settings.retrain.min_new_traces
        return f"the teacher answered {count} requests at the endpoint since the last run" if enough else ""

    def _finished(self, task: Task, name: str) -> bool:
        return pipeline.status(self.home.runs(task.name) / name)["release"] == "done"

    def _run(self, task: Task, name: str, known: Memory, *, harvest: bool) -> None:
        self._seen.add(task.folder)
        started = self.clock().isoformat(timespec="seconds")
        remembered = replace(known, run=name, failures=known.failures if known.run == name else 0)
        code = self.work.harvest(task.folder) if harvest else 0
        if (
            code == 0
        ):  # until then the answers are still counted from the last start, so that none is forgotten
            remembered = replace(remembered, started=started)
            self._remember(task.name, remembered)
            code = self.work.run(task.folder)
        ended = self.clock().isoformat(timespec="seconds")
        if code == 0:
            self._remember(task.name, replace(remembered, ended=ended, failures=0))
        elif self.stop.is_set():
            log.warning("%s: stopped; the next start goes on from here", task.name)
        else:
            failed = replace(remembered, ended=ended, failures=remembered.failures + 1)
            self._remember(task.name, failed)
            log.warning(
                "%s: failed (exit code %d); next try in %s", task.name, code, retry_after(failed.failures)
            )

    def _run_name(self, task: Task) -> str:
        files = [file for split in task.data_files.values() for file in split]
        state = [
            (str(file), status.st_size, status.st_mtime_ns)
            for file in sorted({task.folder / "task.yaml", *files, *task.folder.rglob("*.py")})
            for status in [file.stat()]
        ]
        before, name = self._names.get(task.folder, (None, ""))
        if state != before:
            name = pipeline.run_name(task)
            self._names[task.folder] = (state, name)
        return name

    def _memory(self) -> dict[str, Memory]:
        file = self.home.root / STATE
        stored: Mapping[str, dict[str, Any]] = read_json(file) if file.is_file() else {}
        return {name: Memory(**each) for name, each in stored.items()}

    def _remember(self, task: str, memory: Memory) -> None:
        everything = self._memory() | {task: memory}
        write_json(self.home.root / STATE, {name: asdict(each) for name, each in everything.items()})

    def _say_once(self, folder: Path, text: str) -> None:
        if self._faults.get(folder) != text:
            self._faults[folder] = text
            log.warning("%s", text)


def retry_after(failures: int) -> timedelta:
    """How long a failed run rests: 10 s, doubled with every failure, an hour at most."""
    return min(FIRST_RETRY * (1 << min(failures - 1, 20)), LONGEST_RETRY)


def slot_between(schedule: str, since: datetime, now: datetime) -> bool:
    """Whether a slot of `retrain.schedule` lies after `since` and not after `now`."""
    kind, value = schedule.split()[:2]
    if kind == "every":
        return now >= since + timedelta(hours=int(value))
    hour, minute = map(int, value.split(":"))
    latest = now.astimezone(UTC).replace(hour=hour, minute=minute, second=0, microsecond=0)
    if latest > now:
        latest -= timedelta(days=1)
    return latest > since


def require_folder(folder: Path) -> None:
    """Raise TaskError where there is no folder to watch."""
    if not folder.is_dir():
        raise TaskError([f"{folder} is no folder; give the one that holds the task folders"])


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _times(count: int) -> str:
    return "one failure" if count == 1 else f"{count} failures"

"""The order of the stages, and when one may be skipped. No other file knows it.

A stage's folder holds `stage.json`: the hash of the inputs it was started with, and whether it was
finished. The same hash, finished: nothing to do. The same hash, unfinished: the stage finds its own
partial work and goes on. Another hash: the folder is emptied first.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from trainer.errors import DiskError, TaskError
from trainer.runs import Home, Run, locked, read_json, sha256_json, write_json
from trainer.task import Task
from trainer.traces import Store

ORDER = ("capture", "curate", "train", "export", "register", "evaluate", "certify", "release")
OPERATIONAL = ("api_base", "concurrency", "timeout_s", "retries", "budget_usd")
"""Settings of the teacher that say how to reach and pace it, and change no outcome."""
log = logging.getLogger("homestill.pipeline")


@dataclass(frozen=True)
class Stage:
    """A stage as the pipeline sees it."""

    name: str
    inputs: Callable[[Run], dict[str, Any]]
    run: Callable[[Run], None]


def stage(name: str) -> Stage:
    """A stage by its name; its module is imported only now, since some take seconds."""
    module = import_module(f"trainer.{name}")
    return Stage(name, module.inputs, module.run)


def run_name(task: Task) -> str:
    """A run's name follows from task, program and data: the same inputs find the same run again."""
    settings = task.settings.model_dump(mode="json")
    for operational in OPERATIONAL:
        settings["teacher"].pop(operational)
    settings["student"]["train"].pop("processes")  # nor on how many processes it is trained
    settings.pop("retrain")  # nor when it is run
    return sha256_json([settings, task.code_sha256, task.data_sha256])[:12]


def open_run(
    task: Task,
    home: Home,
    store: Store,
    environment: Mapping[str, str],
    *,
    force: bool = False,
    concurrency: int | None = None,
) -> Run:
    """The run of this task as it stands now; its folder is made if it is new."""
    folder = home.runs(task.name) / run_name(task)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "task.json").is_file():
        about = {"folder": str(task.folder), "settings": task.settings.model_dump(mode="json")}
        write_json(folder / "task.json", about)
    return Run(task, home, store, folder, environment, force=force, concurrency=concurrency)


def execute(run: Run, known: Iterable[Stage]) -> list[str]:
    """Run those of the given stages that are not up to date, in the order given.

    Returns:
        Names of the stages that did something.

    Raises:
        HomestillError: as the stages do. BusyError when another process runs this task.
    """
    with locked(run.home.runs(run.task.name), run.task.name, run.name):
        return [one.name for one in known if step(run, one)]


def step(run: Run, stage: Stage) -> bool:
    """Bring one stage up to date; False when it was."""
    folder = run.stage(stage.name)
    fingerprint = sha256_json(stage.inputs(run))
    record = _record(folder)
    if record.get("inputs") == fingerprint and record.get("done"):
        log.info("%s: nothing to do", stage.name)
        return False
    if record.get("inputs") != fingerprint:
        _empty(folder)
        if _link_from_another_run(run, stage.name, fingerprint):
            log.warning("%s: taken from an earlier run with the same inputs", stage.name)
            return False
        write_json(folder / "stage.json", {"inputs": fingerprint, "done": False})
    started = time.monotonic()
    try:
        stage.run(run)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskError(
                f"{stage.name}: the disk below {run.home.root} is full; free some space and run again"
            ) from error
        raise
    seconds = round(time.monotonic() - started, 1)
    write_json(folder / "stage.json", {"inputs": fingerprint, "done": True, "seconds": seconds})
    log.warning("%s: done in %.0f s", stage.name, seconds)
    return True


def up_to_date(run: Run, stage: Stage) -> bool:
    """Whether the stage was finished with the inputs that it has now."""
    record = _record(run.folder / stage.name)
    return bool(record.get("done")) and record.get("inputs") == sha256_json(stage.inputs(run))


def require(run: Run, name: str) -> None:
    """Raise TaskError unless every stage before `name` is finished."""
    for earlier in ORDER[: ORDER.index(name)]:
        if not _record(run.folder / earlier).get("done"):
            raise TaskError(
                [f"{name} needs {earlier}, which is not finished; run: homestill {earlier} {run.task.folder}"]
            )


def status(folder: Path) -> dict[str, str]:
    """Each stage of a run folder: done, interrupted or open."""
    states = {}
    for name in ORDER:
        record = _record(folder / name)
        states[name] = "done" if record.get("done") else "interrupted" if record else "open"
    return states


def _record(folder: Path) -> dict[str, Any]:
    file = folder / "stage.json"
    if not file.is_file():
        return {}
    found: dict[str, Any] = read_json(file)
    return found


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _link_from_another_run(run: Run, name: str, fingerprint: str) -> bool:
    """Hard-link a stage's outputs from a run of this task that finished it with the same inputs."""
    for other in run.folder.parent.iterdir():
        record = _record(other / name) if other != run.folder and other.is_dir() else {}
        if record.get("inputs") == fingerprint and record.get("done"):
            skip = shutil.ignore_patterns("stage.json")
            shutil.copytree(
                other / name, run.folder / name, copy_function=_link, dirs_exist_ok=True, ignore=skip
            )
            write_json(run.folder / name / "stage.json", record)  # last: until then nothing counts as done
            return True
    return False


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)

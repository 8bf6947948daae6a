"""What may go: old releases and runs, the base models converted for them, what was left half done, and Ollama's copies.

Kept are, of every task, the current release and the promoted one before it, which a rollback needs, some more
of the newest, the runs that made them, the newest run, the models that DSPy's optimizers made, and whatever was
touched lately. Traces are never pruned: they were paid for. Of Ollama's models only such go as our own records
name, and none that a kept release or run still names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve import release as releases
from trainer.runs import Home, locked
from trainer.seam import translated

DAY_S = 86_400.0
REGISTRATION = "register/registration.json"
MODEL = re.compile(r"[a-z0-9][a-z0-9-]{0,39}:(base-)?[0-9a-f]{12}")
"""How we name models in Ollama; nothing else is ever removed there."""


@dataclass(frozen=True)
class Policy:
    """What is kept beyond the current release and the one before it."""

    releases: int = 3
    """The newest of a task, promoted or not."""
    days: float = 14.0
    """Runs, and what was left half done, that were touched within so many days."""


@dataclass(frozen=True)
class Item:
    """A file or folder that may go."""

    path: Path
    kind: str
    """release, run, base model or leftover."""
    task: str | None = None


@dataclass(frozen=True)
class Plan:
    """What would go."""

    items: list[Item]
    bytes: int
    """What the disk gains: a file with a hard link that stays gains nothing."""
    models: list[str]
    """Names in Ollama."""


def plan(home: Home, policy: Policy = Policy(), now: Callable[[], float] = time.time) -> Plan:
    """Look at the home; nothing is changed.

    Raises:
        ReleaseError: a task's `current` names no version, so what must stay is not known.
    """
    lately = now() - policy.days * DAY_S
    items: list[Item] = []
    kept_records: list[Path] = []
    for task in _tasks(home):
        kept = _kept_releases(home.releases(task), policy)
        versions = releases.versions(home.releases(task))
        items += [Item(home.releases(task) / each, "release", task) for each in versions if each not in kept]
        kept_records += [home.releases(task) / each for each in kept]
        stay, go = _runs(home.runs(task), kept, lately)
        items += [Item(run, "run", task) for run in go]
        kept_records += stay
        items += [Item(path, "leftover", task) for path in _leftovers(home.releases(task), lately)]
    items += [Item(path, "base model") for path in _unused_bases(home, kept_records)]
    gone = {name for item in items if item.kind in ("release", "run") for name in _models(item.path)}
    used = {name for path in kept_records for name in _models(path)}
    return Plan(items, _gain([item.path for item in items]), sorted(gone - used))


def carry_out(planned: Plan, home: Home, remove_model: Callable[[str], None] | None) -> None:
    """Remove what was planned. Models first: the records that name them go after.

    Args:
        remove_model: takes a model out of Ollama; None where there is none.

    Raises:
        BusyError: a task is being run; nothing is removed then.
        RuntimeUnavailable: Ollama cannot be reached; no file is removed then.
    """
    with ExitStack() as locks:
        for task in sorted({item.task for item in planned.items if item.task}):
            locks.enter_context(locked(home.runs(task), task))
        for name in planned.models if remove_model else ():
            assert remove_model is not None
            remove_model(name)
        for item in planned.items:
            _remove(item.path)


def _tasks(home: Home) -> list[str]:
    folders = [*home.releases("").glob("*"), *home.runs("").glob("*")]
    return sorted({path.name for path in folders if path.is_dir()})


def _kept_releases(folder: Path, policy: Policy) -> set[str]:
    versions = releases.versions(folder)
    with translated():
        current = releases.current_version(folder)
    kept = set(versions[-policy.releases :]) if policy.releases else set()
    if current is not None:
        kept.add(current)
        before = [each for each in versions if each < current and _promoted(folder / each)]
        kept |= set(before[-1:])
    return kept


def _promoted(release: Path) -> bool:
    return bool(_read(release / "gate.json").get("promoted", True))  # unreadable: better kept


def _runs(folder: Path, versions: set[str], lately: float) -> tuple[list[Path], list[Path]]:
    """Runs that stay, and runs that go."""
    if not folder.is_dir():
        return [], []
    runs = sorted((path for path in folder.iterdir() if path.is_dir()), key=_touched)
    go = [
        run
        for run in runs[:-1]
        if _touched(run) < lately
        and _read(run / "release" / "summary.json").get("version") not in versions
        and not _tuned(run)
    ]
    return [run for run in runs if run not in go], go


def _tuned(run: Path) -> bool:
    """Whether DSPy's optimizers made a model in it: no release says whether that is in use, so it is kept."""
    return _read(run / "task.json").get("folder", "") is None and (run / REGISTRATION).is_file()


def _touched(run: Path) -> float:
    """When a stage of the run last began or ended."""
    return max(
        (path.stat().st_mtime for path in (run, *run.glob("*/stage.json"), *run.glob("task.json"))),
        default=0.0,
    )


def _leftovers(folder: Path, lately: float) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.glob(".*")) if path.is_dir() and path.stat().st_mtime < lately]


def _unused_bases(home: Home, kept: Iterable[Path]) -> list[Path]:
    """Converted bases that no run that stays is linked to; export makes them again when they are needed."""
    used = {_inode(file) for run in kept for file in run.glob("export/base.gguf")}
    return [file for file in sorted(home.cache.glob("base-gguf/*.gguf")) if _inode(file) not in used]


def _models(record: Path) -> Iterator[str]:
    """Names in Ollama that a release or a run gave."""
    named = [_read(record / "manifest.json").get("model", {}).get("ollama")]
    registered = _read(record / REGISTRATION)
    named += [
        each.get("name")
        for each in registered.values()
        if isinstance(each, dict) and each.get("runtime") == "ollama"
    ]
    yield from (name for name in named if isinstance(name, str) and MODEL.fullmatch(name))


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; nothing where it is missing or damaged, which is why it may go."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _gain(paths: Iterable[Path]) -> int:
    links: dict[tuple[int, int], int] = {}
    about: dict[tuple[int, int], os.stat_result] = {}
    for path in paths:
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file() and not file.is_symlink():
                key = _inode(file)
                links[key] = links.get(key, 0) + 1
                about[key] = file.stat()
    return sum(about[key].st_size for key, count in links.items() if count >= about[key].st_nlink)


def _inode(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def _remove(path: Path) -> None:
    """A reader sees a folder whole or not at all."""
    if path.is_dir():
        gone = path.with_name(f".{path.name.lstrip('.')}.gone")
        path.rename(gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)

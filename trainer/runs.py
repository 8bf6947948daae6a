"""Where things lie under HOMESTILL_HOME, and the run that every stage is given."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trainer.errors import BusyError, DiskError, StoppedError
from trainer.task import Task
from trainer.traces import Store


@dataclass(frozen=True)
class Home:
    """HOMESTILL_HOME: the database, the runs, the releases and a cache that may be deleted."""

    root: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Home:
        return cls(Path(environment.get("HOMESTILL_HOME") or "~/.homestill").expanduser().resolve())

    def create(self) -> None:
        """Make the folder where there is none, for its owner alone: it will hold what people asked."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.root / 'homestill.db'}"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def runs(self, task: str) -> Path:
        return self.root / "runs" / task

    def releases(self, task: str) -> Path:
        return self.root / "releases" / task


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written below `folder`, which may not be there yet."""
    there = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    return shutil.disk_usage(there).free


@dataclass(frozen=True)
class Run:
    """One pass of a task through the stages; every stage reads and writes below `folder`."""

    task: Task
    home: Home
    store: Store
    folder: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    disk_free: Callable[[Path], int] = free_bytes
    force: bool = False
    """Go on where a stage would stop for too few or unlearnable examples."""
    concurrency: int | None = None
    """Overrides teacher.concurrency for this run."""
    stop: threading.Event | None = None
    """Set from another thread to end the run; the same run goes on where it was."""

    @property
    def name(self) -> str:
        return self.folder.name

    def stage(self, name: str) -> Path:
        """The folder of a stage, made if it is missing."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def go_on(self) -> None:
        """Raise StoppedError where the run was told to end."""
        if self.stop and self.stop.is_set():
            raise StoppedError(f"{self.folder} was stopped; the same call goes on where it was")

    def need_disk(
        self, needed: int, purpose: str, folder: Path | None = None, variable: str = "HOMESTILL_HOME"
    ) -> None:
        """Raise DiskError now rather than run out of space in an hour.

        Args:
            needed: bytes.
            folder: where they will lie, if not in the home, and the environment's name for that place.
        """
        place = folder or self.home.root
        free = self.disk_free(folder or self.folder)
        if free < needed:
            raise DiskError(
                f"{purpose} needs {needed / 1e9:.2f} GB below {place}, {free / 1e9:.2f} GB are free; "
                f"free some space (homestill prune says what may go) or point {variable} at a larger disk"
            )


@contextmanager
def locked(folder: Path, task: str, run: str = "") -> Iterator[None]:
    """Hold the task's lock: a second run of the same task gets BusyError at once.

    Args:
        run: name of the run that is worked on, which `holder` tells.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as lock:
        if not _taken(lock):
            process, _ = _held(lock)
            raise BusyError(
                f"task {task} is being run by process {process or '?'}; wait for it to end or stop it"
            )
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()} {run}")
        lock.flush()
        yield


def _taken(lock: IO[str]) -> bool:
    """Try a few times: who looks by `holder` has it for a moment."""
    for pause in (0.05, 0.05, 0.0):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(pause)
        else:
            return True
    return False


def holder(folder: Path) -> tuple[str, str]:
    """The process that holds a task's lock, and the run that it works on; both empty where nobody does."""
    if (folder / ".lock").is_file():
        with open(folder / ".lock", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _held(lock)
    return "", ""


def _held(lock: IO[str]) -> tuple[str, str]:
    lock.seek(0)
    process, _, run = lock.read().partition(" ")
    return process, run


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a value that JSON can hold; key order does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

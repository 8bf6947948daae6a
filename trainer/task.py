"""task.yaml and the data it names: loaded and validated whole, every fault reported at once.

A fault is one line: the value, the rule and the remedy, with the line of the file it stands in.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from trainer import data
from trainer.data import Example
from trainer.errors import TaskError
from trainer.faults import Location, describe, dotted, relevant
from trainer.settings import TaskSettings

FILE = "task.yaml"
"""Of a task's folder: the one name, for stages, watch and releases find it by the folder alone."""


@dataclass(frozen=True)
class Task:
    """A validated task folder."""

    folder: Path
    settings: TaskSettings

    @property
    def name(self) -> str:
        return self.settings.name

    def source(self, key: Literal["program", "metric"]) -> tuple[Path, str]:
        """The file and the name that `program` or `metric` points to."""
        file, _, attribute = getattr(self.settings, key).rpartition(":")
        return self.folder / file, attribute

    def base_path(self) -> str:
        """The base model: a folder's absolute path where it is one, else the hub's name."""
        folder = self.folder / Path(self.settings.student.base).expanduser()
        return str(folder.resolve()) if folder.is_dir() else self.settings.student.base

    @cached_property
    def data_files(self) -> dict[str | None, list[Path]]:
        """Data files by split; the key is None where curate has to split."""
        return {split: _expand(self.folder, pattern) for split, pattern in _patterns(self.settings).items()}

    @cached_property
    def data_sha256(self) -> str:
        """Hash of every data file's content, in order."""
        digest = hashlib.sha256()
        for split, files in self.data_files.items():
            for file in files:
                digest.update(f"{split}:{file.name}:".encode() + bytes.fromhex(_sha256(file)))
        return digest.hexdigest()

    @cached_property
    def code_sha256(self) -> str:
        """Hash of all Python files of the task's folder, for the program may import any of them, and of which
        class and which function in them are the program and the metric."""
        files = {*self.folder.rglob("*.py"), self.source("program")[0], self.source("metric")[0]}
        held = [(os.path.relpath(file, self.folder), _sha256(file)) for file in sorted(files)]
        meant = self.settings.program, self.settings.metric
        return hashlib.sha256(json.dumps([held, meant]).encode()).hexdigest()


def load(path: Path) -> Task:
    """Load and validate a task.

    Args:
        path: a task folder or its task.yaml.

    Raises:
        TaskError: with every fault found.
    """
    file = path if path.name == FILE else path / FILE
    if path.is_file() and path.name != FILE:  # what is given a task by its folder would read another file
        raise TaskError(
            [
                f"{path} is named {path.name}; a task is a folder with one {FILE}: give this file that name and a folder"
            ]
        )
    if not file.is_file():
        raise TaskError([f"{file} does not exist; write one with: homestill init {path}"])
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError([f"{file} cannot be read: {error}; save it as UTF-8 text"]) from None
    tree, lines, duplicates = _parse(file, text)
    faults = duplicates
    settings: TaskSettings | None = None
    try:
        settings = TaskSettings.model_validate(tree)
    except ValidationError as error:
        faults += [describe(detail, lines, file.name) for detail in relevant(error.errors())]
    faults += _file_faults(tree, file.parent.resolve(), lines, file.name)
    if settings is None or faults:
        raise TaskError(sorted(set(faults), key=faults.index))
    return Task(file.parent.resolve(), settings)


def recorded(folder: Path, file: Path) -> Task:
    """The task with the settings that a run was made with.

    Args:
        folder: of the task as it stands.
        file: the run's task.json.

    Raises:
        TaskError: this version does not know the settings, or what they name is gone.
    """
    tree, name = json.loads(file.read_text(encoding="utf-8"))["settings"], f"{file.parent.name}/{file.name}"
    try:
        settings = TaskSettings.model_validate(tree)
    except ValidationError as error:
        raise TaskError([describe(detail, {}, name) for detail in relevant(error.errors())]) from error
    if faults := _file_faults(tree, folder, {}, name):
        raise TaskError(faults)
    return Task(folder, settings)


def examples(task: Task) -> list[Example]:
    """All rows of the task's data, in file order.

    Raises:
        DataError: with every bad row's file, line and fault.
    """
    return data.read(task.data_files, task.settings.inputs, task.folder)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _parse(file: Path, text: str) -> tuple[Any, dict[Location, int], list[str]]:
    lines: dict[Location, int] = {}
    duplicates: list[str] = []
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
        _note_lines(node, (), lines, duplicates, file.name)
    except RecursionError:
        raise TaskError(
            [
                f"{file.name} is nested without end, or an alias (*name) stands inside what it names; write it out"
            ]
        ) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise TaskError(
            [f"{file.name}:{line}: not YAML: {error.problem}; mend the line (indent with spaces)"]
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise TaskError([f"{file.name}: not YAML: {error}; write dates and numbers as YAML does"]) from None
    if not isinstance(tree, dict):
        raise TaskError(
            [
                f"{file.name} holds {type(tree).__name__}; it must be a mapping of keys such as name: and program:"
            ]
        )
    return tree, lines, duplicates


def _note_lines(
    node: yaml.Node | None, at: Location, lines: dict[Location, int], duplicates: list[str], file: str
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, key.value)
            if here in lines:
                duplicates.append(
                    f"{dotted(here)} is given twice; keep one ({file}:{key.start_mark.line + 1})"
                )
            lines[here] = key.start_mark.line + 1
            _note_lines(value, here, lines, duplicates, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _note_lines(value, (*at, index), lines, duplicates, file)


def _file_faults(tree: dict[str, Any], folder: Path, lines: dict[Location, int], file: str) -> list[str]:
    """Faults of what the file points to; looked for even where other keys are wrong, so nothing is assumed."""

    def at(*key: str) -> str:
        line = next((lines[key[:size]] for size in range(len(key), 0, -1) if key[:size] in lines), None)
        return f"({file}:{line})" if line else f"({file})"

    faults = []
    for key in ("program", "metric"):
        source = str(tree.get(key, "")).rpartition(":")[0]
        if source and not (folder / source).is_file():
            faults.append(f"{key} names {folder / source}, which does not exist; correct the path {at(key)}")
    given = tree.get("data")
    for split, pattern in (given if isinstance(given, dict) else {"": given}).items():
        where = ("data", str(split)) if split else ("data",)
        if isinstance(pattern, str):
            faults += [f"{dotted(where)} {fault} {at(*where)}" for fault in _pattern_faults(folder, pattern)]
    student = tree.get("student")
    student = student if isinstance(student, dict) else {}
    recipe = student.get("train")
    replay = recipe.get("replay") if isinstance(recipe, dict) else None
    general = str(replay.get("data", "")) if isinstance(replay, dict) else ""
    if general and not (folder / Path(general).expanduser()).is_file():
        remedy = f"correct it {at('student', 'train', 'replay', 'data')}"
        faults.append(f"student.train.replay.data is {general!r}, which does not exist; {remedy}")
    base = str(student.get("base", ""))
    if base.startswith((".", "/", "~")) and not (folder / Path(base).expanduser()).is_dir():
        remedy = f"correct it or use a hub name {at('student', 'base')}"
        faults.append(f"student.base is {base!r}, which is no folder; {remedy}")
    return faults


def _pattern_faults(folder: Path, pattern: str) -> list[str]:
    found = _expand(folder, pattern)
    if not found:
        return [f"is {pattern!r}, which matches no file; correct the path"]
    wrong = [name for name in found if name.suffix not in data.READERS]
    return [f"names {name.name}; use .jsonl, .csv or .parquet files" for name in wrong]


def _patterns(settings: TaskSettings) -> dict[str | None, str]:
    given = settings.data
    if isinstance(given, str):
        return {None: given}
    return {"train": given.train, "calibrate": given.calibrate, "test": given.test}


def _expand(folder: Path, pattern: str) -> list[Path]:
    found = (folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True))
    return sorted(file for file in found if file.is_file())

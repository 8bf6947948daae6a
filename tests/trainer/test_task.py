"""task.yaml: all faults at once, each with value, rule, remedy and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tasks import write_task
from trainer import task
from trainer.errors import TaskError


def faults(folder: Path) -> list[str]:
    with pytest.raises(TaskError) as caught:
        task.load(folder)
    return caught.value.faults


def test_valid_task_loads(tmp_path: Path) -> None:
    loaded = task.load(write_task(tmp_path / "words"))
    assert loaded.name == "words"
    assert loaded.source("metric") == (tmp_path / "words" / "program.py", "correct")
    assert [len(files) for files in loaded.data_files.values()] == [1]


def test_every_fault_is_named_at_once_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        """name: Not_A_Name
program: program.py:Sorter
metrik: program.py:correct
data: {train: a.jsonl, test: b.jsonl}
inputs: []
teacher: {optimiser: gepa, concurrency: 0}
student:
  method: lorra
  train: {rank: 0}
quality: {keep: 1.2}
""",
        encoding="utf-8",
    )
    found = faults(tmp_path)
    assert (
        "name is 'Not_A_Name'; use 1-40 of a-z, 0-9 and -, starting with a letter or digit (task.yaml:1)"
        in found
    )
    assert "student.method is 'lorra'; use lora, qlora, full or prompt (task.yaml:8)" in found
    assert "student.train.rank is 0; use a number at least 1 and at most 256 (task.yaml:9)" in found
    assert "quality.keep is 1.2; use a number above 0 and below 1 (task.yaml:10)" in found
    assert "teacher.optimiser is not a known key; did you mean optimizer? (task.yaml:6)" in found
    assert "metrik is not a known key; did you mean metric? (task.yaml:3)" in found
    assert "metric is missing; add it (task.yaml)" in found
    assert "data.calibrate is missing; add it (task.yaml:4)" in found
    assert "inputs is empty; name at least one (task.yaml:5)" in found
    assert any(fault.startswith("program names") and "does not exist" in fault for fault in found)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data": "nothing/*.jsonl"}, "matches no file"),
        ({"program": "other.py:Sorter"}, "does not exist"),
        ({"program": "program.py"}, "use file.py:Name"),
        (
            {"retrain": {"schedule": "hourly"}},
            "retrain.schedule is 'hourly'; use daily HH:MM (UTC) or every N h, such as daily 03:00 (task.yaml:",
        ),
        (
            {"student": {"train": {"batch_size": 0}}},
            "student.train.batch_size is 0; use a whole number from 1 to 4096, or auto (task.yaml:",
        ),
        (
            {"student": {"train": {"batch_size": 100_000, "accumulation": 100_000}}},
            "student.train.batch_size is 100000; use a whole number from 1 to 4096, or auto (task.yaml:",
        ),
        (
            {"student": {"train": {"accumulation": 100_000}}},
            "student.train.accumulation is 100000; use a number at least 1 and at most 4096 (task.yaml:",
        ),
        (
            {"student": {"train": {"weight_decay": float("inf")}}},
            "student.train.weight_decay is inf; it should be a finite number (task.yaml:",
        ),
        (
            {"student": {"train": {"target_modules": "heads"}}},
            "student.train.target_modules is 'heads'; use all-linear, attention, mlp, or a list of names (task",
        ),
        (
            {"student": {"train": {"replay": {"data": "nowhere.jsonl"}}}},
            "student.train.replay.data is 'nowhere.jsonl', which does not exist; correct it (task.yaml:",
        ),
        ({"student": {"base": "./nowhere"}}, "which is no folder"),
        ({"curate": {"split": {"train": 0.5, "calibrate": 0.5, "test": 0.5}}}, "adds up to 1.5"),
        ({"data": 7}, "data is 7"),
    ],
)
def test_faults(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    assert any(expected in fault for fault in faults(write_task(tmp_path, **settings)))


def test_duplicate_key_is_a_fault(tmp_path: Path) -> None:
    folder = write_task(tmp_path)
    with (folder / "task.yaml").open("a", encoding="utf-8") as file:
        file.write("name: again\n")
    assert any(fault.startswith("name is given twice") for fault in faults(folder))


@pytest.mark.parametrize("text", ["name: [", "- a\n- b\n", "", "\t- x: {"])
def test_broken_yaml_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "task.yaml").write_text(text, encoding="utf-8")
    (fault,) = faults(tmp_path)
    assert "task.yaml" in fault
    assert "\n" not in fault


def appended(folder: Path, text: str) -> Path:
    with (folder / "task.yaml").open("a", encoding="utf-8") as file:
        file.write(text)
    return folder


def test_an_empty_section_is_the_default_one(tmp_path: Path) -> None:
    folder = appended(write_task(tmp_path), "student:\n  train:\nquality:\n  # keep: 0.9\n")
    plain = task.load(write_task(tmp_path / "plain"))
    assert task.load(folder).settings == plain.settings


@pytest.mark.parametrize(("key", "named"), [("1", "1"), ("on", "True")])
def test_a_key_that_is_no_text_is_not_known(tmp_path: Path, key: str, named: str) -> None:
    (fault,) = faults(appended(write_task(tmp_path), f"{key}: 2\n"))
    assert fault.startswith(f"{named} is not a known key; use one of name, program, metric")


@pytest.mark.parametrize("text", ["seed: &x [*x]\n", "seed: &x {a: *x}\n", f"seed: {'[' * 5000}\n"])
def test_endless_nesting_is_one_clear_line(tmp_path: Path, text: str) -> None:
    assert faults(appended(write_task(tmp_path), text)) == [
        "task.yaml is nested without end, or an alias (*name) stands inside what it names; write it out"
    ]


def test_missing_folder_says_how_to_start(tmp_path: Path) -> None:
    assert faults(tmp_path / "nowhere") == [
        f"{tmp_path / 'nowhere' / 'task.yaml'} does not exist; write one with: homestill init {tmp_path / 'nowhere'}"
    ]


def test_a_task_is_read_from_the_one_file_that_every_stage_finds(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "words")
    assert task.load(folder / "task.yaml") == task.load(folder)
    other = folder / "cheap.yaml"
    other.write_text((folder / "task.yaml").read_text("utf-8"), encoding="utf-8")
    assert faults(other) == [
        f"{other} is named cheap.yaml; a task is a folder with one task.yaml: give this file that name and a folder"
    ]

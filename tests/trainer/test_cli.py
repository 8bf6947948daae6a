"""The command line as a person meets it: exit codes, one-line errors, help with examples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks import write_task
from trainer.pipeline import ORDER
from trainer.runs import locked, write_json


def homestill(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", *map(str, words)]
    variables = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)


def test_help_shows_every_command_and_an_example() -> None:
    done = homestill("--help")
    assert done.returncode == 0
    for command in ("init", "check", "run", "status", "serve", "rollback", "doctor", *ORDER):
        assert f" {command} " in done.stdout
    assert "homestill init my-task" in done.stdout


@pytest.mark.parametrize("command", ["run", "check", "rollback", "train"])
def test_each_command_has_an_example(command: str) -> None:
    assert f"homestill {command} " in homestill(command, "--help").stdout.split("Options")[1]


def test_init_check_and_quote_without_a_key(tmp_path: Path) -> None:
    task = tmp_path / "mine"
    assert homestill("init", task).returncode == 0
    checked = homestill("check", task)
    assert checked.returncode == 0
    assert "task reviews is valid" in checked.stdout
    quoted = homestill("run", task, "--dry-run")
    assert quoted.returncode == 0
    assert "$" in quoted.stdout
    assert "terms may restrict" in quoted.stdout
    again = homestill("init", task)
    assert again.returncode == 1
    assert "exists and is not overwritten" in again.stderr


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"student": {"method": "lorra"}},
            "student.method is 'lorra'; use lora, qlora, full or prompt (task.yaml:",
        ),
        ({"program": "nowhere.py:X"}, "which does not exist; correct the path (task.yaml:"),
    ],
)
def test_a_bad_task_is_clear_lines_and_code_1(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    done = homestill("run", write_task(tmp_path / "bad", **change))  # type: ignore[arg-type]  # any value may be bad
    assert done.returncode == 1
    assert done.stdout == ""
    assert expected in done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


def test_bad_data_lists_the_rows(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "words")
    (folder / "data" / "more.jsonl").write_text("{\n[]\n", encoding="utf-8")
    done = homestill("check", folder)
    assert done.returncode == 1
    assert "data/more.jsonl:1" in done.stderr
    assert "data/more.jsonl:2" in done.stderr


def test_what_a_run_goes_on_with_by_force_check_does_too(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "words", rows=40)
    assert "or go on with --force" in homestill("check", folder).stderr
    assert homestill("check", folder, "--force").returncode == 0


def test_a_stage_out_of_order_says_what_to_run(tmp_path: Path) -> None:
    done = homestill("evaluate", write_task(tmp_path / "words"))
    assert done.returncode == 1
    assert "run: homestill capture" in done.stderr


def test_unknown_stage_and_unknown_release(tmp_path: Path) -> None:
    assert homestill("run", write_task(tmp_path / "words"), "--until", "trian").returncode == 2
    done = homestill("rollback", "nothing")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


def test_status_of_an_empty_home() -> None:
    done = homestill("status")
    assert done.returncode == 0
    assert "homestill init" in done.stdout


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ({}, "0 of 8, next is capture"),
        ({"capture": True, "curate": False}, "1 of 8, interrupted in curate"),
        (dict.fromkeys(ORDER, True), "all 8 done"),
    ],
)
def test_status_says_how_far_a_run_is(tmp_path: Path, records: dict[str, bool], said: str) -> None:
    run_of(tmp_path, "0123456789ab", records)
    assert said in homestill("status").stdout


def test_status_names_a_release_so_that_it_can_be_copied(tmp_path: Path) -> None:
    run_of(tmp_path, "0123456789ab", dict.fromkeys(ORDER, True), task="a-task-with-a-longer-name")
    release = tmp_path / "home" / "releases" / "a-task-with-a-longer-name"
    release.mkdir(parents=True)
    (release / "current").write_text("20260101T000000Z-9da667ab", encoding="utf-8")
    said = homestill("status", COLUMNS="80").stdout
    assert "20260101T000000Z-9da667ab" in said and "0123456789ab" in said


def run_of(
    root: Path, name: str, records: dict[str, bool], *, task: str = "words", folder: str | None = "/words"
) -> Path:
    run = root / "home" / "runs" / task / name  # tests have their home there
    write_json(run / "task.json", {"folder": folder, "settings": {"name": task}})
    for stage, finished in records.items():
        write_json(run / stage / "stage.json", {"done": finished})
    return run


def test_status_says_which_process_is_at_work_on_which_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, "0123456789ab", {"capture": True, "curate": False})
    run_of(tmp_path, "ba9876543210", {"capture": False})
    with locked(run.parent, "words", run.name):
        said = homestill("status").stdout
    assert f"1 of 8, process {os.getpid()} is in curate" in said
    assert "0 of 8, interrupted in capture" in said
    assert "1 of 8, interrupted in curate" in homestill("status").stdout


def test_status_tells_the_tunings_of_dspy_from_runs(tmp_path: Path) -> None:
    records = {"train": True, "export": True, "register": True}
    run_of(tmp_path, "0123456789ab", records, task="student", folder=None)
    run_of(tmp_path, "ba9876543210", {"train": False}, task="student", folder=None)
    said = homestill("status").stdout
    assert "tuning by DSPy, done" in said
    assert "tuning by DSPy, interrupted" in said
    assert "next is capture" not in said

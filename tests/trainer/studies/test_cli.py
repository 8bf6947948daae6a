"""Each study says before it starts what it will ask and what that can cost; a dry run leaves it at that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.trainer.studies.pretend import studied_run
from trainer.errors import BusyError, TaskError
from trainer.runs import Run, locked
from trainer.study_cli import app


def study(run: Run, *words: str) -> Result:
    environment = {"HOMESTILL_HOME": str(run.home.root), "HOMESTILL_OFFLINE": "1"}
    name, *options = words
    return CliRunner().invoke(app, [name, str(run.task.folder), *options], env=environment)


def test_a_model_for_one_predictor_is_not_studied_as_a_whole_program(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    file = run.task.folder / "task.yaml"
    settings = yaml.safe_load(file.read_text())
    settings.setdefault("student", {})["predictor"] = "sort"
    file.write_text(yaml.safe_dump(settings))
    error = study(run, "order", "--dry-run").exception
    assert isinstance(error, TaskError)
    assert "student.predictor is set" in str(error)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("demos", "--most", "2", "--limit", "5"), "6 systems, 5 examples: 30 of 30 answers are missing"),
        (("instructions", "--limit", "5"), "6 systems, 5 examples: 30 of 30 answers are missing"),
        (("order",), "budget $"),
    ],
)
def test_a_dry_run_quotes_and_asks_nothing(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    run = studied_run(tmp_path)
    spent = run.store.spent(run.task.name)
    result = study(run, *words, "--dry-run")
    assert result.exit_code == 0, result.output
    assert said in result.stdout.replace("\n", " ")
    folder = run.home.root / "studies" / run.task.name / words[0]
    assert [file.name for file in folder.iterdir()] == [".lock"]
    assert run.store.spent(run.task.name) == spent


def test_forgetting_says_how_much_there_is_to_judge(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    run = studied_run(tmp_path, student={"base": "../base"})
    for folder in (tmp_path / "base", run.stage("train") / "model"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}", encoding="utf-8")
        (folder / "model.safetensors").write_bytes(folder.name.encode())  # only hashed here
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"question": "What?", "answer": "That."}), encoding="utf-8")
    result = study(run, "forgetting", "--general", str(general), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "1 conversations, 2 of 2 still to be judged" in result.stdout


def test_a_task_without_a_finished_run_is_an_error_with_the_next_step(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    (run.folder / "register" / "stage.json").unlink()
    result = study(run, "demos", "--dry-run")
    assert isinstance(result.exception, TaskError)
    assert "homestill register" in str(result.exception)


def test_a_task_that_has_changed_is_studied_by_its_newest_finished_run(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    file = run.task.folder / "task.yaml"
    file.write_text(file.read_text(encoding="utf-8") + "seed: 99\n", encoding="utf-8")
    result = study(run, "demos", "--most", "1", "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"studying run {run.name}" in result.stderr


def test_a_study_runs_once_at_a_time(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    with locked(run.home.root / "studies" / run.task.name / "demos", run.task.name):
        result = study(run, "demos", "--dry-run")
    assert isinstance(result.exception, BusyError)

"""`homestill study`: what it will ask is said first; --dry-run asks nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.trainer.studies.pretend import Local, right, studied_run, study_of
from trainer import pipeline
from trainer.errors import BusyError, TaskError
from trainer.runs import Run, locked, write_json
from trainer.studies import study as studies
from trainer.study_cli import app


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("HOMESTILL_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "300")
    return studied_run(tmp_path)


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_dry_runs_say_what_is_missing_and_ask_nothing(run: Run) -> None:
    folder = str(run.task.folder)
    assert "10 systems, 5 examples: 50 of 50 answers are missing" in said(
        "demos", folder, "--dry-run", "--most", "4", "--limit", "5"
    )
    assert "6 systems, 5 examples: 30 of 30" in said("instructions", folder, "--dry-run", "--limit", "5")
    prices = said("order", folder, "--dry-run")
    assert "with the prompts as written" in prices and "$" in prices and "budget $20" in prices
    assert not list((run.home.root / "studies").glob("*/*/rows.jsonl"))


def test_two_processes_do_not_write_the_same_study(run: Run) -> None:
    with locked(run.home.root / "studies" / "words" / "demos", "words"), pytest.raises(BusyError):
        said("demos", str(run.task.folder), "--dry-run")


def test_the_newest_finished_run_is_studied_where_this_one_is_not(run: Run) -> None:
    fresh = replace(run, folder=run.folder.with_name("fresh"))
    fresh.folder.mkdir()
    assert studies.finished(run) == run
    assert studies.finished(fresh).folder == run.folder
    write_json(run.stage("register") / "stage.json", {"inputs": "", "done": False})
    with pytest.raises(TaskError, match=f"run: homestill run {run.task.folder}|is not finished"):
        studies.finished(fresh)
    assert pipeline.status(run.folder)["register"] == "interrupted"


def test_another_context_needs_a_runtime_that_is_ours(run: Run) -> None:
    study = study_of(run, "demos", Local(right), context=4096)
    assert study.registration("base").context == 4096
    served = replace(study.registration("base"), runtime="ollama", context=512)
    with pytest.raises(TaskError, match="--context is 4096, but ollama"):
        studies.with_context(served, 4096)
    assert studies.with_context(served, None) is served

"""`homestill watch` from its command line to the lock that it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from trainer import watch_cli
from trainer.errors import BusyError, TaskError
from trainer.runs import locked


def watch(*words: str | Path) -> Result:
    app = typer.Typer()
    app.command()(watch_cli.command)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_one_look_at_no_tasks_ends_at_once(tmp_path: Path) -> None:
    done = watch("--once", tmp_path)
    assert (done.exit_code, done.output) == (0, "")


def test_a_broken_task_stops_no_look(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "task.yaml").write_text("name: Mine\n")
    assert watch("--once", tmp_path).exit_code == 0
    assert "mine is left out: " in caplog.text


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    assert isinstance(watch("--once", tmp_path / "nowhere").exception, TaskError)


def test_two_watches_of_one_home_do_not_run_together(tmp_path: Path) -> None:
    with locked(tmp_path / "home" / "watch", "watch"):  # tests have their home there
        assert isinstance(watch("--once", tmp_path).exception, BusyError)

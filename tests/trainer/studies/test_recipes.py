"""Prompts that have grown are measured before the teacher is paid for answers to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny import tiny_base
from tests.trainer.studies.pretend import studied_run
from trainer import program as programs
from trainer.errors import TrainError
from trainer.runs import Run
from trainer.studies import recipes


def run_with(run: Run, context: int) -> Run:
    settings = run.task.settings
    student = settings.student.model_copy(update={"context": context})
    return replace(run, task=replace(run.task, settings=settings.model_copy(update={"student": student})))


def test_prompts_without_room_for_an_answer_stop_the_step_and_name_the_context(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_base(tmp_path / "words" / "base")
    run = studied_run(tmp_path, student={"base": "./base", "context": 512, "max_tokens": 32})
    grown = programs.load(run.task)
    grown.module.sort.demos = [{"text": f"word number {n}", "label": "even"} for n in range(16)]
    with pytest.raises(
        TrainError, match=r"^the optimised prompts of 0 of \d+ .* context, 512 tokens; "
    ) as found:
        recipes.captured(grown.state).run(run)
    said = str(found.value)
    assert "at least 2 are needed, and the teacher was not asked yet" in said
    assert "max_length" not in said
    room = int(said.partition("--context ")[2].split()[0])
    recipes.require_room(run_with(run, room), grown)
    assert not caplog.records
    recipes.require_room(run_with(run, room - 32), grown)  # the longest leaves its answer no room
    assert f"--context {room} holds them all" in caplog.text

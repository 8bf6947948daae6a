"""Which examples are asked, what counts as wrong, and how two systems on the same examples are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tasks import SETTINGS, write_task
from tests.trainer.studies.pretend import Local, Messages, gold, reply, right, studied_run, study_of
from trainer import pipeline, task
from trainer.errors import EvaluateError, RuntimeUnavailable, TaskError
from trainer.runs import write_jsonl
from trainer.studies.report import facts
from trainer.studies.study import System, answered, finished, minutes, paired_difference, scores


def test_a_limit_takes_a_random_part_and_a_larger_one_adds_to_it(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    ids = [example.id for example in study_of(run, "demos", Local(right)).examples()]
    few = [example.id for example in study_of(run, "demos", Local(right), limit=3).examples()]
    more = [example.id for example in study_of(run, "demos", Local(right), limit=5).examples()]
    assert len(ids) > 5
    assert few == more[:3] == ids[:3] == sorted(ids)[:3]


def test_a_changed_task_is_studied_as_its_newest_finished_run_was_made(tmp_path: Path) -> None:
    run = studied_run(tmp_path, student={"method": "full", "max_tokens": 99})
    write_task(
        run.task.folder, 60, student={"base": "other/base"}, teacher={**SETTINGS["teacher"], "budget_usd": 7}
    )
    changed = pipeline.open_run(task.load(run.task.folder), run.home, run.store, run.environment)
    found = finished(changed)
    assert found.folder == run.folder != changed.folder
    assert found.task.settings.student == run.task.settings.student
    assert found.task.settings.teacher.budget_usd == 7  # what may be spent is for today's task to say
    study = study_of(found, "demos", Local(right))
    assert (facts(study, 1)["method"], study.max_tokens) == ("full, q4_k_m", 99)
    (run.task.folder / "program.py").rename(run.task.folder / "renamed.py")
    with pytest.raises(TaskError, match=rf"program.py, which does not exist.*{run.name}/task.json"):
        finished(changed)


def test_an_empty_test_split_is_an_error(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    write_jsonl(run.folder / "curate" / "test.jsonl", [])
    with pytest.raises(EvaluateError, match="test split is empty"):
        study_of(run, "demos", Local(right)).examples()


def test_what_is_unreadable_or_cut_off_is_wrong(tmp_path: Path) -> None:
    run = studied_run(tmp_path)

    def say(_: str, messages: Messages) -> tuple[str, str]:
        number = int(messages[-1]["content"].rpartition("word number ")[2].split()[0])
        if number % 3 == 0:
            return "no field at all", "stop"
        return reply(gold(messages))[0], "length" if number % 3 == 1 else "stop"

    study = study_of(run, "demos", Local(say))
    system = System("it", "base", study.registration("base"), study.program())
    rows = answered(study, [system], study.examples())["it"]
    third = [int(str(example.values["text"]).rpartition(" ")[2]) % 3 for example in study.examples()]
    assert scores(rows).tolist() == [1.0 if rest == 2 else 0.0 for rest in third]
    assert {rest for rest, row in zip(third, rows, strict=True) if row.error} == {0, 1}


def test_a_model_that_is_gone_is_an_error_and_no_score(tmp_path: Path) -> None:
    def gone(*_: object) -> tuple[str, str]:
        raise RuntimeUnavailable("the server is gone")

    study = study_of(studied_run(tmp_path), "demos", Local(gone))
    system = System("it", "base", study.registration("base"), study.program())
    with pytest.raises(RuntimeUnavailable, match="gone"):
        answered(study, [system], study.examples())
    assert study.rows.of(system.identity(study.max_tokens)) == {}


def test_the_estimate_falls_to_nothing_as_answers_come(tmp_path: Path) -> None:
    study = study_of(studied_run(tmp_path), "demos", Local(right))
    system = System("it", "base", study.registration("base"), study.program())
    examples = study.examples()
    assert minutes(study, [system], examples) == pytest.approx(
        len(examples) / 60
    )  # a second each, not measured
    answered(study, [system], examples)
    assert minutes(study, [system], examples) == 0.0


def test_a_paired_difference_is_tighter_than_its_parts() -> None:
    old = np.array([0.0, 1.0] * 50)
    same = paired_difference(old, old, seed=0)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    new = old.copy()
    new[:20] = 1.0
    found = paired_difference(new, old, seed=0)
    assert found.mean == pytest.approx(0.1)
    assert 0.03 < found.low < 0.1 < found.high < 0.18
    assert paired_difference(old[:1], old[:1], seed=0).low == -1.0

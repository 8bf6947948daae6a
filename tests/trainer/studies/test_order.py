"""Every step is taken once, on what stood before it; synergy is the combination's gain over the better single."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from dspy.utils.exceptions import ContextWindowExceededError

from tests.trainer.studies.pretend import (
    Local,
    Messages,
    buy,
    other,
    registered,
    reply,
    right,
    shown,
    studied_run,
    study_of,
)
from trainer import program as programs
from trainer import splits
from trainer.errors import RuntimeUnavailable
from trainer.pipeline import Stage
from trainer.runs import Run, read_json, write_json
from trainer.studies import order, prompts, recipes

SETTINGS = prompts.Settings("bootstrap", 20)


@dataclass
class Stages:
    """Stands in for the pipeline: notes what it was given, and registers a model named after it."""

    runs: list[Run] = field(default_factory=list)
    stages: list[list[str]] = field(default_factory=list)

    def __call__(self, run: Run, known: Sequence[Stage]) -> list[str]:
        self.runs.append(run)
        self.stages.append([stage.name for stage in known])
        if not (run.folder / "register" / "registration.json").is_file():
            buy(run, programs.load(run.task), 0.02)
            for stage in known:
                write_json(run.stage(stage.name) / "stage.json", {"done": True, "seconds": 12.0})
            name = f"trained-{run.name.partition('-')[0]}"
            write_json(run.stage("register") / "registration.json", {"model": registered(run, "c", name)})
        return self.stages[-1]


def talented(model: str, messages: Messages) -> tuple[str, str]:
    """The base is right with demonstrations of every second question, what was trained on demonstrations always."""
    if model.endswith("trained-pw"):
        return right(model, messages)
    number = int(messages[-1]["content"].rpartition("word number ")[2].split()[0])
    good = number % 4 < 2 if model.endswith("model") else number % 4 == 0 and shown(messages) > 0
    return right(model, messages) if good else reply(other(messages))


def test_recipes_steps_and_synergy(tmp_path: Path) -> None:
    local, stages = Local(talented), Stages()
    outcome = order.run(study_of(studied_run(tmp_path, 120), "order", local), SETTINGS, stages)
    found = outcome.figures["recipes"]
    assert list(found) == ["base", "prompt only", "fine-tune only", "p → w", "w → p", "p → w → p"]
    assert found["base"]["score"]["mean"] == 0.0
    assert 0.1 < found["prompt only"]["score"]["mean"] < 0.4
    assert 0.3 < found["fine-tune only"]["score"]["mean"] < 0.7
    assert found["p → w"]["score"]["mean"] == 1.0
    assert outcome.figures["best_single"] == "fine-tune only"
    assert outcome.figures["best_combined"] == "p → w"
    gain = 1.0 - found["fine-tune only"]["score"]["mean"]
    assert outcome.figures["synergy"]["mean"] == pytest.approx(gain)
    assert outcome.figures["synergy"]["low"] > 0
    assert "beats" in outcome.finding
    assert found["w → p"]["synergy"]["mean"] == pytest.approx(0.0)
    assert outcome.table.rows[0][3] == ""


def test_costs_add_up_step_by_step(tmp_path: Path) -> None:
    run = studied_run(tmp_path, 120)
    outcome = order.run(study_of(run, "order", Local(talented)), SETTINGS, Stages())
    asked, rows = len(recipes.examples(run)), len(splits.assigned(run.task).examples())
    assert asked < rows  # the task's run asked for test and calibrate as well, which no weights step needs
    found = outcome.figures["recipes"]
    assert found["base"]["usd"] == found["base"]["seconds"] == found["prompt only"]["usd"] == 0.0
    assert found["fine-tune only"]["usd"] == pytest.approx(0.01 * asked)
    assert found["fine-tune only"]["seconds"] == pytest.approx(30 * asked / rows + 4 * 30)
    assert found["p → w"]["last_step"] == {
        "usd": pytest.approx(0.02 * asked),
        "seconds": pytest.approx(60.0),
    }
    whole = found["prompt only"]["seconds"] + 60.0
    assert found["p → w"]["seconds"] == pytest.approx(whole)
    assert {row[-1] for row in outcome.table.rows} == {"0"}
    assert [row[0] for row in outcome.more["Each step"].rows][:2] == [
        "base, then prompts",
        "base, then weights",
    ]


def test_prompts_that_do_not_fit_are_told(tmp_path: Path) -> None:
    def narrow(model: str, messages: Messages) -> tuple[str, str]:
        if shown(messages) and "trained" in model:
            raise ContextWindowExceededError(model="m", message="too long")
        return right(model, messages) if "trained" in model else talented(model, messages)

    study = study_of(studied_run(tmp_path), "order", Local(narrow), limit=5)
    outcome = order.run(study, SETTINGS, Stages())
    assert outcome.table.columns[-1] == "Did not fit"
    assert [row[-1] for row in outcome.table.rows if "w" in row[0]][-1] == "5"
    assert "--context" in outcome.notes[-1]


def test_a_weights_step_trains_on_the_prompts_that_stand(tmp_path: Path) -> None:
    stages = Stages()
    study = study_of(studied_run(tmp_path), "order", Local(talented), context=1024)
    points = order.reach(study, SETTINGS, stages)
    (run,) = stages.runs  # fine-tune only is the task's own run
    assert stages.stages == [["capture", "curate", "train", "export", "register"]]
    assert points["pw"].state == points["p"].state is not None
    optimized = read_json(points["p"].state)
    assert optimized["sort"]["demos"]
    own, source = run.task, study.run.task
    assert own.settings.teacher.optimizer == "none"
    assert own.settings.student.context == 1024
    theirs, ours = splits.assigned(source).splits, splits.assigned(own).splits
    assert [each.id for each in ours["train"]] == [each.id for each in theirs["train"]]
    assert ours["test"] == []
    assert own.code_sha256 == source.code_sha256
    assert run.home.runs(run.task.name) not in run.folder.parents  # no run of the task can be linked from it
    assert {each.registration.context for each in points.values()} == {1024}


def test_general_data_beside_the_task_folder_is_found_from_the_study(tmp_path: Path) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n", encoding="utf-8")
    run = studied_run(tmp_path, student={"train": {"replay": {"data": "../general.jsonl"}}})
    study = study_of(run, "order", Local(right))
    replay = recipes.derived(study, study.program().state).settings.student.train.replay
    assert replay is not None
    assert replay.data == str(general)


def test_the_capture_of_a_weights_step_depends_on_its_prompts(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    one, two = (
        recipes.captured({"sort": {"demos": []}}),
        recipes.captured({"sort": {"demos": [{"text": "a"}]}}),
    )
    assert one.inputs(run) != two.inputs(run)
    assert one.name == "capture"


def test_a_second_run_asks_nothing_and_takes_no_step_again(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    first = order.run(study_of(run, "order", Local(talented)), SETTINGS, Stages())
    again = Local(talented)
    assert order.run(study_of(run, "order", again), SETTINGS, Stages()) == first
    assert not again.started


def test_a_step_that_changed_nothing_says_so(tmp_path: Path) -> None:
    study = study_of(studied_run(tmp_path), "order", Local(lambda _, messages: reply(other(messages))))
    search = prompts.Settings(
        "random_search", 10
    )  # every candidate scores 0: the first one, as written, stays
    outcome = order.run(study, search, Stages())
    assert "found nothing better" in outcome.notes[0]
    assert "“prompt only”, “w → p”, “p → w → p”" in outcome.notes[0]
    asked = len(recipes.examples(study.run))
    assert outcome.figures["recipes"]["p → w"]["last_step"]["usd"] == pytest.approx(
        0.01 * asked
    )  # the task's own run, not a new one


def test_a_killed_optimisation_asks_nothing_twice(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    asked = 0

    def dies(model: str, messages: Messages) -> tuple[str, str]:
        nonlocal asked
        asked += 1
        if asked == 10:
            raise KeyboardInterrupt
        return reply(other(messages))  # never good enough, so all rows are tried

    killed = Local(dies)
    with pytest.raises(KeyboardInterrupt):
        order.reach(study_of(run, "order", killed), SETTINGS, Stages())
    resumed = Local(lambda _, messages: reply(other(messages)))
    order.reach(study_of(run, "order", resumed), SETTINGS, Stages())
    base = {one for one in resumed.asked if one[0].endswith("base")}
    assert len(base & set(killed.asked)) == 1


def test_a_model_that_goes_away_stops_the_study_and_leaves_no_step(tmp_path: Path) -> None:
    study = study_of(studied_run(tmp_path), "order", Local(_gone))
    with pytest.raises(RuntimeUnavailable, match="gone"):
        order.reach(study, SETTINGS, Stages())
    assert not list(study.folder.glob("prompts/*/step.json"))


def test_the_quote_is_for_what_the_teacher_still_has_to_answer(tmp_path: Path) -> None:
    study = study_of(studied_run(tmp_path), "order", Local(right))
    plain, full = order.quoted(study)
    assert plain.examples == len(recipes.examples(study.run))
    assert plain.usd < full.usd
    other_teacher = {
        "model": "openai/pretend",
        "optimizer": "bootstrap",
        "price_per_1m": {"input": 1, "output": 2},
    }
    optimised = study_of(studied_run(tmp_path / "two", teacher=other_teacher), "order", Local(right))
    assert order.quoted(optimised)[0].examples == 2 * plain.examples


def test_the_work_of_this_machine_is_quoted(tmp_path: Path) -> None:
    study = study_of(studied_run(tmp_path), "order", Local(right), limit=4)
    work = order.workload(study, SETTINGS)  # 20 rows: 4 for validation, 11 candidates, 20 tried
    assert work.answers == 3 * (4 * 11 + 20) + 6 * 4
    assert (work.tunings, work.seconds) == (1, 4 * 30.0)
    assert "1 times fine-tuning at about 2 minutes" in work.sentence()


def test_the_derived_task_keeps_helpers_and_leaves_out_homes(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    helper = run.task.folder / "parts" / "helper.py"
    helper.parent.mkdir()
    helper.write_text("VALUE = 1\n", encoding="utf-8")
    (run.task.folder / ".secret").write_text("x", encoding="utf-8")
    study = study_of(run, "order", Local(right))
    own = recipes.derived(study, study.program().state)
    assert (own.folder / "parts" / "helper.py").read_text(encoding="utf-8") == "VALUE = 1\n"
    assert not (own.folder / ".secret").exists()
    assert json.loads((own.folder / "study" / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert own.settings.student.train.max_length == run.task.settings.student.train.max_length
    longer = recipes.derived(study_of(run, "order", Local(right), context=4096), {"sort": {"demos": [{}]}})
    assert longer.data_sha256 == own.data_sha256
    assert longer.settings.student.train.max_length == longer.settings.student.context == 4096


def test_a_run_of_another_version_of_the_task_is_no_recipe(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    assert order.own(run)
    old = replace(run, folder=run.folder.parent / "0123456789ab")
    shutil.copytree(run.folder, old.folder)
    assert not order.own(old)
    stages = Stages()
    order.reach(study_of(old, "order", Local(talented)), SETTINGS, stages)
    assert [made.name.partition("-")[0] for made in stages.runs] == ["w", "pw"]


def _gone(*_: Any) -> tuple[str, str]:
    raise RuntimeUnavailable("the server is gone")

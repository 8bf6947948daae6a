"""Demonstrations come from the teacher's stored answers, nested, the same for base and student."""

from __future__ import annotations

from pathlib import Path

import pytest
from dspy.utils.exceptions import ContextWindowExceededError

from tests.trainer.studies.pretend import Local, Messages, other, reply, right, shown, studied_run, study_of
from trainer.errors import EvaluateError
from trainer.splits import assigned
from trainer.statistics.scores import Interval
from trainer.studies import demos


def needs(model: str, messages: Messages) -> tuple[str, str]:
    """The base needs three demonstrations, the student one."""
    enough = shown(messages) >= (3 if model.endswith("base") else 1)
    return right(model, messages) if enough else reply(other(messages))


def interval(mean: float) -> Interval:
    return Interval(mean, 0.0, 1.0)


def test_the_ratio_is_of_the_demonstrations_that_reach_the_bases_best(tmp_path: Path) -> None:
    local = Local(needs)
    outcome = demos.run(study_of(studied_run(tmp_path), "demos", local), most=4)
    means = {role: [each["mean"] for each in outcome.figures[role]] for role in ("base", "student")}
    assert means == {"base": [0, 0, 0, 1, 1], "student": [0, 1, 1, 1, 1]}
    assert outcome.figures["efficiency"] == {"score": 1.0, "base": 3, "student": 1, "best": 1, "ratio": 3.0}
    assert "ratio of 3.0" in outcome.finding
    assert outcome.table.marked == "1"


def test_every_prompt_holds_the_demonstrations_of_the_one_before(tmp_path: Path) -> None:
    local = Local(right)
    study = study_of(studied_run(tmp_path), "demos", local, limit=2)
    given = demos.chosen(study, 3)
    texts = [each["sort"]["text"] for each in given]
    assert len(set(texts)) == 3
    trained = {example.values["text"] for example in assigned(study.run.task).splits["train"]}
    assert set(texts) <= trained
    assert all(each["sort"]["label"] in ("odd", "even") for each in given)
    assert demos.chosen(study, 2) == given[:2]
    demos.run(study, most=2)
    assert {str(prompt).count("word number") for _, prompt in local.asked} == {1, 2, 3}


def test_a_killed_study_asks_nothing_twice(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    asked = 0

    def dies(model: str, messages: Messages) -> tuple[str, str]:
        nonlocal asked
        asked += 1
        if asked == 20:
            raise KeyboardInterrupt
        return needs(model, messages)

    killed = Local(dies)
    with pytest.raises(KeyboardInterrupt):
        demos.run(study_of(run, "demos", killed), most=2)
    resumed = Local(needs)
    first = demos.run(study_of(run, "demos", resumed), most=2)
    assert (killed.asked & resumed.asked).total() == 1  # the one whose answer never came
    again = Local(needs)
    assert demos.run(study_of(run, "demos", again), most=2) == first
    assert not again.started


def test_prompts_that_do_not_fit_count_as_wrong_and_are_told(tmp_path: Path) -> None:
    def narrow(model: str, messages: Messages) -> tuple[str, str]:
        if shown(messages) == 2:
            raise ContextWindowExceededError(model="m", message="too long")
        return right(model, messages)

    outcome = demos.run(study_of(studied_run(tmp_path), "demos", Local(narrow), limit=5), most=2)
    assert [row[-1] for row in outcome.table.rows] == ["0", "0", "10"]
    assert outcome.table.rows[2][1] == "0.0"
    assert "--context" in outcome.notes[0]


def test_more_demonstrations_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluateError, match="100 demonstrations"):
        demos.run(study_of(studied_run(tmp_path), "demos", Local(right)), most=100)


@pytest.mark.parametrize(
    ("base", "student", "ratio", "words"),
    [
        ([0.0, 0.0], [0.5, 0.9], None, "scores 0 with every number"),
        ([0.1, 0.4, 0.8], [0.2, 0.3, 0.4], None, "does not reach"),
        ([0.1, 0.4, 0.8], [0.9, 0.3, 0.4], None, "without a demonstration"),
        ([0.8, 0.4, 0.4], [0.1, 0.9, 0.4], None, "with k = 1"),
        ([0.1, 0.2, 0.3, 0.4, 0.8], [0.1, 0.2, 0.8, 0.1, 0.1], 2.0, "ratio of 2.0"),
    ],
)
def test_the_sentence_says_what_was_reached(
    base: list[float], student: list[float], ratio: float | None, words: str
) -> None:
    found = demos.efficiency([interval(value) for value in base], [interval(value) for value in student])
    assert found.ratio == ratio
    assert words in found.sentence()

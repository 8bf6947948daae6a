"""Only the instructions change, each variant is asked of both models, and a bad file says all its faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from dspy.utils.exceptions import ContextWindowExceededError

from tests.trainer.studies.pretend import Local, Messages, other, reply, right, studied_run, study_of
from trainer.errors import TaskError
from trainer.studies import instructions


def follows(model: str, messages: Messages) -> tuple[str, str]:
    """The base needs steps; the student knows what to do."""
    understood = model.endswith(":model") or "Proceed in these steps" in messages[0]["content"]
    return right(model, messages) if understood else reply(other(messages))


def test_without_a_file_there_are_bare_written_and_multi_step_ones(tmp_path: Path) -> None:
    study = study_of(studied_run(tmp_path), "instructions", Local(follows))
    given = instructions.variants(study, None)
    assert [each.name for each in given] == ["bare", "as written", "multi-step"]
    assert given[1].texts == {"sort": "Sort the word."}
    assert given[0].words() < given[2].words()
    outcome = instructions.run(study, given)
    assert outcome.figures["spread"] == {"base": 1.0, "student": 0.0}
    assert [row[2] for row in outcome.table.rows] == ["0.0", "0.0", "100.0"]
    assert [row[4] for row in outcome.table.rows] == ["100.0"] * 3
    assert outcome.finding.endswith("the student's score moves by 0.0 points, the base's by 100.0.")


def test_prompts_that_do_not_fit_are_told(tmp_path: Path) -> None:
    def narrow(model: str, messages: Messages) -> tuple[str, str]:
        if "Proceed in these steps" in messages[0]["content"]:
            raise ContextWindowExceededError(model="m", message="too long")
        return right(model, messages)

    study = study_of(studied_run(tmp_path), "instructions", Local(narrow), limit=4)
    outcome = instructions.run(study, instructions.variants(study, None))
    assert [row[-1] for row in outcome.table.rows] == ["0", "0", "8"]
    assert "--context" in outcome.notes[0]


def test_a_base_that_is_never_right_is_said_to_be(tmp_path: Path) -> None:
    study = study_of(studied_run(tmp_path), "instructions", Local(lambda _, asked: reply(other(asked))))
    outcome = instructions.run(study, instructions.variants(study, None))
    assert outcome.finding.startswith("The base scores 0 with all instructions")


def test_the_tasks_own_file_is_read_and_an_option_goes_before_it(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    (run.task.folder / "instructions.yaml").write_text("short: Sort.\n", encoding="utf-8")
    study = study_of(run, "instructions", Local(right))
    assert [each.name for each in instructions.variants(study, None)] == ["as written", "short"]
    file = tmp_path / "mine.yaml"
    file.write_text("long:\n  sort: Sort the word with care.\n", encoding="utf-8")
    assert instructions.variants(study, file)[1] == instructions.Variant(
        "long", {"sort": "Sort the word with care."}
    )


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    run = studied_run(tmp_path)
    first = Local(follows)
    given = instructions.variants(study_of(run, "instructions", first), None)
    outcome = instructions.run(study_of(run, "instructions", first), given)
    again = Local(follows)
    assert instructions.run(study_of(run, "instructions", again), given) == outcome
    assert not again.asked
    assert set(first.asked.values()) == {1}


def test_all_faults_of_a_file_are_told(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("as written: Sort.\nempty: ''\nwho:\n  nobody: Sort.\n  sort: 3\n", encoding="utf-8")
    with pytest.raises(TaskError) as caught:
        instructions.read(file, ["sort"])
    assert len(caught.value.faults) == 4
    assert any("nobody" in fault and "use sort" in fault for fault in caught.value.faults)


def test_one_text_for_several_predictors_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "texts.yaml"
    file.write_text("short: Sort.\n", encoding="utf-8")
    with pytest.raises(TaskError, match="mapping of predictor to text"):
        instructions.read(file, ["first", "second"])
    file.write_text("[]\n", encoding="utf-8")
    with pytest.raises(TaskError, match="holds no mapping"):
        instructions.read(file, ["first"])
    with pytest.raises(TaskError, match="cannot be read"):
        instructions.read(tmp_path / "none.yaml", ["first"])

"""The task's own program and metric: loaded, run, judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Message, Request, Response, Usage

from tests.tasks import PROGRAM, write_task
from trainer import program, task
from trainer.data import Example
from trainer.errors import RuntimeUnavailable, TaskError


class Says:
    """An engine that always says the same, or raises."""

    def __init__(self, text: str | Exception) -> None:
        self.text = text
        self.calls = 0

    def complete(self, request: Request) -> Response:
        self.calls += 1
        if isinstance(self.text, Exception):
            raise self.text
        usage = Usage(input_tokens=7, output_tokens=3)
        message = Message.assistant(self.text)
        return Response(id=None, model=request.model, message=message, finish_reason="stop", usage=usage)


def loaded(folder: Path, source: str = PROGRAM, **settings: Any) -> program.Program:
    write_task(folder, **settings)
    (folder / "program.py").write_text(source, encoding="utf-8")
    return program.load(task.load(folder))


def ask(found: program.Program, engine: Says, text: str = "word number 2", label: str = "even") -> Any:
    from trainer.lm import Recorder

    inner = dspy.LM("openai/m", engine=engine, cache=False, num_retries=0)
    lm = dspy.LM("openai/m", engine=Recorder(inner), cache=False, num_retries=0)
    return program.answer(found, Example("id", {"text": text, "label": label}), lm, "student", "system")


EVEN = "[[ ## label ## ]]\neven\n\n[[ ## completed ## ]]"


def test_an_answer_holds_outputs_score_and_calls(tmp_path: Path) -> None:
    answer = ask(loaded(tmp_path), Says(EVEN))
    assert (answer.score, answer.outputs, answer.error) == (1.0, {"label": "even"}, None)
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)
    (call,) = answer.calls
    assert (call["predictor"], call["completion"]) == ("sort", EVEN)
    assert ask(loaded(tmp_path), Says(EVEN), label="odd").score == 0.0


def test_a_neighbour_can_be_imported_when_the_program_runs(tmp_path: Path) -> None:
    (tmp_path / "words_beside.py").write_text("SEEN = []\n", encoding="utf-8")
    source = PROGRAM.replace(
        "        return self.sort", "        import words_beside\n        return self.sort"
    )
    answer = ask(loaded(tmp_path, source), Says(EVEN))
    assert (answer.score, answer.error) == (1.0, None)


def test_the_predictors_fields_and_labels(tmp_path: Path) -> None:
    (field,) = loaded(tmp_path).predictors["sort"].fields
    assert (field.name, field.labels) == ("label", ("even", "odd"))


@pytest.mark.parametrize("text", ["no markers at all", "[[ ## label ## ]]\nblue"])
def test_an_unparsable_answer_scores_zero_and_is_not_asked_again(tmp_path: Path, text: str) -> None:
    engine = Says(text)
    answer = ask(loaded(tmp_path), engine)
    assert answer.score == 0.0
    assert answer.error is not None
    assert engine.calls == 1
    assert answer.calls[0]["completion"] == text


def test_a_model_that_cannot_be_reached_is_an_error_not_a_score(tmp_path: Path) -> None:
    from dspy.lm15 import TransportError

    with pytest.raises(RuntimeUnavailable):
        ask(loaded(tmp_path), Says(TransportError("connection refused")))


def test_graded_metrics_keep_their_fraction(tmp_path: Path) -> None:
    assert ask(loaded(tmp_path, metric="program.py:graded"), Says(EVEN)).score == 0.75


def test_judging_a_bare_completion_agrees(tmp_path: Path) -> None:
    found, example = loaded(tmp_path), Example("id", {"text": "word number 2", "label": "even"})
    assert found.judge_completion(example, EVEN) == 1.0
    assert found.judge_completion(example, "nonsense") == 0.0


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import nothing_of_that_name", "program.py cannot be imported: ModuleNotFoundError"),
        (PROGRAM.replace("class Sorter(", "class Other("), "program.py holds no Sorter"),
        (PROGRAM.replace("class Sorter(dspy.Module)", "class Sorter(dict)"), "derived from dspy.Module"),
        (PROGRAM.replace("dspy.Predict(Sort)", "None"), "holds no predictor"),
        (PROGRAM.replace("super().__init__()", "1 / 0"), "cannot be made: ZeroDivisionError"),
    ],
)
def test_a_bad_program_is_one_clear_line(tmp_path: Path, source: str, expected: str) -> None:
    with pytest.raises(TaskError) as caught:
        loaded(tmp_path, source)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verdict", ["1 / 0", "2", "'good'"])
def test_a_bad_metric_names_the_example(tmp_path: Path, verdict: str) -> None:
    source = PROGRAM.replace("return prediction.label == example.label", f"return {verdict}")
    with pytest.raises(TaskError, match="example id"):
        ask(loaded(tmp_path, source), Says(EVEN))


def test_a_program_that_fails_on_an_answer_scores_zero(tmp_path: Path) -> None:
    source = PROGRAM.replace("return self.sort(text=text)", "return {}[self.sort(text=text).label]")
    answer = ask(loaded(tmp_path, source), Says(EVEN))
    assert (answer.score, answer.error) == (0.0, "KeyError: 'even'")
    assert answer.calls

"""DSPy's rows as conversations, and the metric that decides which of them are learned."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from dspy.clients.utils_finetune import TrainDataFormat

from tests.trainer.test_provider import ROWS, chat
from trainer.errors import TrainError
from trainer.provider import at_least
from trainer.provider.rows import conversations


def test_rows_become_conversations_in_an_order_of_their_own() -> None:
    rows = conversations(ROWS, TrainDataFormat.CHAT)
    assert rows == conversations(list(reversed(ROWS)), "chat")
    first = next(row for row in rows if row["messages"][-1]["content"] == "word 3")
    assert first["messages"] == ROWS[3]["messages"][:2]
    assert first["completion"] == ROWS[3]["messages"][-1]["content"]
    assert len({row["example"] for row in rows}) == len(ROWS)


def test_rows_that_ask_the_same_are_one_example() -> None:
    rows = conversations([*ROWS, chat("word 1", "another answer")], "chat")
    assert len(rows) == 7
    assert len({row["example"] for row in rows}) == 6


def test_rows_of_a_conversation_differ_in_what_was_said_before() -> None:
    def go_on(topic: str, system: str = "Talk.") -> dict[str, Any]:
        said = [
            ("system", system),
            ("user", topic),
            ("assistant", "Yes."),
            ("user", "Go on."),
            ("assistant", "So."),
        ]
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    rows = conversations([go_on("cats"), go_on("dogs"), go_on("dogs", "Chat.")], "chat")
    assert len({row["example"] for row in rows}) == 2


def test_every_faulty_row_is_named_at_once() -> None:
    bad: list[dict[str, Any]] = [
        {},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\ud83d"}]},
    ]
    with pytest.raises(TrainError) as caught:
        conversations([*ROWS, *bad], "chat")
    faults = str(caught.value).splitlines()
    assert [fault.split()[1].rstrip(",") for fault in faults] == ["6", "7", "8", "9", "10"]
    assert "only text" in faults[1]
    assert "must be the assistant's" in faults[3]
    assert "message 1 holds half a character" in faults[4]


def test_many_faulty_rows_are_counted() -> None:
    with pytest.raises(TrainError, match="and 15 more"):
        conversations([{}] * 25, "chat")


@pytest.mark.parametrize(
    ("rows", "data_format", "said"),
    [
        (ROWS, TrainDataFormat.COMPLETION, "only chat rows"),
        (ROWS[:1] * 3, "chat", "at least 2 different ones"),
        ([], "chat", "lower the metric's threshold"),
    ],
)
def test_what_cannot_be_learned_is_refused(rows: list[Any], data_format: Any, said: str) -> None:
    with pytest.raises(TrainError, match=said):
        conversations(rows, data_format)


def test_at_least_judges_as_while_tracing() -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return 0.5 if trace is not None else 1.0

    assert at_least(metric, 0.5)(None, None) is True
    assert at_least(metric, 0.8)(None, None) is False
    assert at_least(metric, 0.8)(None, None, [1]) is False
    assert at_least(metric, 0.8).__name__ == "metric_at_least_0.8"


def test_at_least_reads_a_score_with_feedback() -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> Any:
        return dspy.Prediction(score=0.7, feedback="almost")

    assert at_least(metric, 0.7)(None, None) is True
    assert at_least(metric, 0.71)(None, None) is False


def test_at_least_leaves_out_what_its_metric_cannot_judge(caplog: pytest.LogCaptureFixture) -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return float(1 / prediction)

    judged = at_least(metric, 0.5)
    assert [judged(None, prediction) for prediction in (1, 0, "x")] == [True, False, False]
    assert "a trace is left out, its metric raised ZeroDivisionError: division by zero" in caplog.text


@pytest.mark.parametrize("threshold", [0, -1, 1.5])
def test_a_threshold_that_keeps_all_or_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold is"):
        at_least(lambda *_: True, threshold)


def test_dspy_itself_keeps_the_worst_traces_and_judges_without_a_trace() -> None:
    """The reason for `at_least`; when this fails, DSPy has changed and docs/dspy.md must."""
    traces: list[Any] = []

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        traces.append(trace)
        return 0.01

    lm = dspy.utils.DummyLM([{"label": "odd"}] * 8)
    student = dspy.Predict("text -> label")
    student.set_lm(lm)
    collected: list[Any] = []

    class Collecting(dspy.BootstrapFinetune):  # type: ignore[misc]
        @staticmethod
        def finetune_lms(finetune_dict: dict[Any, Any]) -> dict[Any, Any]:
            collected.extend(next(iter(finetune_dict.values()))["train_data"])
            return dict.fromkeys(finetune_dict, lm)

    examples = [dspy.Example(text=str(number), label="odd").with_inputs("text") for number in range(4)]
    Collecting(metric=metric, num_threads=1).compile(student, trainset=examples)
    assert len(collected) == 4
    assert traces == [None] * 4
    collected.clear()
    Collecting(metric=at_least(metric, 0.5), num_threads=1).compile(student, trainset=examples)
    assert collected == []


def test_dspy_fails_on_an_answer_that_could_not_be_read() -> None:
    """Told in docs/dspy.md; when this fails, DSPy drops such traces."""
    student = dspy.Predict("text -> label")
    student.set_lm(dspy.utils.DummyLM([{"other": "x"}] * 4))
    examples = [dspy.Example(text=str(number), label="odd").with_inputs("text") for number in range(2)]
    optimizer = dspy.BootstrapFinetune(metric=at_least(lambda *_: True, 1.0), num_threads=1)
    with (
        dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)),
        pytest.raises(AttributeError, match="FailedPrediction"),
    ):
        optimizer.compile(student, trainset=examples)


class Failing(dspy.Module):  # type: ignore[misc]
    """A program whose teacher fails on one question."""

    def __init__(self, fails_on: str) -> None:
        super().__init__()
        self.predict, self.fails_on = dspy.Predict("text -> label"), fails_on
        self.set_lm(dspy.utils.DummyLM([{"label": "odd"}] * 4))

    def forward(self, text: str) -> Any:
        if text == self.fails_on:
            raise RuntimeError("HTTP 503")
        return self.predict(text=text)


def bootstrapped(metric: Any, adapter: dspy.Adapter | None = None, fails_on: str = "") -> None:
    examples = [dspy.Example(text=text, label="odd").with_inputs("text") for text in ("one", "two")]
    optimizer = dspy.BootstrapFinetune(metric=metric, num_threads=1, adapter=adapter)
    optimizer.compile(Failing(fails_on), trainset=examples)


def test_dspy_ends_when_one_teacher_call_or_metric_fails() -> None:
    """Told in docs/dspy.md; when this fails, DSPy goes on without that example."""
    with pytest.raises(ValueError, match="not enough values to unpack"):
        bootstrapped(lambda *_: True, fails_on="two")
    with pytest.raises(ValueError, match="not enough values to unpack"):
        bootstrapped(lambda *_: 1 / 0)


def test_dspy_makes_rows_by_its_chat_adapter_alone() -> None:
    """Told in docs/dspy.md."""
    with pytest.raises(NotImplementedError):
        bootstrapped(lambda *_: True, dspy.JSONAdapter())

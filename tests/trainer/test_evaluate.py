"""Evaluate asks each system once per example, counts failures as wrong, and never invents a score."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dspy
import httpx
import pytest
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from serve.runtime.embedded import Endpoint
from trainer import evaluate, task
from trainer.errors import EvaluateError, RuntimeUnavailable
from trainer.lm import Recorder, openai_messages
from trainer.runs import Home, Run, read_json, write_json, write_jsonl
from trainer.runtimes.local import Chat, Registration
from trainer.traces import Answer, Store

PROGRAM = """
import dspy

class Echo(dspy.Module):
    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("text -> label")

    def forward(self, text):
        return self.predict(text=text)

def same(example, prediction, trace=None):
    return example.label == prediction.label
"""
TASK = """
name: echo
program: program.py:Echo
metric: program.py:same
data: data.jsonl
inputs: [text]
teacher: {model: openai/none, price_per_1m: {input: 1, output: 1}}
"""
TEST = [f"t{number}" for number in range(6)]
CALIBRATE = [f"c{number}" for number in range(4)]


@dataclass
class Local:
    """Models that answer what they are told to, and keep count."""

    answers: Callable[[str, str], tuple[str, str]]
    """(model, text) to (completion, finish_reason)."""
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    doubted: list[tuple[str, str]] = field(default_factory=list)
    """(model, what it was shown of question and answer) of each time that it was asked whether it is confident."""
    started: list[str] = field(default_factory=list)

    @contextmanager
    def serving(self, registration: Registration) -> Iterator[Endpoint]:
        self.started.append(registration.name)
        yield Endpoint("http://127.0.0.1:9/v1", registration.name)

    def lm(self, endpoint: Endpoint, max_tokens: int) -> dspy.LM:
        def complete(request: Request) -> Response:
            told = openai_messages(request)
            text = _text_of(told[-1]["content"])
            self.asked[endpoint.model, text] += 1
            completion, finish = self.answers(endpoint.model, text)
            message = Message("assistant", (TextPart(completion),))
            usage = Usage(input_tokens=10, output_tokens=3)
            return Response(None, endpoint.model, message, finish, usage)

        # the recorder takes anything that answers a request
        engine = Recorder(complete)
        return dspy.LM("openai/none", engine=engine, cache=False, num_retries=0, max_tokens=max_tokens)

    def doubt(self, request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        self.doubted.append((asked["model"], asked["messages"][0]["content"]))
        choice = {"message": {"role": "assistant", "content": "True"}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice]})


def _text_of(content: str) -> str:
    return content.partition("[[ ## text ## ]]\n")[2].partition("\n")[0]


def reply(label: str) -> tuple[str, str]:
    return f"[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]\n", "stop"


def right(_: str, text: str) -> tuple[str, str]:
    return reply(text.upper())


def teacher_answer(example: str, **changes: Any) -> Answer:
    answer = Answer("teacher-system", example, "teacher", "echo", {}, 1.0, 300.0, 20, 5, 0.002, None, [])
    return replace(answer, **changes)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Run]:
    """A run whose stages before evaluate are done."""
    folder = tmp_path / "echo"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "task.yaml").write_text(TASK)
    write_jsonl(folder / "data.jsonl", [{"text": "a", "label": "A"}])
    home = Home(tmp_path / "home")
    store = Store.open(f"sqlite:///{tmp_path / 'store.db'}")
    run = Run(task.load(folder), home, store, home.runs("echo") / "one", environment={})
    write_json(run.stage("capture") / "summary.json", {"system": "teacher-system", "program": "p"})
    (run.stage("capture") / "program.json").write_text(json.dumps({"predict": _state()}))
    for split, ids in (("test", TEST), ("calibrate", CALIBRATE)):
        rows = [{"id": name, "values": {"text": name, "label": name.upper()}} for name in ids]
        write_jsonl(run.stage("curate") / f"{split}.jsonl", rows)
    registered = {
        key: Registration("ollama", f"echo:{key}", "a" * 64, 512, "http://127.0.0.1:9/v1").to_json()
        for key in ("model", "base")
    }
    write_json(run.stage("register") / "registration.json", registered)
    for example in [*TEST, *CALIBRATE]:
        store.add_answer(teacher_answer(example))
    yield run
    store.close()


def _state() -> dict[str, Any]:
    state: dict[str, Any] = dspy.Predict("text -> label").dump_state()
    return state


def evaluated(run: Run, local: Local) -> dict[str, Any]:
    evaluate.run(run, serving=local, make_lm=local.lm, chat=Chat(transport=httpx.MockTransport(local.doubt)))
    summary: dict[str, Any] = read_json(run.stage("evaluate") / "summary.json")
    return summary


def test_student_answers_calibrate_and_test_and_base_answers_test(here: Run) -> None:
    local = Local(right)
    summary = evaluated(here, local)
    assert local.asked == Counter(
        [("echo:model", name) for name in [*CALIBRATE, *TEST]] + [("echo:base", name) for name in TEST]
    )
    assert list(local.asked)[:10] == [("echo:model", name) for name in [*CALIBRATE, *TEST]]
    assert summary["student"]["mean"] == 1.0
    assert summary["student"]["n"] == len(TEST)
    assert 0 < summary["student"]["low"] < 1 == summary["student"]["high"]
    assert set(here.store.answers(summary["systems"]["student"])) == {*TEST, *CALIBRATE}
    assert summary["systems"]["teacher"] == "teacher-system"


def test_the_student_is_asked_whether_it_is_confident_of_its_test_answers(here: Run) -> None:
    local = Local(right)
    system = evaluated(here, local)["systems"]["self_ask"]

    assert {model for model, _ in local.doubted} == {"echo:model"}
    assert len(local.doubted) == len(TEST)
    assert "t0" in local.doubted[0][1]
    assert "T0" in local.doubted[0][1]
    said = here.store.answers(system)
    assert {example: answer.calls[0]["completion"] for example, answer in said.items()} == dict.fromkeys(
        TEST, "True"
    )


def test_nothing_is_asked_twice(here: Run) -> None:
    first = evaluated(here, Local(right))
    again = Local(right)
    assert evaluated(here, again) == first
    assert not again.asked
    assert not again.doubted
    assert not again.started


def test_a_run_that_was_killed_goes_on_where_it_was(here: Run) -> None:
    def dies_at_t2(model: str, text: str) -> tuple[str, str]:
        if text == "t2":
            raise KeyboardInterrupt
        return right(model, text)

    killed = Local(dies_at_t2)
    with pytest.raises(KeyboardInterrupt):
        evaluated(here, killed)
    resumed = Local(right)
    assert evaluated(here, resumed)["student"]["n"] == len(TEST)
    asked_again = killed.asked & resumed.asked
    assert set(asked_again) == {("echo:model", "t2")}  # its answer never came


def test_failures_count_as_wrong_and_are_counted(here: Run) -> None:
    def answers(model: str, text: str) -> tuple[str, str]:
        if text == "t0":
            return "no markers at all", "stop"
        if text == "t1":
            return reply("T1")[0], "length"  # right, but cut off: it would not be served
        return reply("wrong") if text == "t2" else right(model, text)

    student = evaluated(here, Local(answers))["student"]
    assert student["mean"] == pytest.approx(0.5)
    assert student["failures"] == 2
    assert student["failure_kinds"] == {"truncated": 1, "unparsable": 1}


def test_a_runtime_that_fails_is_an_error_and_no_score(here: Run) -> None:
    def unreachable(model: str, text: str) -> tuple[str, str]:
        if text == "t3":
            raise RuntimeUnavailable("the server is gone")
        return right(model, text)

    with pytest.raises(RuntimeUnavailable, match="the server is gone"):
        evaluated(here, Local(unreachable))
    assert not (here.stage("evaluate") / "summary.json").exists()


def test_missing_teacher_answers_are_named(here: Run) -> None:
    write_json(here.stage("capture") / "summary.json", {"system": "another", "program": "p"})
    with pytest.raises(
        EvaluateError, match=r"10 of 10 examples have no stored teacher's answer \(first: c0\)"
    ):
        evaluated(here, Local(right))


def test_an_empty_test_split_is_an_error(here: Run) -> None:
    write_jsonl(here.stage("curate") / "test.jsonl", [])
    with pytest.raises(EvaluateError, match="the test split is empty"):
        evaluated(here, Local(right))


def test_retention_has_its_band_and_next_step(here: Run) -> None:
    def four_of_six(model: str, text: str) -> tuple[str, str]:
        return reply("wrong") if text in ("t0", "t1") else right(model, text)

    retention = evaluated(here, Local(four_of_six))["retention"]
    assert retention["percent"] == pytest.approx(66.67)
    assert retention["low"] <= 66.67 <= retention["high"]
    assert retention["band"] == "weak"
    assert "train again" in retention["next_step"]


@pytest.mark.parametrize(
    ("percent", "band"),
    [(100, "ready"), (90, "ready"), (89, "close"), (75, "close"), (50, "weak"), (49, "unusable")],
)
def test_bands(percent: int, band: str) -> None:
    teacher = [teacher_answer(str(row)) for row in range(100)]
    student = [replace(answer, score=float(row < percent)) for row, answer in enumerate(teacher)]
    assert evaluate.retention(student, teacher, 0)["band"] == band


def test_a_teacher_that_never_scores_leaves_retention_undefined() -> None:
    teacher = [teacher_answer(str(row), score=0.0) for row in range(10)]
    assert evaluate.retention(teacher, teacher, 0)["percent"] is None


def test_latency_tokens_and_cost_of_a_system() -> None:
    rows = [teacher_answer(str(row), latency_ms=float(row + 1)) for row in range(100)]
    found = evaluate.measured(rows, 0)
    assert found["latency_ms"] == {"mean": 50.5, "p50": 50.5, "p95": 95.05}
    assert found["tokens"] == {"prompt": 20.0, "completion": 5.0}
    assert found["cost_per_1k_usd"] == pytest.approx(2.0)


def test_another_model_file_is_another_system(here: Run) -> None:
    before = evaluate.inputs(here)
    registered = read_json(here.stage("register") / "registration.json")
    registered["model"]["sha256"] = "b" * 64
    write_json(here.stage("register") / "registration.json", registered)
    after = evaluate.inputs(here)
    assert after["systems"]["student"] != before["systems"]["student"]
    assert after["systems"]["base"] == before["systems"]["base"]

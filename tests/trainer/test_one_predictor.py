"""One predictor of a program is distilled, the teacher stays with the others: what is run is what is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dspy
import httpx
import pytest
from dspy.lm15 import Message, Request, Response, TextPart, Usage
from dspy.utils.exceptions import LMAuthError

from serve.runtime.embedded import Endpoint
from tests.tasks import SETTINGS, row, write_task
from trainer import certify, curate, evaluate, program, register, task
from trainer.data import example_id
from trainer.errors import TaskError, TeacherError
from trainer.lm import Recorder, openai_messages
from trainer.runs import Home, Run, read_json, read_jsonl, write_json
from trainer.runtimes.local import Chat, Registration
from trainer.splits import assigned
from trainer.teacher import client
from trainer.teacher.client import open_ledger, teacher_lm
from trainer.traces import Store

PROGRAM = """
import dspy

class Told(dspy.Module):
    def __init__(self):
        super().__init__()
        self.sort = dspy.Predict("text -> label")
        self.tell = dspy.Predict("label -> sentence")

    def forward(self, text):
        label = self.sort(text=text).label
        return dspy.Prediction(label=label, sentence=self.tell(label=label).sentence)

def right(example, prediction, trace=None):
    return prediction.label == example.label and prediction.sentence == f"It is {prediction.label}."
"""
WRONG = "word number 7"
PRICE = {"input": 100, "output": 100}
CALL_USD = 15 * 100 / 1e6


def said(request: Request, answers: dict[str, str], model: str) -> Response:
    """The answer of a model that knows every label but those in `answers`."""
    asked = openai_messages(request)[-1]["content"]
    field, _, rest = asked.partition("[[ ## ")[2].partition(" ## ]]\n")
    value = rest.partition("\n")[0]
    if field == "text":
        label = answers.get(value, "odd" if int(value.split()[-1]) % 2 else "even")
        text = f"[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]"
    else:
        text = f"[[ ## sentence ## ]]\nIt is {value}.\n\n[[ ## completed ## ]]"
    return Response(None, model, Message("assistant", (TextPart(text),)), "stop", Usage(10, 5))


class Teacher:
    """Stands in for the API, and counts what is bought."""

    def __init__(self) -> None:
        self.bought: Counter[str] = Counter()

    def complete(self, request: Request) -> Response:
        self.bought[openai_messages(request)[-1]["content"].partition(" ## ]]")[0]] += 1
        return said(request, {}, "pretend")


class Local:
    """Stands in for the local models: the base knows nothing, the student all but one word."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    @contextmanager
    def serving(self, registration: Registration) -> Iterator[Endpoint]:
        yield Endpoint("http://127.0.0.1:9/v1", registration.name)

    def lm(self, endpoint: Endpoint, max_tokens: int) -> dspy.LM:
        def complete(request: Request) -> Response:
            self.asked[endpoint.model] += 1
            return said(request, {WRONG: "even"}, endpoint.model)

        return dspy.LM("openai/none", engine=Recorder(complete), cache=False, num_retries=0)


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Teacher:
    made = Teacher()
    lm = dspy.LM("openai/pretend", engine=made, cache=False, num_retries=0)
    monkeypatch.setattr(client, "make_client", lambda *_: lm)
    return made


@pytest.fixture
def run(tmp_path: Path, teacher: Teacher) -> Iterator[Run]:
    yield from captured(tmp_path, PROGRAM)


def captured(tmp_path: Path, source: str) -> Iterator[Run]:
    """A run whose capture and curation are done."""
    folder = write_task(
        tmp_path / "task",
        rows=80,
        program="program.py:Told",
        metric="program.py:right",
        student={"predictor": "sort"},
        teacher=SETTINGS["teacher"] | {"price_per_1m": PRICE},
    )
    (folder / "program.py").write_text(source)
    home = Home(tmp_path / "home")
    store = Store.open(f"sqlite:///{tmp_path / 'store.db'}")
    made = Run(task.load(folder), home, store, home.runs("words") / "one", environment={}, force=True)
    loaded = program.load(made.task)
    write_json(made.stage("capture") / "program.json", loaded.state)
    write_json(made.stage("capture") / "summary.json", {"system": "teacher", "program": "p"})
    lm = teacher_lm(made, "p", "capture", open_ledger(made))
    for example in assigned(made.task).examples():
        store.add_answer(program.answer(loaded, example, lm, "teacher", "teacher"))
    curate.run(made)
    registered = {
        key: Registration("embedded", f"words:{key}", "a" * 64, 512).to_json() for key in ("model", "base")
    }
    write_json(made.stage("register") / "registration.json", registered)
    yield made
    store.close()


def evaluated(run: Run, local: Local) -> dict[str, Any]:
    reply = {"choices": [{"message": {"role": "assistant", "content": "True"}, "finish_reason": "stop"}]}
    chat = Chat(transport=httpx.MockTransport(lambda _: httpx.Response(200, json=reply)))
    evaluate.run(run, serving=local, make_lm=local.lm, chat=chat)
    found: dict[str, Any] = read_json(run.stage("evaluate") / "summary.json")
    return found


def test_it_learns_the_calls_of_that_predictor_alone(run: Run) -> None:
    rows = read_jsonl(run.stage("curate") / "train.jsonl")
    assert {row["predictor"] for row in rows} == {"sort"}
    assert len(rows) == read_json(run.stage("curate") / "summary.json")["train"]["examples"]
    assert {prompt.predictor for prompt in register._prompts(run)} == {"sort"}


def test_the_teacher_answers_for_the_others_and_only_what_changed_is_bought(
    run: Run, teacher: Teacher, caplog: pytest.LogCaptureFixture
) -> None:
    captured, local = sum(teacher.bought.values()), Local()
    summary = evaluated(run, local)
    asked = len(read_jsonl(run.stage("curate") / "calibrate.jsonl")) + summary["student"]["n"]
    assert local.asked["words:model"] == asked
    student = run.store.answers(summary["systems"]["student"])
    changed = [answer for answer in student.values() if answer.outputs["label"] != label_of(answer.example)]
    assert len(changed) == 1, "the wrong word is in neither sealed split; choose another"
    again = sum(teacher.bought.values()) - captured
    assert summary["bought_usd"] == pytest.approx(again * CALL_USD)
    assert 1 <= again <= 2, "of student and base, one sentence each: its label was never told of that example"
    assert all(
        [call["predictor"] for call in answer.calls] == ["sort", "tell"] for answer in student.values()
    )
    assert "for all predictors but sort" in caplog.text
    caplog.clear()
    assert evaluated(run, Local()) == summary
    assert "for all predictors" not in caplog.text, "nothing is left to be bought"
    assert sum(teacher.bought.values()) - captured == again


def label_of(identity: str) -> str:
    return next(row(n)["label"] for n in range(80) if example_id(row(n), ["text"]) == identity)


def test_what_the_others_cost_is_in_the_price(run: Run) -> None:
    summary = evaluated(run, Local())
    assert summary["teacher"]["cost_per_1k_usd"] == pytest.approx(2000 * CALL_USD)
    assert summary["student"]["cost_per_1k_usd"] == pytest.approx(1000 * CALL_USD)


def test_it_is_certified_on_whole_runs(run: Run) -> None:
    router = certified(run)
    assert [prompt["name"] for prompt in router["predictors"]] == ["sort"]
    assert router["model"] is not None
    assert "predictors" not in router["reason"]
    assert read_json(run.stage("certify") / "summary.json")["hybrid"]["cost_per_1k_usd"] > 0


def certified(run: Run) -> dict[str, Any]:
    exported = {"model": {"sha256": "a" * 64, "quantization": "f16"}, "template": {}}
    write_json(run.stage("export") / "summary.json", exported)
    evaluated(run, Local())
    certify.run(run)
    router: dict[str, Any] = read_json(run.stage("certify") / "router.json")
    return router


def test_another_predictor_with_the_same_prompt_is_routed_too_and_so_refused(
    tmp_path: Path, teacher: Teacher
) -> None:
    asked_twice = PROGRAM.replace('"label -> sentence"', '"text -> label"').replace(
        "self.tell(label=label).sentence", 'f"It is {self.tell(text=text).label}."'
    )
    for made in captured(tmp_path, asked_twice):
        router = certified(made)
        assert router["model"] is None
        assert "asks what would be routed up to 2 times" in router["reason"]


def test_an_answer_of_the_teacher_that_is_cut_off_counts_as_in_its_own_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = program.answer

    def cut(*args: Any) -> Any:
        found = whole(*args)
        found.calls[-1]["finish_reason"] = "length"
        return found

    monkeypatch.setattr(program, "answer", cut)
    assert evaluated(run, Local())["student"]["mean"] > 0.9


def test_a_teacher_that_fails_is_the_teachers_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Expired:
        def complete(self, request: Request) -> Response:
            raise LMAuthError("401 invalid key", model="pretend")

    lm = dspy.LM("openai/pretend", engine=Expired(), cache=False, num_retries=0)
    monkeypatch.setattr(client, "make_client", lambda *_: lm)
    with pytest.raises(TeacherError, match="401 invalid key"):
        evaluated(run, Local())


def test_offline_a_changed_prompt_is_an_error_that_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> dspy.LM:
        raise TeacherError("HOMESTILL_OFFLINE is set and a call is needed")

    monkeypatch.setattr(client, "make_client", refused)
    with pytest.raises(TeacherError, match="HOMESTILL_OFFLINE is set"):
        evaluated(run, Local())


def test_a_predictor_that_the_program_lacks(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task", student={"predictor": "sorter"})
    with pytest.raises(TaskError, match=r"student.predictor is 'sorter'; program.py:Sorter has sort"):
        program.load(task.load(folder))
    only = write_task(tmp_path / "only", student={"predictor": "sort"})
    with pytest.raises(TaskError, match=r"'sort', the only predictor of program.py:Sorter; leave it out"):
        program.load(task.load(only))


def test_a_predictor_with_a_model_of_its_own(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task")
    own = 'self.sort = dspy.Predict(Sort)\n        self.sort.lm = dspy.LM("openai/other")'
    text = (folder / "program.py").read_text()
    (folder / "program.py").write_text(text.replace("self.sort = dspy.Predict(Sort)", own))
    with pytest.raises(TaskError, match=r"sort of program.py:Sorter asks a model of its own"):
        program.load(task.load(folder))

"""The certify stage over a store that was filled by hand: what it writes, and when it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.confidence import ConfidenceModel, Field, LocalAnswer, Neighbours, confidence
from serve.fingerprint import fingerprint, query
from serve.manifest import RouterFile
from tests.tasks import PROGRAM, write_task
from trainer import certify
from trainer import program as programs
from trainer import task as tasks
from trainer.errors import EvaluateError
from trainer.runs import Home, Run, read_json, write_json, write_jsonl
from trainer.traces import Answer, Store

SYSTEM = {"role": "system", "content": "Your input fields are: text "}
END = "\n\nRespond with the corresponding output fields, starting with the field `[[ ## label ## ]]`."
LABELS = ("even", "odd")


@dataclass
class Student:
    """Answers with a doubt that it can have; of the doubtful answers `wrong` are wrong."""

    doubtful: float = 0.2
    wrong: float = 0.45
    slips: float = 0.004
    """Wrong without a doubt."""
    graded: bool = False

    def answer(self, number: int, source: np.random.Generator) -> tuple[float, list[dict[str, Any]], str]:
        """Score, tokens and text for an example."""
        doubts = source.random() < self.doubtful
        probability = source.uniform(0.4, 0.9) if doubts else source.uniform(0.97, 0.9999)
        wrong = source.random() < (self.wrong if doubts else self.slips)
        label = LABELS[(number + wrong) % 2]
        top = [
            {"token": label, "logprob": math.log(probability)},
            {"token": LABELS[(number + wrong + 1) % 2], "logprob": math.log(1 - probability)},
        ]
        sure = [{"token": "", "logprob": -0.001, "top_logprobs": [{"token": "", "logprob": -0.001}]}]
        tokens = [
            sure[0] | {"token": "[[ ## label ## ]]\n"},
            {"token": label, "logprob": math.log(probability), "top_logprobs": top},
            sure[0] | {"token": "\n\n[[ ## completed ## ]]"},
        ]
        right, miss = (0.75, 0.25) if self.graded else (1.0, 0.0)
        return miss if wrong else right, tokens, "".join(str(token["token"]) for token in tokens)


def messages(number: int) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": f"[[ ## text ## ]]\nword number {number}{END}"}]


def stored(
    role: str, number: int, score: float, calls: list[dict[str, Any]], error: str | None = None
) -> Answer:
    return Answer(
        system=f"{role}-id",
        example=f"e{number}",
        role=role,
        task="words",
        outputs={},
        score=score,
        latency_ms=1.0,
        prompt_tokens=80,
        completion_tokens=3,
        cost_usd=0.0,
        error=error,
        calls=calls,
    )


def call(number: int, tokens: list[dict[str, Any]], text: str, finish: str = "stop") -> dict[str, Any]:
    return {
        "predictor": "sort",
        "messages": messages(number),
        "completion": text,
        "finish_reason": finish,
        "prompt_tokens": 80,
        "logprobs": tokens,
    }


def make_run(folder: Path, student: Student, calibrate: int, test: int = 200, **settings: Any) -> Run:
    """A run that has been evaluated: folders as the earlier stages leave them, and the store's answers."""
    home = Home(folder / "home")
    home.root.mkdir(parents=True)
    task = tasks.load(write_task(folder / "task", **settings))
    run = Run(task, home, Store.open("sqlite://"), folder / "run")  # in memory: no disk to wait for
    write_json(run.stage("capture") / "program.json", programs.load(task).state)
    write_json(run.stage("capture") / "summary.json", {"program": "p" * 64})
    write_json(run.stage("export") / "summary.json", {"model": MODEL_FILE, "template": {"jinja": "x"}})
    write_json(
        run.stage("register") / "registration.json", {"model": {"runtime": "embedded", "context": 2048}}
    )
    roles = ("teacher", "base", "student")
    write_json(run.stage("evaluate") / "summary.json", {"systems": {role: f"{role}-id" for role in roles}})
    train = [
        {"example": f"t{number}", "predictor": "sort", "messages": messages(number), "completion": "x"}
        for number in range(10_000, 10_040)
    ]
    write_jsonl(run.stage("curate") / "train.jsonl", train)
    numbers = {"calibrate": range(calibrate), "test": range(calibrate, calibrate + test)}
    for split, members in numbers.items():
        rows = [{"id": f"e{number}", "values": {"text": f"word number {number}"}} for number in members]
        write_jsonl(run.stage("curate") / f"{split}.jsonl", rows)
    fill(run.store, student, range(calibrate + test))
    return run


MODEL_FILE = {"sha256": "a" * 64, "quantization": "q8_0"}


def fill(store: Store, student: Student, numbers: Sequence[int]) -> None:
    source = np.random.default_rng(11)
    top = 0.75 if student.graded else 1.0
    for number in numbers:
        score, tokens, text = student.answer(number, source)
        store.add_answer(stored("student", number, score, [call(number, tokens, text)]))
        teacher_right = source.random() < 0.97
        said = f"[[ ## label ## ]]\n{LABELS[(number + (not teacher_right)) % 2]}\n\n[[ ## completed ## ]]"
        store.add_answer(stored("teacher", number, top if teacher_right else 0.0, [call(number, [], said)]))


def outcome(run: Run) -> tuple[RouterFile, dict[str, Any]]:
    certify.run(run)
    folder = run.folder / "certify"
    router = RouterFile.model_validate(read_json(folder / "router.json"))
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    return router, summary


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("certified"), Student(), 700, quality={"keep": 0.95})
    certify.run(run)
    return run


def test_a_good_student_is_certified(certified: Run) -> None:
    router, summary = outcome(certified)
    assert router.certified and router.threshold is not None and router.reason == ""
    assert summary["certificate"]["certified"] and summary["certificate"]["rows"] == 420
    assert not summary["certificate"]["graded"] and summary["fit"]["kind"] == "sigmoid"
    found = summary["hybrid"]
    assert found["n"] == 200 and found["local_share"] > 0.6 and found["retention"]["mean"] > 0.95
    assert summary["baselines_risk"] == found["risk"] <= 0.05
    ours, dice = summary["baselines"]["confidence"], summary["baselines"]["random"]
    assert ours["auroc"] > dice["auroc"] + 0.1 and ours["coverage"] > dice["coverage"]
    assert summary["certificate"]["curve"][0]["tested"]
    assert summary["risk_coverage"] and summary["reliability"]["bins"]


def test_the_router_file_says_what_it_is_bound_to(certified: Run) -> None:
    router, _ = outcome(certified)
    assert router.binds.model_dump(exclude={"template", "base"}) == {
        "model": "a" * 64,
        "quantization": "q8_0",
        "program": "p" * 64,
        "adapter": "chat",
        "runtime": "embedded",
    }
    (prompt,) = router.predictors
    assert (prompt.name, prompt.prefix, prompt.suffix) == ("sort", "[[ ## text ## ]]\n", END)
    assert prompt.fingerprint == fingerprint(messages(1))
    assert [field.model_dump() for field in prompt.fields] == [{"name": "label", "labels": ["even", "odd"]}]
    assert router.sampling.model_dump() == {"temperature": 0.0, "max_tokens": 512, "context": 2048}


def test_audits_have_something_to_be_held_against(certified: Run) -> None:
    """Of the 200 test rows those that are kept, and how many of them the teacher answers otherwise."""
    router, summary = outcome(certified)
    assert router.audit is not None and router.audit.fields == ["label"]
    assert router.audit.kept == 200 * summary["hybrid"]["local_share"]
    assert 0 < router.audit.disagreed < 0.1 * router.audit.kept  # the teacher itself errs in 3 %
    rate = router.audit.disagreed / router.audit.kept
    assert rate < router.audit.upper < rate + 0.06


def test_serving_computes_the_confidence_that_was_certified(certified: Run) -> None:
    """From the files alone, as the router does, the share on test is the share that was reported."""
    router, summary = outcome(certified)
    assert router.model is not None and router.threshold is not None
    (prompt,) = router.predictors
    fields = [Field(field.name, tuple(field.labels or ())) for field in prompt.fields]
    model = ConfidenceModel.from_json(router.model.model_dump())
    neighbours = Neighbours.load(certified.folder / "certify" / "neighbours.npz")
    answers = certified.store.answers("student-id")
    kept = 0
    for number in range(700, 900):
        asked = answers[f"e{number}"].calls[0]
        text = query(asked["messages"][-1]["content"], prompt.prefix, prompt.suffix)
        assert text == f"word number {number}"
        local = LocalAnswer(asked["completion"], asked["logprobs"], asked["finish_reason"], 80, text)
        kept += confidence(local, fields, neighbours, model) >= router.threshold
    assert kept / 200 == summary["hybrid"]["local_share"]


def test_the_same_answers_give_the_same_files(certified: Run) -> None:
    def files() -> dict[str, bytes]:
        certify.run(certified)
        return {path.name: path.read_bytes() for path in (certified.folder / "certify").iterdir()}

    assert files() == files()
    assert set(files()) == {"router.json", "summary.json", "neighbours.npz"}


def test_inputs_change_with_what_decides_the_outcome(certified: Run) -> None:
    before = certify.inputs(certified)
    assert json.loads(json.dumps(before)) == before
    evaluated = certified.folder / "evaluate" / "summary.json"
    kept = evaluated.read_text()
    write_json(evaluated, {"systems": {"teacher": "teacher-id", "student": "another"}})
    assert certify.inputs(certified) != before
    evaluated.write_text(kept)
    assert certify.inputs(certified) == before


def test_graded_scores_take_the_betting_test(tmp_path: Path) -> None:
    run = make_run(tmp_path, Student(doubtful=0.1, graded=True), 700, quality={"keep": 0.95})
    router, summary = outcome(run)
    assert summary["certificate"]["graded"] and router.certified
    assert summary["certificate"]["curve"][0]["limit"] == pytest.approx(0.05)


def test_too_few_rows_are_refused_with_their_number(tmp_path: Path) -> None:
    router, summary = outcome(make_run(tmp_path, Student(), 60, test=60, quality={"keep": 0.95}))
    found = summary["certificate"]
    assert not router.certified and router.threshold is None
    assert found["rows_missing"] > 20 and found["examples_missing"] == math.ceil(found["rows_missing"] / 0.6)
    assert f"about {found['examples_missing']:,} more examples in the calibrate split could" in router.reason
    assert str(found["rows_missing"]) not in router.reason  # one number, not two
    assert "36 calibration rows do not prove 95%" in router.reason
    found = summary["hybrid"]
    assert found["local_share"] == 0.0 and found["retention"]["mean"] == 1.0
    assert summary["baselines_risk"] == pytest.approx(0.05 * found["mean"])


def test_a_useless_student_is_refused(tmp_path: Path) -> None:
    router, summary = outcome(
        make_run(tmp_path, Student(doubtful=1.0, wrong=1.0), 300, quality={"keep": 0.95})
    )
    assert not router.certified and "more rows would not help" in router.reason
    assert summary["fit"]["kind"] == "constant" and summary["certificate"]["rows_missing"] is None


def test_unparsable_truncated_and_foreign_answers_are_never_kept(tmp_path: Path) -> None:
    """They score perfectly here, and still no threshold keeps them: serving would not give them."""
    run = make_run(tmp_path, Student(doubtful=0.0, slips=0.0), 400, test=0, quality={"keep": 0.95})
    source = np.random.default_rng(0)
    _, tokens, text = Student(doubtful=0.0, slips=0.0).answer(0, source)
    foreign = call(1, tokens, text) | {"messages": [{"role": "user", "content": "hello"}]}
    calls = [
        [call(402, tokens, "no marker at all")],
        [call(403, tokens, text, "length")],
        [foreign],
        [],
        [call(406, tokens, text)],
    ]
    numbers = range(402, 402 + len(calls))
    for number, made in zip(numbers, calls, strict=True):
        run.store.add_answer(stored("student", number, 1.0, made))
        run.store.add_answer(stored("teacher", number, 1.0, []))
    rows = [{"id": f"e{number}", "values": {}} for number in numbers]
    write_jsonl(run.folder / "curate" / "test.jsonl", rows)
    _, summary = outcome(run)
    assert summary["certificate"]["certified"] and summary["hybrid"]["local_share"] == 1 / 5


def test_a_program_of_several_calls_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, Student(), 100, test=20)
    _, tokens, text = Student().answer(0, np.random.default_rng(0))
    run.store.add_answer(stored("student", 999, 1.0, [call(999, tokens, text)] * 2))
    router, summary = outcome(run)
    assert not router.certified and "up to 2 times" in router.reason
    assert router.model is None and router.neighbours is None
    assert summary["hybrid"]["local_share"] == 0.0 and summary["hybrid"]["n"] == 20


def test_a_program_of_several_predictors_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", Student(), 60, test=20)
    again = PROGRAM.replace("self.sort = dspy.Predict(Sort)", "self.sort = self.other = None")
    again = again.replace("self.other = None", "dspy.Predict(Sort)\n        self.check = dspy.Predict(Sort)")
    again = again.replace("self.sort = dspy", "self.sort = dspy", 1)
    (run.task.folder / "second.py").write_text(again, encoding="utf-8")
    two = tasks.load(write_task(tmp_path / "two"))
    (two.folder / "program.py").write_text(again, encoding="utf-8")
    changed = Run(two, run.home, run.store, run.folder)
    write_json(run.folder / "capture" / "program.json", programs.load(two).state)
    train = [
        {"example": "t", "predictor": name, "messages": messages(1), "completion": "x"}
        for name in ("sort", "check")
    ]
    write_jsonl(run.folder / "curate" / "train.jsonl", train)
    router, _ = outcome(changed)
    assert not router.certified and "2 predictors" in router.reason
    assert [prompt.name for prompt in router.predictors] == ["sort", "check"]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_second_call_is_refused_whoever_makes_it_and_whatever_it_asks(tmp_path: Path, role: str) -> None:
    """The student answered for the whole program, so a call of none of its predictors was local too."""
    run = make_run(tmp_path, Student(), 60, test=20)
    first = call(3, [], "[[ ## label ## ]]\nodd")
    other = {**first, "predictor": "judge", "messages": [{"role": "user", "content": "something else"}]}
    run.store.add_answer(stored(role, 999, 1.0, [first, other]))
    router, _ = outcome(run)
    assert not router.certified
    assert "up to 2 times" in router.reason


def test_missing_answers_are_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, Student(), 60, test=20)
    write_json(
        run.folder / "evaluate" / "summary.json", {"systems": {"teacher": "nobody", "student": "student-id"}}
    )
    with pytest.raises(EvaluateError, match=r"no stored answer of the teacher.*run evaluate again"):
        certify.run(run)


def test_split_is_by_hash_and_disjoint() -> None:
    ids = [f"e{number}" for number in range(50)]
    fit_ids, rest = certify.split(ids)
    assert (len(fit_ids), len(rest)) == (20, 30) and set(fit_ids) | set(rest) == set(ids)
    assert certify.split(list(reversed(ids))) == (fit_ids, rest)

"""Evaluate: teacher, base and student on the same sealed test examples, one stored row per answer.

The student also answers the calibrate split, for `certify`, and says whether it is confident of its answers to
the test split, a runner-up that reports compare with. Where one predictor of several is distilled, the teacher
answers for the others: what it was asked before is replayed, a prompt that a local answer changed is bought. Every answer is committed before the
next is asked for, under the identity of the system that gave it: a run that was killed goes on
where it was, and nothing is generated twice. The teacher's answers are those that capture bought.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Protocol

import dspy
import numpy as np

from serve import self_ask
from serve.runtime.embedded import Endpoint
from trainer import program as programs
from trainer.data import Example
from trainer.errors import EvaluateError
from trainer.lm import local_lm
from trainer.program import Program
from trainer.progress import progress
from trainer.runs import Run, read_json, read_jsonl, sha256_file, sha256_json, write_json
from trainer.runtimes.choice import runtime
from trainer.runtimes.local import Chat, Registration, recorded
from trainer.statistics.scores import Interval, mean_interval, ratio_interval
from trainer.teacher import others
from trainer.teacher.client import open_ledger, teacher_lm
from trainer.teacher.prices import Ledger
from trainer.traces import Answer, Store

Ask = Callable[[Example], Answer]
MakeLM = Callable[[Endpoint, int], dspy.LM]

log = logging.getLogger("homestill.evaluate")

VERSION = 1
"""Raise it when rows that were stored before no longer mean the same."""
TRUNCATED = "truncated"
SELF_ASK = "self_ask"
LOCAL_COST = "API cost only: your own machine's power and depreciation are not counted"


@dataclass(frozen=True)
class Band:
    """What a quality retention means, and what to do next."""

    floor: float
    """Percent of the teacher's score from which the band holds."""
    name: str
    next_step: str


BANDS = (
    Band(90, "ready", "good enough to release; the router hands over what it is unsure of"),
    Band(
        75,
        "close",
        "use it behind the router only; capture more examples (requests that were handed over are the best ones) "
        "and train again",
    ),
    Band(
        50,
        "weak",
        "do not rely on it yet: at least 100 traces per predictor, cleaner labels or a larger base model, "
        "then train again",
    ),
    Band(
        0,
        "unusable",
        "do not use it: look at parity and at the failures first, then at the teacher's own score; "
        "take a larger base model or a simpler task",
    ),
)


class Serving(Protocol):
    """The part of a runtime that evaluation needs."""

    def serving(self, registration: Registration) -> AbstractContextManager[Endpoint]: ...


@dataclass(frozen=True)
class _Local:
    """The run's local models, started one at a time and only where an answer is missing."""

    run: Run
    program: Program
    source: Serving
    make_lm: MakeLM
    chat: Chat
    teacher: dspy.LM
    """Answers for the predictors that are not distilled."""

    def answers(self, role: str, examples: Sequence[Example]) -> dict[str, Answer]:
        """What the program answers on a system, from the store as far as it goes."""
        system = _identity(self.run, role)

        def asking(endpoint: Endpoint) -> Ask:
            lm = self.make_lm(endpoint, self.run.task.settings.student.max_tokens)
            return lambda example: self._answer(example, lm, role, system)

        return self._stored(role, examples, asking)

    def _answer(self, example: Example, lm: dspy.LM, role: str, system: str) -> Answer:
        predictor = self.run.task.settings.student.predictor
        if predictor is None:
            return programs.answer(self.program, example, lm, role, system)
        with self.program.asking(predictor, lm):
            return programs.answer(self.program, example, self.teacher, role, system)

    def doubts(self, examples: Sequence[Example], answers: Sequence[Answer]) -> str:
        """Ask the student whether it is confident of its own answers; returns the identity of what it said."""
        system = _identity(self.run, SELF_ASK)
        given = {answer.example: answer for answer in answers}

        def asking(endpoint: Endpoint) -> Ask:
            def ask(example: Example) -> Answer:
                own = given[example.id]
                distilled = [call for call in own.calls if call["predictor"] == self.program.distilled]
                said = [self._doubt(call, endpoint) for call in distilled[-1:]] or [""]
                calls = [{"predictor": SELF_ASK, "completion": said[0]}]
                return replace(
                    own, system=system, role=SELF_ASK, outputs={}, score=0.0, error=None, calls=calls
                )

            return ask

        self._stored(SELF_ASK, examples, asking)
        return system

    def _doubt(self, call: Mapping[str, Any], endpoint: Endpoint) -> str:
        prompt = self_ask.prompt(call["messages"][-1]["content"], call["completion"])
        return self.chat.ask(endpoint, [{"role": "user", "content": prompt}], self_ask.MAX_TOKENS).text

    def _stored(
        self, role: str, examples: Sequence[Example], asking: Callable[[Endpoint], Ask]
    ) -> dict[str, Answer]:
        store, system = self.run.store, _identity(self.run, role)
        found = store.answers(system)
        if all(example.id in found for example in examples):
            return found
        with self.source.serving(_registration(self.run, role)) as endpoint:
            predictor = self.run.task.settings.student.predictor
            answer_all(store, system, role, examples, asking(endpoint), local=predictor)
        return store.answers(system)


def inputs(run: Run) -> dict[str, Any]:
    """What the outcome depends on."""
    return {
        "version": VERSION,
        "test": sha256_file(run.stage("curate") / "test.jsonl"),
        "calibrate": sha256_file(run.stage("curate") / "calibrate.jsonl"),
        "teacher": _captured(run)["system"],
        "systems": {role: _identity(run, role) for role in ("base", "student", SELF_ASK)},
    }


def run(
    run: Run, *, serving: Serving | None = None, make_lm: MakeLM = local_lm, chat: Chat | None = None
) -> None:
    """Put calibrate and test to the student, test to the base, and write evaluate/summary.json.

    Args:
        serving: starts the registered models; by default the runtime that the run is set to.
        make_lm: makes the DSPy model for an endpoint and a limit of answer tokens.
        chat: asks the student about its answers.

    Raises:
        EvaluateError: capture holds no teacher's answer for an example.
        RuntimeUnavailable: a local model cannot be reached; what was answered so far is kept.
        TeacherError: the teacher is needed for a predictor that is not distilled, and is off, out of reach
            or over budget.
    """
    ledger, captured = open_ledger(run), _captured(run)["program"]
    judge = teacher_lm(run, captured, "judge", ledger)
    program = programs.load(run.task, run.stage("capture") / "program.json", judge)
    teacher = teacher_lm(run, captured, "capture", ledger)
    local = _Local(run, program, serving or runtime(run), make_lm, chat or Chat(), teacher)
    test, calibrate = _split(run, "test"), _split(run, "calibrate")
    if not test:
        raise EvaluateError("the test split is empty; add examples, or enlarge curate.split.test")
    known = stored_answers(run.store, _captured(run)["system"], [*calibrate, *test])
    rows = {"teacher": [known[example.id] for example in test]}
    predictor, mixed = run.task.settings.student.predictor, []
    asking = (("student", [*calibrate, *test]), ("base", test))
    if predictor:
        _announce(run, predictor, known, asking, ledger)
    for role, examples in asking:
        asked = local.answers(role, examples)
        mixed += [asked[example.id] for example in examples]
        rows[role] = [asked[example.id] for example in test]
    found = summary(run, rows)
    if predictor:
        found["bought_usd"] = round(others.bought(known, mixed, predictor), 6)
    if program.distilled:  # others are not certified, so nothing is compared
        found["systems"][SELF_ASK] = local.doubts(test, rows["student"])
    write_json(run.stage("evaluate") / "summary.json", found)


def _announce(
    run: Run,
    predictor: str,
    known: Mapping[str, Answer],
    asking: Sequence[tuple[str, Sequence[Example]]],
    ledger: Ledger,
) -> None:
    """Say what the other predictors' calls may cost, before the first one is made."""
    missing = [
        known[example.id]
        for role, examples in asking
        for found in [run.store.answers(_identity(run, role))]
        for example in examples
        if example.id not in found
    ]
    if missing:
        log.warning(
            "evaluate: the teacher answers for all predictors but %s; prompts that a local answer changes are bought: "
            "about $%.2f if all of them change and the answers are as long ($%.2f of $%.2f are spent)",
            *(predictor, others.usual_cost(missing, predictor)),
            *(ledger.spent_usd, run.task.settings.teacher.budget_usd),
        )


def stored_answers(store: Store, system: str, examples: Sequence[Example]) -> dict[str, Answer]:
    """The stored answers of a system to all the examples, by example id.

    Raises:
        EvaluateError: some are missing.
    """
    found = store.answers(system)
    missing = [example.id for example in examples if example.id not in found]
    if missing:
        raise EvaluateError(
            f"{len(missing)} of {len(examples)} examples have no stored teacher's answer (first: {missing[0]}); "
            "run capture again, what it has bought is not paid again"
        )
    return {example.id: found[example.id] for example in examples}


def answer_all(
    store: Store, system: str, role: str, examples: Sequence[Example], ask: Ask, *, local: str | None = None
) -> None:
    """Ask a system, in order, for each example that it has no stored answer to.

    Args:
        local: the one predictor whose calls the system answers itself; None: all of them.

    Each answer is stored before the next is asked for. A truncated one counts as wrong, whatever it scored.
    """
    found = store.answers(system)
    done = sum(example.id in found for example in examples)
    with progress(f"evaluate {role}", len(examples), done) as advance:
        for example in examples:
            if example.id not in found:
                store.add_answer(_without_truncated(ask(example), local))
                advance()


def summary(run: Run, rows: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """evaluate/summary.json from each role's answers to the test split, in one order."""
    seed = run.task.settings.seed
    return {
        "systems": {role: answers[0].system for role, answers in rows.items()},
        "runtime": _registration(run, "student").runtime,
        **{role: measured(answers, seed) for role, answers in rows.items()},
        "retention": retention(rows["student"], rows["teacher"], seed),
        "cost_note": LOCAL_COST,
    }


def measured(answers: Sequence[Answer], seed: int) -> dict[str, Any]:
    """Score, failures, latency (ms), tokens per example and API dollars per 1,000 examples of one system."""
    interval = mean_interval(np.array([answer.score for answer in answers]), seed=seed)
    latency = np.array([answer.latency_ms for answer in answers])
    failed = [answer.error for answer in answers if answer.error]
    truncated = sum(error.startswith(TRUNCATED) for error in failed)
    return {
        **_rounded(interval),
        "n": len(answers),
        "failures": len(failed),
        "failure_kinds": {"truncated": truncated, "unparsable": len(failed) - truncated},
        "latency_ms": {
            "mean": round(float(latency.mean()), 2),
            "p50": round(float(np.quantile(latency, 0.5)), 2),
            "p95": round(float(np.quantile(latency, 0.95)), 2),
        },
        "tokens": {
            "prompt": round(float(np.mean([answer.prompt_tokens for answer in answers])), 1),
            "completion": round(float(np.mean([answer.completion_tokens for answer in answers])), 1),
        },
        "cost_per_1k_usd": round(1000 * float(np.mean([answer.cost_usd for answer in answers])), 6),
    }


def retention(student: Sequence[Answer], teacher: Sequence[Answer], seed: int) -> dict[str, Any]:
    """The student's score in percent of the teacher's, with a 95 % interval, its band and the next step."""
    ratio = ratio_interval(
        np.array([answer.score for answer in student]),
        np.array([answer.score for answer in teacher]),
        seed=seed,
    )
    if ratio is None:
        step = "the teacher's score is 0 on the test set: mend the metric or the program before anything else"
        return {
            "percent": None,
            "low": None,
            "high": None,
            "band": "undefined",
            "floor": None,
            "next_step": step,
        }
    percent = 100 * ratio.mean
    band = next(band for band in BANDS if percent >= band.floor)
    return {
        "percent": round(percent, 2),
        "low": round(100 * ratio.low, 2),
        "high": round(100 * ratio.high, 2),
        "band": band.name,
        "floor": band.floor,
        "next_step": band.next_step,
    }


def _without_truncated(answer: Answer, local: str | None) -> Answer:
    """An answer that a local model did not end is wrong; `local` names the predictor that it gave, None: all."""
    cut = [
        call["predictor"]
        for call in answer.calls
        if call.get("finish_reason") == "length" and local in (None, call["predictor"])
    ]
    if not cut:
        return answer
    error = f"{TRUNCATED}: {', '.join(cut)} reached the limit of answer tokens"
    return replace(answer, score=0.0, error=error)


def _identity(run: Run, role: str) -> str:
    """Identity of a local system: everything that decides its answers."""
    if role == SELF_ASK:
        return sha256_json([_identity(run, "student"), self_ask.prompt("", "")])
    registration = _registration(run, role)
    student = run.task.settings.student
    return sha256_json(
        {
            "version": VERSION,
            "model": registration.sha256,
            "name": registration.name,  # holds template, stops and context
            "runtime": [registration.runtime, _runtime_version(registration)],
            "program": _captured(run)["program"],
            **(
                {"predictor": student.predictor, "others": _captured(run)["system"]}
                if student.predictor
                else {}
            ),
            "data": run.task.data_sha256,  # a corrected label is judged anew
            "sampling": {
                "temperature": 0.0,
                "max_tokens": student.max_tokens,
                "context": registration.context,
            },
        }
    )


def _runtime_version(registration: Registration) -> str:
    # a server that somebody else runs is known by its address: /v1 does not tell versions
    return version("llama-cpp-python") if registration.runtime == "embedded" else registration.base_url or ""


def _registration(run: Run, role: str) -> Registration:
    return recorded(run.folder)["base" if role == "base" else "model"]


def _captured(run: Run) -> dict[str, str]:
    summary: dict[str, str] = read_json(run.stage("capture") / "summary.json")
    return summary


def _split(run: Run, name: str) -> list[Example]:
    rows = read_jsonl(run.stage("curate") / f"{name}.jsonl")
    return [Example(row["id"], row["values"]) for row in rows]


def _rounded(interval: Interval) -> dict[str, float]:
    return {name: round(value, 6) for name, value in vars(interval).items()}

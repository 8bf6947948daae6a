"""Certify: the confidence model, the threshold that is proven to keep the promise, and router.json.

The calibrate split is cut in two by the hash of each example's id: on the first part the model is
fitted, on the second the threshold is certified. The sealed test split only measures the outcome.
What is certified is what serving does: the same features, the same gate, the same comparison.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from serve import confidence
from serve.confidence import Field, LocalAnswer, Neighbours
from trainer import program as programs
from trainer.errors import EvaluateError
from trainer.fixed_prompt import FixedPrompt, call_of, local_answer
from trainer.program import ADAPTER, Predictor
from trainer.runs import Run, read_json, read_jsonl, sha256_file, sha256_json, write_json
from trainer.statistics import audit, certificate, fit, hybrid
from trainer.statistics.certificate import Certificate
from trainer.statistics.fit import Fitted
from trainer.statistics.hybrid import Rows
from trainer.traces import Answer

VERSION = 3
"""Raise it when the same answers shall give another router or summary."""
FIT_SHARE = 0.4
INPUT_FILES = (
    "curate/train.jsonl",
    "curate/calibrate.jsonl",
    "curate/test.jsonl",
    "capture/program.json",
    "export/summary.json",
    "register/registration.json",
)


def inputs(run: Run) -> dict[str, Any]:
    """What the outcome depends on. The answers follow from the systems' identities."""
    return {
        "version": VERSION,
        "files": {name: sha256_file(run.folder / name) for name in INPUT_FILES},
        "systems": _systems(run),
        "code": run.task.code_sha256,
        "quality": run.task.settings.quality.model_dump(),
        "max_tokens": run.task.settings.student.max_tokens,
        "seed": run.task.settings.seed,
    }


def run(run: Run) -> None:
    """Write router.json, neighbours.npz and summary.json.

    Without a certificate router.json says why and every request goes to the teacher.

    Raises:
        EvaluateError: teacher or student lack the answer to a calibration or test example.
    """
    prompts = _prompts(run)
    refusal = _unmeasured(run, prompts)
    if refusal:
        _write(run, prompts, None, certificate.refused(refusal), _teacher_alone(run))
        return
    (prompt,) = prompts
    folder = run.stage("certify")
    neighbours = Neighbours.build(prompt.queries)
    neighbours.save(folder / "neighbours.npz")
    neighbours = Neighbours.load(folder / "neighbours.npz")  # float16, as serving has them
    fit_ids, calibrate_ids = split([row["id"] for row in read_jsonl(run.folder / "curate/calibrate.jsonl")])
    fitted = _fitted(run, prompt, neighbours, fit_ids)
    fit_rows = _rows(run, prompt, neighbours, fitted, fit_ids)
    certified = _certified(run, fit_rows, _rows(run, prompt, neighbours, fitted, calibrate_ids))
    test_rows = _rows(run, prompt, neighbours, fitted, _test_ids(run))
    measured = _measured(run, fit_rows, test_rows, certified.threshold)
    baseline = None
    if certified.certified:
        known, sealed = (
            _kept_pairs(run, rows, certified.threshold, prompt) for rows in (fit_rows, test_rows)
        )
        baseline = audit.baseline(known, sealed, prompt.fields)
    _write(run, prompts, fitted, certified, measured, baseline=baseline)


def split(ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut example ids into FIT_SHARE for fitting and the rest for certifying, each ordered by hash."""
    ordered = sorted(ids, key=lambda identity: hashlib.sha256(f"certify:{identity}".encode()).digest())
    cut = round(FIT_SHARE * len(ordered))
    return ordered[:cut], ordered[cut:]


@dataclass(frozen=True)
class _Prompt:
    """A predictor with its prompt, and the variable parts that training saw."""

    predictor: Predictor
    fixed: FixedPrompt
    queries: list[str]

    @property
    def fields(self) -> list[Field]:
        return self.predictor.fields

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.predictor.name,
            **asdict(self.fixed),
            "fields": [{"name": field.name, "labels": list(field.labels) or None} for field in self.fields],
        }


def _prompts(run: Run) -> list[_Prompt]:
    """The program's predictors, as far as training has seen them."""
    program = programs.load(run.task, run.folder / "capture" / "program.json")
    conversations: dict[str, list[list[dict[str, str]]]] = {}
    for row in read_jsonl(run.folder / "curate" / "train.jsonl"):
        conversations.setdefault(row["predictor"], []).append(row["messages"])
    found = []
    for name, predictor in program.predictors.items():
        if name in conversations:
            fixed = FixedPrompt.of(conversations[name])
            asked = map(fixed.query, conversations[name])
            found.append(_Prompt(predictor, fixed, [text for text in asked if text is not None]))
    return found


def _unmeasured(run: Run, prompts: Sequence[_Prompt]) -> str:
    """Why this program's routed answers cannot be read off the whole runs that were measured, or ""."""
    if len(prompts) != 1:
        names = ", ".join(prompt.predictor.name for prompt in prompts)
        return (
            f"the program has {len(prompts)} predictors; a run that mixes local and teacher calls was not "
            f"measured: name the one to distil in student.predictor ({names})"
        )
    most = _most_routed(run, prompts[0])
    if most > 1:
        return (
            f"the program asks what would be routed up to {most} times for one example; a run that mixes local and "
            "teacher calls was not measured, so only a single call is certified"
        )
    return ""


def _most_routed(run: Run, prompt: _Prompt) -> int:
    """Most calls of an example, the student's or the teacher's, that a router would take for the measured one.

    It goes by the prompt: a second predictor with the same signature counts. Where the student answered for
    the whole program, every call of a run does.
    """
    whole, systems = run.task.settings.student.predictor is None, _systems(run)
    answers = (
        answer for role in ("student", "teacher") for answer in run.store.answers(systems[role]).values()
    )
    return max(
        (
            sum(whole or prompt.fixed.query(call["messages"]) is not None for call in answer.calls)
            for answer in answers
        ),
        default=0,
    )


def _systems(run: Run) -> dict[str, str]:
    systems: dict[str, str] = read_json(run.folder / "evaluate" / "summary.json")["systems"]
    return systems


def _test_ids(run: Run) -> list[str]:
    return [row["id"] for row in read_jsonl(run.folder / "curate" / "test.jsonl")]


def _answers(run: Run, role: str, ids: Sequence[str]) -> list[Answer]:
    found = run.store.answers(_systems(run)[role])
    missing = [identity for identity in ids if identity not in found]
    if missing:
        raise EvaluateError(
            f"{len(missing)} of {len(ids)} examples have no stored answer of the {role} (first: {missing[0]}); "
            "run evaluate again"
        )
    return [found[identity] for identity in ids]


def _local(answer: Answer, prompt: _Prompt) -> LocalAnswer | None:
    return local_answer(answer, prompt.predictor.name, prompt.fixed)


def _fitted(run: Run, prompt: _Prompt, neighbours: Neighbours, ids: Sequence[str]) -> Fitted:
    student, teacher = _answers(run, "student", ids), _answers(run, "teacher", ids)
    found = [
        (_local(mine, prompt), mine.score >= its.score) for mine, its in zip(student, teacher, strict=True)
    ]
    usable = [(local, good) for local, good in found if local is not None]
    features = [confidence.features(local, prompt.fields, neighbours) for local, _ in usable]
    return fit.fit(features, np.array([good for _, good in usable], dtype=bool), run.task.settings.seed)


def _rows(run: Run, prompt: _Prompt, neighbours: Neighbours, fitted: Fitted, ids: Sequence[str]) -> Rows:
    student, teacher = _answers(run, "student", ids), _answers(run, "teacher", ids)
    locals_ = [_local(answer, prompt) for answer in student]
    confidences = [
        confidence.confidence(local, prompt.fields, neighbours, fitted.model) if local else 0.0
        for local in locals_
    ]
    return Rows(
        ids=list(ids),
        answers=[local or LocalAnswer("", [], "error", 0, "") for local in locals_],
        confidences=np.array(confidences),
        local=np.array([answer.score for answer in student]),
        teacher=np.array([answer.score for answer in teacher]),
        failed=np.array([answer.error is not None for answer in teacher], dtype=bool),
    )


def _certified(run: Run, fit_rows: Rows, rows: Rows) -> Certificate:
    quality = run.task.settings.quality
    return certificate.certify_threshold(
        fit_rows.confidences,
        rows.confidences,
        rows.local,
        rows.teacher,
        keep=quality.keep,
        confidence=quality.confidence,
        graded=_graded(rows) or _graded(fit_rows),
        share=1 - FIT_SHARE,
    )


def _graded(rows: Rows) -> bool:
    return not bool(np.isin(np.concatenate([rows.local, rows.teacher]), (0.0, 1.0)).all())


def _measured(run: Run, fit_rows: Rows, rows: Rows, threshold: float | None) -> dict[str, Any]:
    """What the sealed test split says; it has no part in the choice of anything."""
    seed, keep = run.task.settings.seed, run.task.settings.quality.keep
    realised = hybrid.measured(rows, threshold, seed) | _cost(run, rows, threshold)
    allowed = (1 - keep) * float(rows.teacher.mean()) if len(rows) else 0.0
    risk = allowed if threshold is None else realised["risk"]
    return {
        "hybrid": realised,
        "risk_coverage": hybrid.risk_coverage(rows),
        "reliability": hybrid.reliability(rows),
        "baselines": hybrid.compared(rows, fit_rows, risk, _replies(run), seed),
        "baselines_risk": risk,
    }


def _cost(run: Run, rows: Rows, threshold: float | None) -> dict[str, float]:
    """API dollars per 1,000 examples: of a kept answer, what the program's other predictors cost."""
    student, teacher = (
        np.array([answer.cost_usd for answer in _answers(run, role, rows.ids)])
        for role in ("student", "teacher")
    )
    routed = np.where(rows.kept(threshold), student, teacher)
    return {"cost_per_1k_usd": round(1000 * float(routed.mean()), 6) if len(rows) else 0.0}


def _kept_pairs(run: Run, rows: Rows, threshold: float | None, prompt: _Prompt) -> list[audit.Pair]:
    """Local and teacher's answer of each row that the threshold keeps, where the teacher has answered."""
    calls = [call_of(answer, prompt.predictor.name) for answer in _answers(run, "teacher", rows.ids)]
    teacher = [call["completion"] if call else None for call in calls]
    found = zip(rows.kept(threshold), rows.answers, teacher, strict=True)
    return [(mine.text, its) for kept, mine, its in found if kept and its is not None]


def _replies(run: Run) -> Mapping[str, str] | None:
    """The local model's replies to self-ask, where evaluate asked it."""
    system = _systems(run).get("self_ask")
    if system is None:
        return None
    return {key: answer.calls[0]["completion"] for key, answer in run.store.answers(system).items()}


def _teacher_alone(run: Run) -> dict[str, Any]:
    """The hybrid that sends everything to the teacher."""
    answers = _answers(run, "teacher", _test_ids(run))
    scores = np.array([answer.score for answer in answers])
    failed = np.array([answer.error is not None for answer in answers], dtype=bool)
    rows = Rows([answer.example for answer in answers], [], np.zeros(len(scores)), scores, scores, failed)
    return {"hybrid": hybrid.measured(rows, None, run.task.settings.seed) | _cost(run, rows, None)}


def _write(
    run: Run,
    prompts: Sequence[_Prompt],
    fitted: Fitted | None,
    certified: Certificate,
    measured: Mapping[str, Any],
    *,
    baseline: Mapping[str, Any] | None = None,
) -> None:
    folder, quality = run.stage("certify"), run.task.settings.quality
    registered = read_json(run.folder / "register" / "registration.json")["model"]
    router = {
        "schema": 1,
        "task": run.task.name,
        "binds": _binds(run, registered),
        "threshold": certified.threshold,
        "certified": certified.certified,
        "keep": quality.keep,
        "confidence": quality.confidence,
        "reason": certified.reason,
        "predictors": [prompt.to_json() for prompt in prompts],
        "sampling": {
            "temperature": 0.0,
            "max_tokens": run.task.settings.student.max_tokens,
            "context": registered["context"],
        },
        "model": fitted.model.to_json() if fitted else None,
        "neighbours": "neighbours.npz" if fitted else None,
        "audit": baseline,
    }
    summary = {
        "certificate": certified.to_json() | {"keep": quality.keep, "confidence": quality.confidence},
        "fit": {key: value for key, value in vars(fitted).items() if key != "model"} if fitted else None,
        **measured,
    }
    write_json(folder / "summary.json", summary)
    write_json(folder / "router.json", router)


def _binds(run: Run, registered: Mapping[str, Any]) -> dict[str, str]:
    """What the certificate was measured on; it holds for nothing else."""
    exported = read_json(run.folder / "export" / "summary.json")
    apart = exported.get("deliver") == "adapter"
    return ({"base": exported["base"]["sha256"]} if apart else {}) | {
        "model": exported["model"]["sha256"],
        "quantization": exported["model"]["quantization"],
        "template": sha256_json(exported["template"]),
        "program": read_json(run.folder / "capture" / "summary.json")["program"],
        "adapter": ADAPTER,
        "runtime": registered["runtime"],
    }

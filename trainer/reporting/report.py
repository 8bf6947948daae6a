"""report.html: one file without any reference to a network, from what the stages have written.

What the file says comes from the run's JSON files alone, so that it can be made again at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from serve.confidence import ConfidenceModel, Field, Neighbours, confidence
from serve.manifest import Manifest, RouterFile
from trainer.fixed_prompt import FixedPrompt, local_answer
from trainer.reporting import charts, verdict
from trainer.reporting.charts import Line
from trainer.runs import Run, read_json, read_jsonl
from trainer.traces import Answer

VERSION = 1
"""Raise it when a report shall be made again for the same figures."""
SHOWN = 4
"""Examples shown of those kept, and of those handed over."""
LONGEST = 600
"""Characters of a text that is shown."""
BASELINES = {
    "confidence": "calibrated confidence",
    "mean_logprob": "mean log-probability",
    "nearest": "nearest neighbours",
    "self_ask": "model asks itself",
    "query_length": "short requests first",
    "random": "random",
}


Render = Callable[[Run, Manifest, Sequence[str]], str]
"""Makes the page of a run, its manifest, and why it was not promoted."""


def render(run: Run, manifest: Manifest, reasons: Sequence[str]) -> str:
    """The page.

    Args:
        manifest: of the release, as far as it is known.
        reasons: why the gate did not promote it; empty when it did.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": verdict.percent, "usd": _usd, "ms": _ms, "short": _short}
    template = environment.from_string(
        files("trainer.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(context(run, manifest, reasons))


def context(run: Run, manifest: Manifest, reasons: Sequence[str]) -> dict[str, Any]:
    """What the template is given."""
    stages = {
        name: _summary(run, name) for name in ("capture", "curate", "train", "export", "evaluate", "certify")
    }
    evaluated, certified = stages["evaluate"], stages["certify"]
    spent = float(stages["capture"]["cost_usd"]) + evaluated.get("bought_usd", 0.0)
    return {
        "m": manifest,
        "reasons": reasons,
        "stand_in": verdict.STAND_IN if manifest.teacher.stand_in else "",
        "verdict": verdict.sentence(manifest, certified["certificate"]),
        "criteria": verdict.criteria(manifest, spent),
        "certificate": certified["certificate"],
        "evaluated": evaluated,
        "certified": certified,
        "baselines": _baselines(certified),
        "curate": stages["curate"],
        "train": _scalars(stages["train"]),
        "parity": read_json(run.stage("register") / "parity.json"),
        "settings": _flat(run.task.settings.model_dump(mode="json", exclude_none=True)),
        "examples": _examples(run, evaluated["systems"]),
        "inputs": run.task.settings.inputs,
        "charts": _charts(run, manifest, certified, stages["train"]),
    }


def _charts(
    run: Run, manifest: Manifest, certified: Mapping[str, Any], trained: Mapping[str, Any]
) -> dict[str, Markup]:
    """Our own SVG, without any text from outside: safe to stand in the page as it is."""
    found = {"loss": _loss_chart(run.stage("train") / "metrics.jsonl", trained.get("best_step"))}
    if certified.get("risk_coverage"):
        found["risk_coverage"] = _risk_chart(manifest, certified)
    bins = (certified.get("reliability") or {}).get("bins") or []
    if bins:
        found["reliability"] = charts.reliability(
            [each["confidence"] for each in bins],
            [each["share"] for each in bins],
            [each["n"] for each in bins],
        )
    return {name: Markup(svg) for name, svg in found.items() if svg}


def _risk_chart(manifest: Manifest, certified: Mapping[str, Any]) -> str:
    teacher = manifest.scores["teacher"].mean or 1.0
    curve = certified["risk_coverage"]
    line = Line(
        BASELINES["confidence"],
        [0.0, *(point["coverage"] for point in curve)],
        [0.0, *(point["risk"] / teacher for point in curve)],
    )
    risk = certified["baselines_risk"] / teacher
    others = [
        Line(BASELINES[name], [found["coverage"]], [risk])
        for name, found in certified["baselines"].items()
        if name != "confidence" and name in BASELINES
    ]
    hybrid = certified["hybrid"]
    chosen = (hybrid["local_share"], hybrid["risk"] / teacher) if manifest.router.certified else None
    return charts.risk_coverage(line, others, 1 - manifest.router.keep, chosen)


def _loss_chart(metrics: Path, best_step: int | None) -> str:
    if not metrics.is_file():
        return ""
    rows = read_jsonl(metrics)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    evaluation = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if not train and not evaluation:
        return ""
    return charts.loss(
        Line("training", [step for step, _ in train], [value for _, value in train]),
        Line("held back", [step for step, _ in evaluation], [value for _, value in evaluation]),
        best_step,
    )


def _baselines(certified: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = certified.get("baselines") or {}
    rows = [
        {"name": BASELINES.get(name, name), "ours": name == "confidence", **row}
        for name, row in found.items()
    ]
    return sorted(rows, key=lambda row: -row["coverage"])


def _examples(run: Run, systems: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Sealed test examples as the router would treat them: kept (the wrong and the least sure first), handed over."""
    router = RouterFile.model_validate(read_json(run.stage("certify") / "router.json"))
    if router.model is None or len(router.predictors) != 1:
        return {"kept": [], "handed_over": []}
    neighbours = router.neighbours and Neighbours.load(run.stage("certify") / router.neighbours)
    model = ConfidenceModel.from_json(router.model.model_dump())
    prompt = router.predictors[0]
    fixed = FixedPrompt(prompt.fingerprint, prompt.prefix, prompt.suffix)
    fields = [Field(field.name, tuple(field.labels or ())) for field in prompt.fields]
    student, teacher = (run.store.answers(systems[role]) for role in ("student", "teacher"))
    rows = []
    for example in read_jsonl(run.folder / "curate" / "test.jsonl"):
        mine, its = student[example["id"]], teacher[example["id"]]
        local = local_answer(mine, prompt.name, fixed)
        sure = confidence(local, fields, neighbours or None, model) if local else 0.0
        rows.append(_example(example["values"], run.task.settings.inputs, mine, its, sure))
    bar = router.threshold if router.threshold is not None else 2.0
    kept = sorted(
        (row for row in rows if row["confidence"] >= bar), key=lambda row: (row["good"], row["confidence"])
    )
    other = sorted((row for row in rows if row["confidence"] < bar), key=lambda row: row["confidence"])
    half = SHOWN // 2
    return {"kept": [*kept[:half], *kept[half:][-half:]], "handed_over": other[:SHOWN]}


def _example(
    values: Mapping[str, Any], inputs: Sequence[str], mine: Answer, its: Answer, sure: float
) -> dict[str, Any]:
    return {
        "inputs": {name: values[name] for name in inputs},
        "local": mine.outputs or mine.error or "",
        "teacher": its.outputs or its.error or "",
        "same": bool(mine.outputs) and mine.outputs == its.outputs,
        "confidence": sure,
        "scores": (mine.score, its.score),
        "good": mine.score >= its.score,
    }


def _summary(run: Run, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(run.stage(stage) / "summary.json")
    return found


def _scalars(summary: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in summary.items() if isinstance(value, str | int | float | bool)}
    return {name.replace("_", " "): value for name, value in plain.items()}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return found


def _usd(value: float) -> str:
    return f"${value:,.2f}" if value >= 0.1 or value == 0 else f"${value:.4f}"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value < 10_000 else f"{value / 1000:,.1f} s"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"

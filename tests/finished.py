"""A run whose stages up to certify are done, without any model: answers are drawn, the rest is real.

Teacher, base and student answer the words of `tests.tasks`; the student is wrong more often on what
it is unsure of. evaluate's summary and certify's router are made by the real code from that.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import dspy
import numpy as np

from tests.tasks import row, write_task
from trainer import certify, evaluate, task
from trainer.program import load
from trainer.runs import Home, Run, write_json, write_jsonl
from trainer.runtimes.local import Registration
from trainer.traces import Answer, Store

TEACHER = "teacher-system"


def finished_run(
    root: Path,
    *,
    train: int = 60,
    calibrate: int = 60,
    test: int = 40,
    skill: float = 0.97,
    texts: dict[int, str] | None = None,
    **settings: Any,
) -> Run:
    """A run in `root`/home for the task in `root`/words, with every stage before release finished.

    Args:
        skill: the student's chance of being right on what it is sure of.
        texts: replaces the input text of examples, by number.
        settings: replace keys of task.yaml.
    """
    write_task(root / "words", rows=4, **settings)
    run = opened(root)
    sizes = {"train": train, "calibrate": calibrate, "test": test}
    examples = {
        split: [_example(number, texts or {}) for number in range(1000 * place, 1000 * place + size)]
        for place, (split, size) in enumerate(sizes.items())
    }
    _early_stages(run, examples, skill)
    _answer(run, examples, skill)
    certify.run(run)
    return run


def opened(root: Path) -> Run:
    """The run that `finished_run` made in `root`, or in the folder that it was copied from."""
    home = Home(root / "home")
    home.root.mkdir(parents=True, exist_ok=True)
    store = Store.open(home.database_url)
    return Run(task.load(root / "words"), home, store, home.runs("words") / "one", environment={})


def _example(number: int, texts: dict[int, str]) -> dict[str, Any]:
    values = row(number) | ({"text": texts[number]} if number in texts else {})
    return {"id": f"e{number:06}", "values": values}


def _early_stages(run: Run, examples: dict[str, list[dict[str, Any]]], skill: float) -> None:
    program = load(run.task)
    write_json(run.stage("capture") / "program.json", program.state)
    captured = {"system": TEACHER, "program": program.hash, "teacher": "openai/pretend", "cost_usd": 1.25}
    write_json(run.stage("capture") / "summary.json", captured)
    conversations = [
        {
            "example": each["id"],
            "predictor": "sort",
            "messages": _messages(run, each),
            "completion": _said("odd"),
        }
        for each in examples["train"]
    ]
    write_jsonl(run.stage("curate") / "train.jsonl", conversations)
    for split in ("calibrate", "test"):
        write_jsonl(run.stage("curate") / f"{split}.jsonl", examples[split])
    dropped = {"exact duplicate": 7, "score below 1": 12}
    write_json(run.stage("curate") / "summary.json", {"dropped": dropped, "warnings": []})
    write_json(
        run.stage("train") / "summary.json",
        {"backend": "trl", "base_sha256": "b" * 64, "steps": 90, "best_step": 60, "best_eval_loss": 0.05},
    )
    losses = [{"step": step, "loss": 2 * 0.95**step} for step in range(10, 100, 10)]
    held_back = [
        {"step": 30, "eval_loss": 0.5},
        {"step": 60, "eval_loss": 0.05},
        {"step": 90, "eval_loss": 0.06},
    ]
    write_jsonl(run.stage("train") / "metrics.jsonl", losses + held_back)
    weights = f"weights of skill {skill}".encode()
    (run.stage("export") / "model.gguf").write_bytes(weights)
    sha = hashlib.sha256(weights).hexdigest()
    write_json(
        run.stage("export") / "summary.json",
        {"model": {"sha256": sha, "quantization": "q8_0"}, "base": {}, "template": {"jinja": "x"}},
    )
    registered = {
        key: Registration("embedded", f"words:{key}", digest, 512).to_json()
        for key, digest in (("model", sha), ("base", "b" * 64))
    }
    write_json(run.stage("register") / "registration.json", registered)
    parity = {"prompt_tokens_equal": True, "answers_equal": 0.98, "metric_delta": 0.0, "fault": None}
    evidence = {"answers": {"n": 64, "differing": []}, "bos": 1}
    write_json(run.stage("register") / "parity.json", {**parity, "evidence": evidence})


def _answer(run: Run, examples: dict[str, list[dict[str, Any]]], skill: float) -> None:
    source = np.random.default_rng(int(skill * 1000))
    systems = {role: f"{role}-system-{skill}" for role in ("student", "base")} | {"teacher": TEACHER}
    stored = {role: run.store.answers(system) for role, system in systems.items()}
    rows: dict[str, list[Answer]] = {role: [] for role in ("teacher", "base", "student")}
    for split in ("calibrate", "test"):
        for each in examples[split]:
            sure = bool(source.random() < 0.85)
            chances = {"teacher": 0.97, "base": 0.4, "student": skill if sure else 0.55}
            for role, chance in chances.items():
                right = bool(source.random() < chance)
                answer = stored[role].get(each["id"])
                if answer is None:
                    answer = _drawn(run, each, systems[role], role=role, right=right, sure=sure)
                    run.store.add_answer(answer)
                if split == "test":
                    rows[role].append(answer)
    write_json(run.stage("evaluate") / "summary.json", evaluate.summary(run, rows))


def _drawn(run: Run, each: dict[str, Any], system: str, *, role: str, right: bool, sure: bool) -> Answer:
    other = {"even": "odd", "odd": "even"}
    label = each["values"]["label"] if right else other[each["values"]["label"]]
    first = -0.02 if sure else -0.6
    logprobs = [
        {"token": "[[ ## label ## ]]\n", "logprob": -0.001, "top_logprobs": []},
        {
            "token": label,
            "logprob": first,
            "top_logprobs": [
                {"token": label, "logprob": first},
                {"token": other[label], "logprob": -0.8 + 5 * first},
            ],
        },
        {"token": "\n\n[[ ## completed ## ]]", "logprob": -0.001, "top_logprobs": []},
    ]
    call = {
        "predictor": "sort",
        "messages": _messages(run, each),
        "completion": _said(label),
        "finish_reason": "stop",
        "prompt_tokens": 120,
        "completion_tokens": 14,
        "logprobs": logprobs if role != "teacher" else [],
    }
    return Answer(
        system=system,
        example=each["id"],
        role=role,
        task="words",
        outputs={"label": label},
        score=float(right),
        latency_ms=350.0 if role == "teacher" else 42.0,
        prompt_tokens=120,
        completion_tokens=14,
        cost_usd=0.0021 if role == "teacher" else 0.0,
        error=None,
        calls=[call],
    )


def _said(label: str) -> str:
    return f"[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]"


def _messages(run: Run, each: dict[str, Any]) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = dspy.ChatAdapter().format(
        _signature(run), [], {"text": each["values"]["text"]}
    )
    return [{"role": message["role"], "content": message["content"].strip()} for message in messages]


_SIGNATURES: dict[Path, Any] = {}


def _signature(run: Run) -> Any:
    if run.task.folder not in _SIGNATURES:
        _SIGNATURES[run.task.folder] = load(run.task).module.sort.signature
    return _SIGNATURES[run.task.folder]

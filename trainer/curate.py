"""Stage 2: keep the traces worth training on, and write the three splits that share nothing."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dspy.utils.exceptions import AdapterParseError

from trainer import harvest, program
from trainer.data import Example
from trainer.errors import CurateError
from trainer.program import Program
from trainer.runs import Run, read_json, sha256_file, sha256_json, write_json, write_jsonl
from trainer.settings import CurateSettings
from trainer.splits import MIN_SEALED, assigned
from trainer.traces import Answer

END = "[[ ## completed ## ]]"
"""What DSPy asks a model to end with; one that does so always has been cut off where it is missing."""
REPEATED_GRAM = 4
MIN_TEACHER_SCORE = 0.5
READ = 1
"""Raise it when other traffic is kept than before."""
log = logging.getLogger("homestill.curate")


def inputs(run: Run) -> dict[str, Any]:
    """What the outcome depends on. Traffic counts from the first harvest on: earlier runs stay as they are."""
    harvested = [trace.id for trace in run.store.traffic(run.task.name)]
    return (
        ({"traffic": sha256_json([READ, *harvested])} if harvested else {})
        | {
            "capture": [
                sha256_file(run.folder / "capture" / name) for name in ("program.json", "summary.json")
            ],
            "keep_score": run.task.settings.keep_score,
            "curate": run.task.settings.curate.model_dump(),
            "seed": run.task.settings.seed,
        }
        | ({"predictor": predictor} if (predictor := run.task.settings.student.predictor) else {})
    )


def run(run: Run) -> None:
    """Write train.jsonl, calibrate.jsonl, test.jsonl and summary.json.

    Raises:
        CurateError: too little or nothing learnable is left; `run.force` goes on all the same.
    """
    settings = run.task.settings
    folder = run.stage("curate")
    assignment = assigned(run.task)
    answers = run.store.answers(read_json(run.folder / "capture" / "summary.json")["system"])
    if unanswered := [example.id for example in assignment.examples() if example.id not in answers]:
        raise CurateError(
            f"{len(unanswered)} examples have no stored answer; run capture again, nothing is paid twice"
        )
    dropped = Counter({reason: len(ids) for reason, ids in assignment.dropped.items()})
    kept: list[Example] = []
    for example in assignment.splits["train"]:
        reason = rejected(
            answers[example.id], settings.keep_score, settings.curate, settings.student.predictor
        )
        if reason:
            dropped[reason] += 1
        else:
            kept.append(example)
    balanced = balance(kept, answers, settings.curate.balance)
    if len(balanced) < len(kept):
        dropped[f"class balance over {settings.curate.balance}"] += len(kept) - len(balanced)
    predictor = settings.student.predictor
    rows = [row for example in balanced for row in conversations(answers[example.id], predictor)]
    calls = [call for example in assignment.examples() for call in calls_of(answers[example.id], predictor)]
    traffic, unfit = _traffic(run, calls)
    rows += traffic
    summary = _summary(assignment.splits, balanced, rows, dropped, answers)
    summary["traffic"] = {"conversations": len(traffic), "dropped": dict(unfit.most_common())}
    _judge(run, summary)
    write_jsonl(folder / "train.jsonl", rows)
    for split in ("calibrate", "test"):
        sealed = [{"id": example.id, "values": example.values} for example in assignment.splits[split]]
        write_jsonl(folder / f"{split}.jsonl", sealed)
    write_json(folder / "summary.json", summary)


def _traffic(run: Run, calls: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Harvested conversations that fit the program, are as whole as captured ones, and near no example."""
    settings = run.task.settings.curate
    found, unfit = harvest.rows(run.store.traffic(run.task.name), calls, settings.near_duplicate)
    loaded = program.load(run.task)
    whole = [call for call in calls if call["finish_reason"] != "length"]
    marked = all(call["completion"].rstrip().endswith(END) for call in whole)
    kept = []
    for row in found:
        reason = misshapen(row["completion"], settings) or _unread(row, loaded, marked=marked)
        if reason:
            unfit[reason] += 1
        else:
            kept.append(row)
    return kept, unfit


def _unread(row: dict[str, Any], loaded: Program, *, marked: bool) -> str | None:
    """Why the program could not have used a harvested answer, or None: the journal does not tell which were cut off.

    Args:
        marked: the captured answers all end with the adapter's mark.
    """
    try:
        loaded.parse(row["predictor"], row["completion"])
    except AdapterParseError:
        return "answer that the program cannot read"
    return "answer without its end" if marked and not row["completion"].endswith(END) else None


def calls_of(answer: Answer, predictor: str | None) -> list[dict[str, Any]]:
    """The calls of a predictor, or of all where none is named."""
    return [call for call in answer.calls if predictor in (None, call["predictor"])]


def rejected(
    answer: Answer, keep_score: float, settings: CurateSettings, predictor: str | None = None
) -> str | None:
    """Why the teacher's answer is no training material, or None.

    Args:
        predictor: the one that is distilled; None: all of them.
    """
    calls = calls_of(answer, predictor)
    if answer.error:
        return "teacher's answer could not be read"
    if answer.strict_score < keep_score:
        return f"score below {keep_score:g}"
    if not calls:
        return f"{predictor} was not called" if predictor else "no predictor was called"
    if any(call["finish_reason"] == "length" for call in calls):
        return "completion cut off at teacher.max_tokens"
    reasons = (misshapen(call["completion"], settings) for call in calls)
    return next(filter(None, reasons), None)


def misshapen(completion: str, settings: CurateSettings) -> str | None:
    """Why a completion's mere shape makes it no training material, or None."""
    if len(completion) < settings.min_chars:
        return f"completion shorter than {settings.min_chars} characters"
    if len(completion) > settings.max_chars:
        return f"completion longer than {settings.max_chars} characters"
    if repetition(completion) > settings.max_repetition:
        return f"more than {settings.max_repetition:.0%} of the completion repeats itself"
    return None


def repetition(text: str) -> float:
    """Share of the text's word 4-grams that repeat an earlier one, 0..1."""
    words = text.split()
    grams = [tuple(words[start : start + REPEATED_GRAM]) for start in range(len(words) - REPEATED_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def balance(examples: Sequence[Example], answers: dict[str, Answer], field: str | None) -> list[Example]:
    """At most twice as many examples of a class as of the median class; the order is kept.

    Raises:
        CurateError: the field is no output of the program.
    """
    if not field:
        return list(examples)
    classes = {example.id: json.dumps(answers[example.id].outputs.get(field)) for example in examples}
    if any(field not in answers[example.id].outputs for example in examples):
        raise CurateError(
            f"curate.balance is {field!r}, which is no output of the program; name an output field"
        )
    sizes = sorted(Counter(classes.values()).values())
    most = 2 * sizes[len(sizes) // 2]
    seen: Counter[str] = Counter()
    kept = []
    for example in examples:
        seen[classes[example.id]] += 1
        if seen[classes[example.id]] <= most:
            kept.append(example)
    return kept


def conversations(answer: Answer, predictor: str | None = None) -> list[dict[str, Any]]:
    """What the student is trained on: each call of one example, or those of one predictor."""
    return [
        {
            "example": answer.example,
            "predictor": call["predictor"],
            "messages": [{**message, "content": message["content"].strip()} for message in call["messages"]],
            "completion": call["completion"].strip(),
        }
        for call in calls_of(answer, predictor)
    ]


def _summary(
    splits: dict[str, list[Example]],
    kept: list[Example],
    rows: list[dict[str, Any]],
    dropped: Counter[str],
    answers: dict[str, Answer],
) -> dict[str, Any]:
    train = splits["train"]
    mean = sum(answers[example.id].score for example in train) / len(train) if train else 0.0
    return {
        "captured": sum(map(len, splits.values())),
        "train": {
            "examples": len(kept),
            "conversations": len(rows),
            "captured": len(train),
            "teacher_mean": mean,
        },
        "calibrate": len(splits["calibrate"]),
        "test": len(splits["test"]),
        "per_predictor": dict(Counter(row["predictor"] for row in rows)),
        "dropped": dict(dropped.most_common()),
        "warnings": [],
    }


def _judge(run: Run, summary: dict[str, Any]) -> None:
    """Stop where training would be wasted; with `run.force` the same sentences are warnings."""
    settings, train = run.task.settings, summary["train"]
    faults = []
    if train["examples"] < settings.curate.min_examples:
        faults.append(
            f"{train['examples']} training examples are left of {train['captured']}, "
            f"curate.min_examples is {settings.curate.min_examples}; add data, or lower keep_score"
        )
    if train["captured"] and train["teacher_mean"] < MIN_TEACHER_SCORE:
        faults.append(
            f"the teacher itself scores {train['teacher_mean']:.2f} on this task; there is nothing good to learn: "
            "mend the program or the metric, or try teacher.optimizer"
        )
    for split in ("calibrate", "test"):
        if summary[split] < MIN_SEALED:
            faults.append(f"the {split} split holds {summary[split]} examples; give it {MIN_SEALED} or more")
    if min(summary["per_predictor"].values(), default=100) < 100:
        summary["warnings"].append("a predictor has fewer than 100 passing traces; expect a weaker student")
    if faults and not run.force:
        raise CurateError("\n".join([*faults, "to go on all the same: --force"]))
    summary["warnings"] += faults
    for warning in summary["warnings"]:
        log.warning("curate: %s", warning)

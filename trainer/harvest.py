"""Harvest: what the teacher has answered at the endpoint becomes traces, and with the next run training rows.

The requests that the student did not keep are those that it has most to learn from. They have no label, so no
metric judges them: the teacher's word is taken, as it was taken when the client was answered. They only
ever go into the train split, and never where they come close to a sealed example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.fingerprint import fingerprint
from serve.records.journal import Entry
from serve.records.reading import Selection, reading
from trainer.fixed_prompt import FixedPrompt, Messages
from trainer.runs import Home, sha256_json
from trainer.seam import translated
from trainer.splits import near_duplicates
from trainer.task import Task
from trainer.traces import TRAFFIC, Store, Trace

OK = 200


@dataclass
class Harvested:
    """What was found in the journal."""

    new: int = 0
    known: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Requests of the task that are no traces, by reason."""


def harvest(task: Task, home: Home, store: Store) -> Harvested:
    """Store the teacher's journaled answers for a task as traces; each once, however often it is called.

    Raises:
        StoreError: the journal cannot be read, or the store cannot be written.
    """
    found = Harvested()
    file = home.root / "journal.db"
    if not file.is_file():
        return found
    with translated(), reading(file) as journal:
        for entry in journal.every(Selection(task=task.name)):
            _take(entry, task, store, found)
    return found


def _take(entry: Entry, task: Task, store: Store, found: Harvested) -> None:
    reason = _unusable(entry)
    if reason:
        found.left_out[reason] += 1
        return
    trace = _trace(entry, task)
    if store.trace(trace.id):
        found.known += 1
    else:
        store.add_trace(trace)
        found.new += 1


def _unusable(entry: Entry) -> str | None:
    """Why a request teaches nothing, or None."""
    if entry.route != "teacher" or entry.status != OK:
        return "not answered by the teacher"
    if entry.egress != "allow":
        return "redacted, which would teach placeholders"
    if not entry.messages or not entry.answer:
        return "without its text"
    if entry.predictor is None:
        return "another prompt than the program's"
    said = [*entry.messages, entry.answer]
    if entry.answer.get("tool_calls") or not all(isinstance(each.get("content"), str) for each in said):
        return "more than text"
    return None


def _trace(entry: Entry, task: Task) -> Trace:
    assert entry.predictor is not None and entry.answer is not None  # it is usable
    return Trace(
        id=sha256_json([TRAFFIC, entry.id]),
        task=task.name,
        example=entry.id,
        predictor=entry.predictor,
        purpose=TRAFFIC,
        program=fingerprint(entry.messages),
        teacher=entry.model or "",
        stand_in=task.settings.teacher.stand_in,
        messages=entry.messages,
        completion=entry.answer["content"],
        response={},
        prompt_tokens=entry.prompt_tokens or 0,
        completion_tokens=entry.completion_tokens or 0,
        cost_usd=0.0,  # the endpoint's budget has counted it; teacher.budget_usd is for what runs ask
        latency_ms=entry.latency_ms,
        created=entry.created,
    )


def rows(
    traffic: Sequence[Trace], calls: Iterable[Mapping[str, Any]], near: float
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The traces that fit the program as it is now, as train.jsonl has them, and how many do not, by reason.

    Args:
        calls: of all examples, sealed ones too, as `Answer.calls` has them.
        near: Jaccard similarity from which two inputs count as the same; at 1 only equal ones do.
    """
    known: dict[str, list[Messages]] = {}
    for call in calls:
        known.setdefault(call["predictor"], []).append(call["messages"])
    kept: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for predictor in sorted({trace.predictor for trace in traffic}):
        own = [trace for trace in traffic if trace.predictor == predictor]
        asked = known.get(predictor, [])
        prompt = FixedPrompt.of(asked)
        fitting = [(trace, text) for trace in own if (text := prompt.query(trace.messages)) is not None]
        dropped["another prompt than the program's"] += len(own) - len(fitting)
        texts = [prompt.query(messages) or "" for messages in asked]
        near_ones = near_duplicates([*texts, *(text for _, text in fitting)], near)
        seen = set(texts)
        for at, (trace, text) in enumerate(fitting, len(texts)):
            if text in seen or at in near_ones:
                dropped["duplicate or near-duplicate of an example"] += 1
            else:
                kept.append(_row(trace))
            seen.add(text)
    return kept, +dropped


def _row(trace: Trace) -> dict[str, Any]:
    return {
        "example": trace.example,
        "predictor": trace.predictor,
        "messages": [{**message, "content": message["content"].strip()} for message in trace.messages],
        "completion": trace.completion.strip(),
    }

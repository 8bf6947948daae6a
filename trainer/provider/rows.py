"""DSPy's chat rows as the train stage reads them, and the metric that decides which of them are kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.errors import TrainError
from trainer.runs import sha256_json

ROLES = ("system", "user", "assistant")
MIN_ROWS = 2
SHOWN = 10
"""Faults that are listed before the rest is only counted."""

LONE = re.compile("[\ud800-\udfff]")
"""Cut off by a program that counts in UTF-16; no file takes it."""
log = logging.getLogger("homestill.provider")

Row = dict[str, Any]
Metric = Callable[..., Any]


def at_least(metric: Metric, threshold: float) -> Callable[..., bool]:
    """A metric that says which traces are good enough to learn from.

    DSPy's `BootstrapFinetune` keeps a trace whenever its score is not zero (0.01 passes), and calls the
    metric without a trace, so that a metric which is stricter while tracing never gets to be strict. This
    one always judges as while tracing, and passes what reaches the threshold. Where the metric raises, the
    trace is left out with a warning: DSPy would end the whole optimizer, after the teacher was paid.

    Args:
        metric: `metric(example, prediction, trace)`, which gives a bool, a number or a prediction with a score.
        threshold: 0..1; a trace is kept from this score on.

    Raises:
        ValueError: the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}; use a number above 0 and at most 1")

    def passes(example: Any, prediction: Any, trace: Any = None) -> bool:
        try:
            given = metric(example, prediction, [] if trace is None else trace)
            score: Any = getattr(given, "score", given)
            return bool(float(score) >= threshold)
        except Exception as error:  # noqa: BLE001  the user's own code failed on this trace
            log.warning("a trace is left out, its metric raised %s: %s", type(error).__name__, error)
            return False

    passes.__name__ = f"{getattr(metric, '__name__', type(metric).__name__)}_at_least_{threshold:g}"
    return passes


def conversations(train_data: Sequence[Mapping[str, Any]], data_format: Any) -> list[Row]:
    """DSPy's rows (`{"messages": [...]}`, the last one the answer) as lines of curate/train.jsonl.

    They are sorted by content: DSPy shuffles them, and the same rows must find the same run again. Rows
    that ask the same (their prompts are equal, the system message apart) count as one example and stay on
    one side of the split for the evaluation loss.

    Raises:
        TrainError: another format, fewer than two rows, or rows that are no conversations; all at once.
    """
    if str(getattr(data_format, "value", data_format)) != "chat":
        raise TrainError(
            f"the train data's format is {data_format!s}; only chat rows can be learned: use dspy.ChatAdapter"
        )
    faults = [fault for at, row in enumerate(train_data) for fault in _faults(at, row)]
    if faults:
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise TrainError("\n".join(faults[:SHOWN] + more))
    rows = sorted((_conversation(row["messages"]) for row in train_data), key=sha256_json)
    if len({row["example"] for row in rows}) < MIN_ROWS:
        raise TrainError(
            f"{len(rows)} rows are left to learn from, at least {MIN_ROWS} different ones are needed; "
            "lower the metric's threshold or give more examples"
        )
    return rows


def _conversation(messages: Sequence[Mapping[str, str]]) -> Row:
    told = [{"role": one["role"], "content": one["content"].strip()} for one in messages]
    *prompt, answer = told
    asked = [one["content"] for one in prompt if one["role"] != "system"] or [prompt[-1]["content"]]
    return {
        "example": sha256_json("\0".join(asked))[:16],
        "predictor": "",  # DSPy's rows do not say
        "messages": prompt,
        "completion": answer["content"],
    }


def _faults(at: int, row: Any) -> list[str]:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, Sequence) or len(messages) < 2:
        return [f"row {at} holds no messages; give a prompt and its answer"]
    faults = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            faults.append(f"row {at}, message {number} has no role of {', '.join(ROLES)}")
        elif not isinstance(message.get("content"), str):
            faults.append(f"row {at}, message {number} is not text; only text programs can be fine-tuned")
        elif LONE.search(message["content"]):
            faults.append(
                f"row {at}, message {number} holds half a character (a lone surrogate); leave it out"
            )
    if not faults and (messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip()):
        faults.append(f"row {at} does not end with an answer; its last message must be the assistant's")
    return faults

"""Early hand-over: what a half-written local answer already says about its confidence.

`Evidence` follows an answer token by token and bounds, from above, the confidence that it can still reach
over every possible continuation. Once that ceiling is below the threshold the answer cannot be kept,
and the teacher is asked at once. The decision is the one that would have been made at the end, as long as the
runtime's tokens go on to match its text; if they did not, the answer would be given up by mistake, which
costs money and never the promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from serve.confidence import (
    ENTROPY_MISSING,
    LOGIT_LIMIT,
    MARGIN_LIMIT,
    MARKER,
    ConfidenceModel,
    Field,
    Token,
    align,
    field_features,
    field_spans,
    label_probability,
    logit,
    value_tokens,
)

Interval = tuple[float, float]
LOOK_EVERY = 8
"""Tokens between two looks where no line has ended: a look costs as much as the answer is long."""
MARKER_START = "[[ ## "
ANY_LOGIT = (-LOGIT_LIMIT, LOGIT_LIMIT)


class Evidence:
    """Of one answer.

    Args:
        fields: the predictor's output fields.
        nearest: distances of the query to the training inputs (`Neighbours.distance`).
        threshold: from which confidence the answer is kept.
        max_tokens: most that the answer can have; one that is cut there has confidence 0.
        context: most that the prompt can have, where its tokens are not known yet.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        model: ConfidenceModel,
        nearest: tuple[float, float],
        threshold: float,
        *,
        max_tokens: int,
        context: int,
    ) -> None:
        self._fields = fields
        self._model = model
        self._threshold = threshold
        self._max_tokens = max_tokens
        self._fixed: dict[str, Interval] = {
            "input_tokens": (0.0, math.log1p(context)),
            "nearest": (nearest[0], nearest[0]),
            "nearest_mean": (nearest[1], nearest[1]),
            # an answer that is cut or cannot be parsed has confidence 0, which is below every ceiling
            "truncated": (0.0, 0.0),
            "unparsable": (0.0, 0.0),
            "unaligned": (0.0, 0.0),
        }
        self._tokens: list[Token] = []
        self._text = ""
        self._looked = 0
        self._ceiling: float | None = None

    def add(self, entries: Sequence[Mapping[str, Any]], text: str) -> None:
        """Further tokens (OpenAI's `logprobs.content`), and the whole text so far."""
        self._tokens += [Token.read(entry) for entry in entries]
        ended = "\n" in text[len(self._text) :]
        self._text = text
        if ended or len(self._tokens) - self._looked >= LOOK_EVERY:
            self._looked = len(self._tokens)
            self._ceiling = None

    @property
    def ruled_out(self) -> bool:
        """Whether the threshold is out of reach."""
        return self.ceiling() < self._threshold

    def ceiling(self) -> float:
        """Most that the confidence of the whole answer can be, as of the last look."""
        if self._ceiling is None:
            ranges = self._ranges()
            self._ceiling = 0.0 if ranges is None else self._highest(ranges)
        return self._ceiling

    def _highest(self, ranges: Mapping[str, Interval]) -> float:
        low = high = self._model.bias
        model = self._model
        for name, mean, scale, weight in zip(
            model.features, model.mean, model.scale, model.weights, strict=True
        ):
            ends = [weight * (end - mean) / scale for end in ranges[name]]
            low, high = low + min(ends), high + max(ends)
        return max(model.calibrated(low), model.calibrated(high))  # monotone, upwards or downwards

    def _ranges(self) -> dict[str, Interval] | None:
        """What each feature can still become; None where the answer can no longer be parsed."""
        places, aligned = align(self._text, self._tokens)
        spans = field_spans(self._text)
        found = dict(self._fixed)
        lowest = LOGIT_LIMIT
        for field in self._fields:
            span = spans.get(field.name)
            closed = span is not None and self._is_closed(span)
            if span is not None and not closed:
                span = self._certain(span)
            if span is not None and not self._is_possible(field, span, closed=closed):
                return None
            tokens = value_tokens(self._text, span, self._tokens, places) if span and aligned else []
            ranges = _settled(field, tokens) if closed and aligned else self._open(field, tokens)
            found |= {f"{field.name}.{name}": interval for name, interval in ranges.items()}
            lowest = min(lowest, ranges["min"][1])
        found["min"] = (-LOGIT_LIMIT, lowest if self._fields else -LOGIT_LIMIT)
        found["output_tokens"] = (math.log1p(len(self._tokens)), math.log1p(self._most()))
        return found

    def _most(self) -> int:
        return max(self._max_tokens, len(self._tokens))

    def _is_closed(self, span: tuple[int, int]) -> bool:
        """Whether the next field's marker stands behind the value: nothing can be added to it."""
        return any(MARKER.match(line.strip()) for line in self._text[span[1] :].splitlines())

    def _certain(self, span: tuple[int, int]) -> tuple[int, int]:
        """The part of an open value that stays its own: a line that may become a marker is left out."""
        start, end = span
        last = self._text.rfind("\n", 0, end) + 1
        line = self._text[max(start, last) : end].lstrip()
        may_be_marker = line.startswith(MARKER_START[: len(line)]) or line.startswith(MARKER_START)
        if may_be_marker:
            end = max(start, last)
        return start, start + len(self._text[start:end].rstrip())

    def _is_possible(self, field: Field, span: tuple[int, int], *, closed: bool) -> bool:
        """Whether an enum's value is, or can still become, an allowed one."""
        if not field.labels:
            return True
        value = self._text[slice(*span)]
        quoted = value[:1] in ("'", '"')
        if closed:
            inner = value[1:-1] if quoted and len(value) > 1 and value[-1] == value[0] else value
            return inner in field.labels or value in field.labels
        begun = value[1:].rstrip("'\"") if quoted else value
        return any(label.startswith((begun, value)) or value.startswith(label) for label in field.labels)

    def _open(self, field: Field, tokens: Sequence[Token]) -> dict[str, Interval]:
        """A value that has begun with these tokens, or has none yet; any number of others may follow."""
        if not tokens:
            ranges: dict[str, Interval] = dict.fromkeys(("min", "mean", "q10"), ANY_LOGIT)
            ranges |= {
                "margin": (0.0, MARGIN_LIMIT),
                "entropy": (0.0, ENTROPY_MISSING),
                "missing": (0.0, 1.0),
            }
            return ranges | ({"label": ANY_LOGIT} if field.labels else {})
        logits = sorted(logit(token.logprob) for token in tokens)
        longest = max(len(tokens), self._most() - (len(self._tokens) - len(tokens)))
        at = int(0.1 * (longest - 1))
        mean = sum(token.logprob for token in tokens) / longest
        now = field_features(field, tokens)
        known = not now["missing"]
        return {
            "min": (-LOGIT_LIMIT, logits[0]),
            "mean": (-LOGIT_LIMIT, logit(mean)),
            "q10": (-LOGIT_LIMIT, logits[at] if at < len(logits) else LOGIT_LIMIT),
            "margin": (min(0.0, now["margin"]), max(0.0, now["margin"])),
            "entropy": (now["entropy"] if known else 0.0, ENTROPY_MISSING),
            "missing": (now["missing"], 1.0),
        } | ({"label": (-LOGIT_LIMIT, self._label(field, tokens))} if field.labels else {})

    @staticmethod
    def _label(field: Field, tokens: Sequence[Token]) -> float:
        """Every further token can only lower the probability of the label."""
        return logit(math.log(max(label_probability(tokens, field.labels), 1e-30)))


def _settled(field: Field, tokens: Sequence[Token]) -> dict[str, Interval]:
    return {name: (value, value) for name, value in field_features(field, tokens).items()}

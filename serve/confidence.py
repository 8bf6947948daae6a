"""How sure a local answer is: features of the answer, and the calibrated model over them.

Certification learns from these features and routing computes them with the same code. No figure here
needs a second generation: everything is read from the answer and its token logprobs.
Missing evidence has the worst value that the feature can take, so that it never looks like confidence.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serve.neighbours import Neighbours

__all__ = ["ConfidenceModel", "Field", "LocalAnswer", "Neighbours", "confidence", "features", "parse"]

MARKER = re.compile(r"\[\[ ## (\w+) ## \]\]")
LOGIT_LIMIT = 12.0
"""Logits are kept within ±this; logprobs of small models are no finer."""
MARGIN_LIMIT = 10.0
ENTROPY_MISSING = math.log(20)
"""Entropy of a uniform choice among the 20 alternatives that OpenAI's interface gives at most, in nats."""
LOWEST, HIGHEST = 1e-6, 1 - 1e-6
"""Every confidence lies between these; 0.0 is for answers that no threshold may keep."""
SLACK = 16
"""Bytes that alignment may skip to find the next token."""
ALIGNED = 0.9
"""Share of the text that must be reached and of the tokens that must be found, else fields get all tokens."""


@dataclass(frozen=True)
class Field:
    """An output field of a predictor; `labels` are the allowed values of an enum, else empty."""

    name: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class LocalAnswer:
    """One answer of the local model, with what confidence needs of it."""

    text: str
    logprobs: Sequence[Mapping[str, Any]]
    """OpenAI's `choices[].logprobs.content`: {token, logprob, bytes?, top_logprobs: [{token, logprob}]}."""
    finish_reason: str
    prompt_tokens: int
    query: str
    """The variable part of the last user message (`serve.fingerprint.query`)."""


@dataclass(frozen=True)
class ConfidenceModel:
    """Standardise → logistic → calibration; exactly the "model" of router.json."""

    features: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    calibration: Mapping[str, Any]
    """{"kind": "sigmoid", "a", "b"}: 1 / (1 + exp(−(a·score + b))); or {"kind": "isotonic", "x", "y"}:
    linear between the points (x ascending), constant outside."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ConfidenceModel:
        """Read router.json's "model".

        Raises:
            ValueError: arrays of unequal length, or an unknown calibration.
        """
        names, mean, scale, weights = (
            tuple(value[name]) for name in ("features", "mean", "scale", "weights")
        )
        lengths = [len(names), len(mean), len(scale), len(weights)]
        if len(set(lengths)) != 1:
            raise ValueError(f"the router's model has arrays of lengths {lengths}; certify again")
        kind = value["calibration"]["kind"]
        if kind not in ("sigmoid", "isotonic"):
            raise ValueError(f'the calibration is "{kind}"; it is sigmoid or isotonic: certify again')
        return cls(names, mean, scale, weights, float(value["bias"]), value["calibration"])

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def score(self, features: Mapping[str, float]) -> float:
        """The logistic model's logit, before calibration.

        Raises:
            ValueError: a feature of the model is not among `features`.
        """
        try:
            values = [features[name] for name in self.features]
        except KeyError as missing:
            raise ValueError(
                f"no feature {missing}, on which the release was fitted; certify again"
            ) from None
        terms = zip(values, self.mean, self.scale, self.weights, strict=True)
        return self.bias + sum(weight * (value - mean) / scale for value, mean, scale, weight in terms)

    def probability(self, features: Mapping[str, float]) -> float:
        """Calibrated probability that the answer is as good as the teacher's."""
        return self.calibrated(self.score(features))

    def calibrated(self, score: float) -> float:
        """Probability, within [LOWEST, HIGHEST], of a score."""
        calibration = self.calibration
        if calibration["kind"] == "sigmoid":
            value = _sigmoid(calibration["a"] * score + calibration["b"])
        else:
            value = _interpolate(score, calibration["x"], calibration["y"])
        return min(max(value, LOWEST), HIGHEST)


def confidence(
    answer: LocalAnswer, fields: Sequence[Field], neighbours: Neighbours | None, model: ConfidenceModel
) -> float:
    """The calibrated confidence; 0.0, below every threshold, for an unparsable or truncated answer."""
    if answer.finish_reason == "length" or parse(answer.text, fields) is None:
        return 0.0
    return model.probability(features(answer, fields, neighbours))


def parse(text: str, fields: Sequence[Field]) -> dict[str, str] | None:
    """The values of all `fields`, read as DSPy's ChatAdapter does.

    None when a field is missing or an enum's value is not allowed: such an answer is unparsable.
    """
    spans = field_spans(text)
    values = {field.name: text[slice(*spans[field.name])] for field in fields if field.name in spans}
    if len(values) < len(fields):
        return None
    for field in fields:
        if field.labels:
            label = values[field.name] = _unquoted(values[field.name])
            if label not in field.labels:
                return None
    return values


def agreement(one: str, other: str, fields: Sequence[Field]) -> float:
    """Share of the fields in which two answers say the same, white space aside; 0 where one is unparsable."""
    first, second = parse(one, fields), parse(other, fields)
    if first is None or second is None or not fields:
        return 0.0
    same = sum(first[field.name].split() == second[field.name].split() for field in fields)
    return same / len(fields)


def features(answer: LocalAnswer, fields: Sequence[Field], neighbours: Neighbours | None) -> dict[str, float]:
    """Features of one answer; the names and their order depend on `fields` alone.

    Per field, over its value tokens: `min`, `mean`, `q10` of the token logprob (as logit of the
    probability: a logistic model over it is Platt scaling, and it does not saturate near 1), `margin`
    (nats, first value token), `entropy` (nats, largest of the value), `label` (logit of the
    probability among the allowed labels; enums only), `missing` (1 where one of these is not known).
    Over the answer: `min`, `output_tokens` and `input_tokens` (log1p), `truncated`, `unparsable`,
    `unaligned`, `nearest` and `nearest_mean` (cosine distances).
    """
    tokens = [Token.read(entry) for entry in answer.logprobs]
    places, aligned = align(answer.text, tokens)
    spans = field_spans(answer.text)
    found: dict[str, float] = {}
    for field in fields:
        value = value_tokens(answer.text, spans.get(field.name), tokens, places if aligned else None)
        found |= {f"{field.name}.{name}": number for name, number in field_features(field, value).items()}
    nearest, nearest_mean = neighbours.distance(answer.query) if neighbours else (1.0, 1.0)
    return found | {
        "min": min((found[f"{field.name}.min"] for field in fields), default=-LOGIT_LIMIT),
        "output_tokens": math.log1p(len(tokens)),
        "input_tokens": math.log1p(max(0, answer.prompt_tokens)),
        "truncated": float(answer.finish_reason == "length"),
        "unparsable": float(parse(answer.text, fields) is None),
        "unaligned": float(not aligned),
        "nearest": nearest,
        "nearest_mean": nearest_mean,
    }


@dataclass(frozen=True)
class Token:
    """One generated token; `alternatives` are the top k texts with their probabilities, best first."""

    text: str
    data: bytes
    logprob: float
    alternatives: list[tuple[str, float]]

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Token:
        # `bytes` is not read: not every runtime gives it, and what was measured without it is served without.
        text = str(entry.get("token") or "").replace("\ufffd", "")
        data = text.encode(errors="replace")
        top = [(str(other["token"]), math.exp(_logprob(other))) for other in entry.get("top_logprobs") or []]
        return cls(text, data, _logprob(entry), sorted(top, key=lambda pair: -pair[1]))


def _logprob(entry: Mapping[str, Any]) -> float:
    value = entry.get("logprob")
    return min(0.0, max(-100.0, float(value))) if value is not None and not math.isnan(value) else -100.0


def field_features(field: Field, tokens: Sequence[Token]) -> dict[str, float]:
    logits = sorted(logit(token.logprob) for token in tokens) or [-LOGIT_LIMIT]
    mean = sum(token.logprob for token in tokens) / len(tokens) if tokens else -LOGIT_LIMIT
    known = bool(tokens) and all(token.alternatives for token in tokens)
    result = {
        "min": logits[0],
        "mean": logit(mean),
        "q10": logits[int(0.1 * (len(logits) - 1))],
        "margin": _margin(tokens[0]) if known else 0.0,
        "entropy": max(map(_entropy, tokens)) if known else ENTROPY_MISSING,
    }
    if field.labels:
        probability = label_probability(tokens, field.labels) if known else 0.0
        result["label"] = logit(math.log(max(probability, 1e-30)))
    return result | {"missing": float(not known)}


def _margin(token: Token) -> float:
    if len(token.alternatives) < 2:
        return MARGIN_LIMIT
    first, second = token.alternatives[0][1], token.alternatives[1][1]
    return min(MARGIN_LIMIT, math.log(max(first, 1e-30) / max(second, 1e-30)))


def _entropy(token: Token) -> float:
    """Entropy (nats) of the top k, all that lies below them being one more outcome."""
    masses = [mass for _, mass in token.alternatives]
    rest = max(0.0, 1 - sum(masses))
    return -sum(mass * math.log(mass) for mass in (*masses, rest) if mass > 0)


def label_probability(tokens: Sequence[Token], labels: Sequence[str]) -> float:
    """Probability of the value among `labels`: at each token, of the alternatives that lead to a label.

    A label is followed until it is the only one left, so labels that share first tokens are told apart.
    """
    written, probability = "", 1.0
    for token in tokens:
        masses = {text: mass for text, mass in token.alternatives if _leads(written + text, labels)}
        own = masses.setdefault(token.text, math.exp(token.logprob))
        written += token.text
        if not written:
            continue  # a piece of white space alone, which an answer is not opened with
        left = _leads(written, labels)
        if not left:
            return 0.0
        probability *= own / max(sum(masses.values()), 1e-30)
        if left == 1:
            break
    return probability


def _leads(text: str, labels: Sequence[str]) -> int:
    """How many labels begin with what is written so far."""
    start = text.lstrip(" \n\"'").split("\n", 1)[0].rstrip(" \"'")
    return sum(label.startswith(start) for label in labels) if start else 0


def field_spans(text: str) -> dict[str, tuple[int, int]]:
    """Start and end of each field's stripped value in `text`; of a repeated field the first counts."""
    spans: dict[str, tuple[int, int]] = {}
    name, start, place = "", 0, 0
    for line in [*text.splitlines(keepends=True), ""]:
        marker = MARKER.match(line.strip())
        if marker or not line:
            if name:
                spans.setdefault(name, _stripped(text, start, place))
            if marker:
                name = marker.group(1)
                start = place + line.index(marker.group(0)) + len(marker.group(0))
        place += len(line)
    return spans


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    value = text[start:end]
    begin = start + len(value) - len(value.lstrip())
    return begin, begin + len(value.strip())


def _unquoted(value: str) -> str:
    """What DSPy accepts as a literal's value: also one within quotes."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def align(text: str, tokens: Sequence[Token]) -> tuple[list[tuple[int, int]], bool]:
    """Byte places of the tokens in the encoded text, and whether they cover it well enough to be used.

    Works over servers that cut the text at its ends, leave out control tokens or split characters (a
    piece of one decodes to nothing or to U+FFFD): a token that is not found close by has no width.
    """
    data = text.encode(errors="replace")
    places: list[tuple[int, int]] = []
    place, lost = 0, 0
    for token in tokens:
        slack = SLACK if token.data.strip() else 0  # white space is everywhere: it must not skip words
        found = data.find(token.data, place, place + len(token.data) + slack)
        lost += found < 0
        begin, place = (found, found + len(token.data)) if found >= 0 and token.data else (place, place)
        places.append((begin, place))
    return places, place >= ALIGNED * len(data) and lost <= max(2, (1 - ALIGNED) * len(tokens))


def value_tokens(
    text: str,
    span: tuple[int, int] | None,
    tokens: Sequence[Token],
    places: Sequence[tuple[int, int]] | None,
) -> list[Token]:
    if span is None:
        return []
    if places is None:
        return list(tokens)
    start, end = (len(text[:place].encode(errors="replace")) for place in span)
    return [
        token
        for token, (begin, after) in zip(tokens, places, strict=True)
        if (begin < end and after > start) or (begin == after and start <= begin < end)
    ]


def logit(logprob: float) -> float:
    """log(p / (1 − p)) of p = exp(logprob), within ±LOGIT_LIMIT."""
    if logprob > -math.exp(-LOGIT_LIMIT):
        return LOGIT_LIMIT
    return min(LOGIT_LIMIT, max(-LOGIT_LIMIT, logprob - math.log(-math.expm1(logprob))))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _interpolate(value: float, x: Sequence[float], y: Sequence[float]) -> float:
    above = bisect_right(x, value)
    if above in (0, len(x)):
        return y[max(0, above - 1)]
    share = (value - x[above - 1]) / (x[above] - x[above - 1])
    return y[above - 1] + share * (y[above] - y[above - 1])

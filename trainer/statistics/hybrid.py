"""What the hybrid of local model and teacher achieves on sealed rows, and how simpler scores compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve import self_ask
from serve.confidence import LocalAnswer, Neighbours
from serve.neighbours import DIMENSIONS, vector
from trainer.statistics import baselines
from trainer.statistics.scores import mean_interval, ratio_interval

Floats = NDArray[np.float64]

CURVE_POINTS = 100
BINS = 10


@dataclass(frozen=True)
class Rows:
    """Examples with the local answer, its confidence and both scores, all in one order [n]."""

    ids: Sequence[str]
    answers: Sequence[LocalAnswer]
    confidences: Floats
    """0 where no threshold may keep the answer."""
    local: Floats
    teacher: Floats
    failed: NDArray[np.bool_]
    """The teacher failed: handed over, the row is a failure of the hybrid too."""

    @property
    def good(self) -> NDArray[np.bool_]:
        """What confidence is the probability of: the local score reaches the teacher's."""
        return self.local >= self.teacher

    @property
    def losses(self) -> Floats:
        """What keeping each local answer costs, 0..1."""
        return np.maximum(0.0, self.teacher - self.local)

    def kept(self, threshold: float | None) -> NDArray[np.bool_]:
        return self.confidences >= (np.inf if threshold is None else threshold)

    def __len__(self) -> int:
        return len(self.ids)


def measured(rows: Rows, threshold: float | None, seed: int = 0) -> dict[str, Any]:
    """Score of the routed rows with its 95 % interval, local share, realised retention and risk."""
    kept = rows.kept(threshold)
    routed = np.where(kept, rows.local, rows.teacher)
    interval = mean_interval(routed, seed=seed)
    retention = ratio_interval(routed, rows.teacher, seed=seed)
    return {
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "n": len(rows),
        "failures": int((rows.failed & ~kept).sum()),
        "local_share": _mean(kept),
        "retention": None if retention is None else vars(retention),
        "risk": _mean(np.where(kept, rows.losses, 0.0)),
    }


def risk_coverage(rows: Rows) -> list[dict[str, float]]:
    """Surest answers first: threshold, coverage, risk (mean loss over all rows), routed score.

    `selective_risk` is the mean loss over the kept rows. At most CURVE_POINTS points.
    """
    levels = np.unique(rows.confidences[rows.confidences > 0])[::-1]
    chosen = (
        levels[np.unique(np.linspace(0, len(levels) - 1, CURVE_POINTS).astype(int))] if len(levels) else []
    )
    points = []
    for threshold in chosen:
        kept = rows.kept(float(threshold))
        points.append(
            {
                "threshold": float(threshold),
                "coverage": _mean(kept),
                "risk": _mean(np.where(kept, rows.losses, 0.0)),
                "selective_risk": _mean(rows.losses[kept]),
                "routed": _mean(np.where(kept, rows.local, rows.teacher)),
            }
        )
    return points


def reliability(rows: Rows) -> dict[str, Any]:
    """Confidence against what came true, over the answers that may be kept.

    `bins` hold about equally many rows each; `error` is the expected calibration error over them and
    `brier` the mean squared error of the confidence; None without rows.
    """
    usable = rows.confidences > 0
    confidences, good = rows.confidences[usable], rows.good[usable].astype(float)
    if not len(confidences):
        return {"bins": [], "error": None, "brier": None}
    parts = [part for part in np.array_split(np.argsort(confidences, kind="stable"), BINS) if len(part)]
    bins = [
        {"n": len(part), "confidence": _mean(confidences[part]), "share": _mean(good[part])} for part in parts
    ]
    gaps = [each["n"] * abs(each["confidence"] - each["share"]) for each in bins]
    return {
        "bins": bins,
        "error": sum(gaps) / len(confidences),
        "brier": float(np.mean((confidences - good) ** 2)),
    }


def compared(
    rows: Rows, fit: Rows, risk: float, replies: Mapping[str, str] | None = None, seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """AUROC, and coverage at the same realised risk, of our confidence and of the runners-up.

    All go through the same gate: what no threshold may keep counts as least sure for each.

    Args:
        rows: sealed rows.
        fit: the rows that nearest neighbours may know the outcomes of.
        replies: the local model's replies to self-ask, by example id, where it was asked.
    """
    known = Neighbours(
        np.array([vector(answer.query) for answer in fit.answers], np.float32).reshape(-1, DIMENSIONS)
    )
    outcomes = fit.good.astype(float)
    scores = {
        "confidence": rows.confidences,
        "mean_logprob": _each(baselines.mean_logprob(answer) for answer in rows.answers),
        "nearest": _each(baselines.nearest_outcomes(a.query, known, outcomes) for a in rows.answers),
        "random": _each(baselines.at_random(identity, seed) for identity in rows.ids),
        "query_length": _each(baselines.query_length(answer) for answer in rows.answers),
    }
    if replies is not None:
        asked = (replies.get(identity, "") for identity in rows.ids)
        scores["self_ask"] = _each(self_ask.score(reply) for reply in asked)
    usable = rows.confidences > 0
    return {name: _compared(np.where(usable, score, -np.inf), rows, risk) for name, score in scores.items()}


def _compared(scores: Floats, rows: Rows, risk: float) -> dict[str, float | None]:
    usable = np.isfinite(scores)
    kept = baselines.coverage_at_risk(
        scores[usable], rows.losses[usable], risk * len(rows) / max(1, usable.sum())
    )
    return {
        "auroc": baselines.auroc(np.where(usable, scores, -1e9), rows.good),
        "coverage": kept * float(usable.mean()) if len(rows) else 0.0,
    }


def _each(values: Any) -> Floats:
    return np.fromiter(values, dtype=float)


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else 0.0

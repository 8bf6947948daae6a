"""The certified threshold: which local answers may be kept so that the promise holds.

The promise: with probability `confidence` over the calibration rows, the routed score is at least
`keep` times the teacher's, in expectation over the traffic. ρ stands for keep, δ for 1 − confidence.

Thresholds are tried from the strictest to the laxest, each with a level-δ test, up to the first that
fails: fixed-sequence testing, which needs no correction for many thresholds (Maurer, Hothorn and
Lehmacher 1995; used for risk control by Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then
Test", 2021). Pure functions; docs/certification.md has the reasoning for readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, logsumexp

Floats = NDArray[np.float64]

GRID = 50
"""Thresholds that are tried: quantiles of the fit split's confidences."""
BETS = (0.4, 0.75, 0.97)
"""Constant bets, as parts of 1/ρ, that share the first money of the betting test. Fixed beforehand: with
few bets little is lost to the bad ones, and these come within 3 % of the best power over 90-720 rows."""
NOTHING_KEPT = (
    "no local answer of the calibration rows can be kept: all are unparsable, or less sure than any fit row; "
    "train on more examples"
)
MOST_ROWS = 1_000_000
"""A promise that would need more rows than this is called out of reach."""


@dataclass(frozen=True)
class Point:
    """One threshold of the grid, as the calibration rows judge it."""

    threshold: float
    local_share: float
    routed: float
    """Mean score of the routed rows."""
    retention: float | None
    """Routed over the teacher's mean; None when the teacher never scores."""
    bound: float
    """Binary: U / T, upper bound on the share of the teacher's score that is lost. Graded: the p-value."""
    limit: float
    """The bound may be at most this: 1 − ρ, or δ."""
    passed: bool
    tested: bool
    """False behind the first failure: there a pass proves nothing."""


@dataclass(frozen=True)
class Certificate:
    """The outcome. `threshold` is None when nothing could be certified, and `reason` says why."""

    threshold: float | None
    certified: bool
    local_share: float
    """Share of the calibration rows that is answered locally."""
    reason: str
    curve: tuple[Point, ...] = ()
    rows: int = 0
    rows_missing: int | None = None
    """Further calibration rows that a refusal asks for; None when more rows would not help."""
    graded: bool = False
    examples_missing: int | None = None
    """Further examples that give so many rows: what people are told."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def certify_threshold(
    confidences_fit: Floats,
    confidences: Floats,
    local_scores: Floats,
    teacher_scores: Floats,
    *,
    keep: float,
    confidence: float,
    graded: bool,
    share: float = 1.0,
) -> Certificate:
    """The laxest threshold that is proven to keep the promise.

    Args:
        confidences_fit: confidences [m] of the fit rows; they only place the grid.
        confidences: confidences [n] of the calibration rows, in an order that no score has influenced.
        local_scores: scores [n] of the local answers, 0..1; binary scores are 0 or 1.
        teacher_scores: scores [n] of the teacher.
        keep: ρ, in (0, 1).
        confidence: 1 − δ, in (0, 1).
        graded: use the betting test instead of the exact binomial bounds.
        share: of further examples, those that become calibration rows.
    """
    grid = thresholds(confidences_fit)
    kept = confidences[None, :] >= grid[:, None]
    delta = 1 - confidence
    prove = _graded_bounds if graded else _binary_bounds
    bounds, limit = prove(kept, local_scores, teacher_scores, keep, delta)
    failures = np.flatnonzero(bounds > limit)
    stop = int(failures[0]) if len(failures) else len(grid)
    curve = _curve(grid, kept, local_scores, teacher_scores, bounds=bounds, limit=limit, stop=stop)
    rows = len(confidences)
    if stop and curve[stop - 1].local_share > 0:
        best = curve[stop - 1]
        return Certificate(best.threshold, True, best.local_share, "", curve, rows, 0, graded)
    if stop == len(grid):
        return Certificate(None, False, 0.0, NOTHING_KEPT, curve, rows, None, graded)
    need = graded_rows_needed if graded else binary_rows_needed
    needed = need(kept[stop], local_scores, teacher_scores, keep, delta)
    missing = None if needed is None or needed <= rows else needed - rows
    examples = missing and math.ceil(missing / share)
    reason = _refusal(curve[stop], rows, examples, keep, confidence)
    return Certificate(None, False, 0.0, reason, curve, rows, missing, graded, examples)


def refused(reason: str) -> Certificate:
    """No certificate, for a reason that no calibration row can change."""
    return Certificate(None, False, 0.0, reason)


def thresholds(confidences_fit: Floats) -> Floats:
    """The grid, strictest first: at most GRID distinct quantiles of the confidences above 0.

    Rows with confidence 0 (unparsable, truncated) are never kept, so no threshold lies there.
    """
    usable = confidences_fit[confidences_fit > 0]
    if not len(usable):
        return np.empty(0)
    return np.unique(np.quantile(usable, np.linspace(0, 1, GRID), method="lower"))[::-1]


def upper_bound(events: NDArray[Any] | int, rows: int, delta: float) -> Floats:
    """Clopper–Pearson upper bound on a rate, at level δ: BetaInv(1 − δ; h + 1, n − h); 1 where h = n.

    Source: Clopper and Pearson, Biometrika 1934.
    """
    count = np.asarray(events, dtype=float)
    inside = count < rows
    bound = betaincinv(count + 1, np.where(inside, rows - count, 1.0), 1 - delta)
    return np.asarray(np.where(inside, bound, 1.0), dtype=float)


def lower_bound(events: NDArray[Any] | int, rows: int, delta: float) -> Floats:
    """Clopper–Pearson lower bound on a rate, at level δ: BetaInv(δ; t, n − t + 1); 0 where t = 0."""
    count = np.asarray(events, dtype=float)
    some = count > 0
    bound = betaincinv(np.where(some, count, 1.0), rows - count + 1, delta)
    return np.asarray(np.where(some, bound, 0.0), dtype=float)


def lost_share_bound(lost: NDArray[Any] | int, right: int, rows: int, delta: float) -> Floats:
    """U / T: upper bound, at level δ, on P(lost) / P(right); 1 where T = 0.

    Args:
        lost: h, rows kept locally where the teacher is right and the local answer wrong.
        right: t, rows where the teacher is right.
        rows: n, all rows, kept or not.
    """
    lower = float(lower_bound(right, rows, delta / 2))
    upper = upper_bound(lost, rows, delta / 2)
    if lower <= 0:
        return np.ones_like(upper)
    share: Floats = np.minimum(upper / lower, 1.0)
    return share


def betting_p_value(gains: Floats, keep: float) -> Floats:
    """p-values [k] against "the mean gain is at most 0", for k sequences of gains [k, n] in [−ρ, 1].

    A gambler spreads 1 evenly over constant bets ν in [0, 1/ρ); its wealth is the mean of their wealths
    ∏(1 + νWᵢ). That equals betting on row i the mean ν weighted by what rows before i have won: νᵢ is
    predictable and below 1/ρ, so under the null the wealth is a nonnegative supermartingale, which
    passes 1/δ with probability at most δ (Ville 1939). p = 1 / largest wealth.
    Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024.
    """
    bets = np.array(BETS)[:, None] / keep
    wealth = np.cumsum(np.log1p(bets * np.atleast_2d(gains)[:, None, :]), axis=2)
    spread = logsumexp(wealth, axis=1) - math.log(len(BETS))
    p_values: Floats = np.exp(-spread.max(axis=1, initial=0.0))
    return p_values


def binary_rows_needed(
    kept: NDArray[np.bool_], local_scores: Floats, teacher_scores: Floats, keep: float, delta: float
) -> int | None:
    """Rows that would certify this threshold if rates stay as observed; None when no number does.

    Where more is lost than allowed, but chance may be to blame, rows are counted for half the allowed loss.
    """
    rows = len(kept)
    if not rows:
        return rows_needed(0.0, 1.0, keep, delta)
    lost, right = int((kept & (teacher_scores > local_scores)).sum()), int(teacher_scores.sum())
    as_observed = rows_needed(lost / rows, right / rows, keep, delta)
    if as_observed is not None:
        return as_observed
    least = float(lower_bound(lost, rows, delta / 2)) / float(upper_bound(right, rows, delta / 2))
    if least > 1 - keep:
        return None
    return rows_needed((1 - keep) / 2 * right / rows, right / rows, keep, delta)


def rows_needed(lost_rate: float, right_rate: float, keep: float, delta: float) -> int | None:
    """Smallest n with U / T ≤ 1 − ρ when h = lost_rate · n (rounded up) and t = right_rate · n (down)."""

    def proven(rows: int) -> bool:
        lost, right = math.ceil(lost_rate * rows - 1e-9), math.floor(right_rate * rows + 1e-9)
        return bool(lost_share_bound(lost, right, rows, delta) <= 1 - keep)

    if right_rate <= 0 or lost_rate >= (1 - keep) * right_rate:
        return None
    return _first(proven)


def graded_rows_needed(
    kept: NDArray[np.bool_], local_scores: Floats, teacher_scores: Floats, keep: float, delta: float
) -> int | None:
    """Rows that would certify this threshold if the observed rows came again and again.

    Where more is lost than allowed, but chance may be to blame, the rows are shifted to half the allowed loss.
    """
    gains = np.where(kept, local_scores, teacher_scores) - keep * teacher_scores
    if not len(gains):
        gains = np.array([1 - keep])  # the best that can come: teacher and local answer always right
    half = (1 - keep) / 2 * float(teacher_scores.mean()) if len(teacher_scores) else 0.0
    if gains.mean() <= 0:
        if betting_p_value(-gains * keep, keep)[0] <= delta or half <= 0:
            return None
        gains = np.minimum(gains - gains.mean() + half, 1.0)

    def proven(rows: int) -> bool:
        return float(betting_p_value(np.resize(gains, rows), keep)[0]) <= delta

    return _first(proven, most=100_000)


def _first(proven: Callable[[int], bool], most: int = MOST_ROWS) -> int | None:
    """Smallest number of rows that is enough, found by doubling and halving."""
    high = 1
    while not proven(high):
        high *= 2
        if high > most:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proven(middle) else (middle, high)
    return high


def _binary_bounds(
    kept: NDArray[np.bool_], local_scores: Floats, teacher_scores: Floats, keep: float, delta: float
) -> tuple[Floats, float]:
    lost = (kept & (teacher_scores > local_scores)).sum(axis=1)
    rows = len(teacher_scores)
    if not rows:
        return np.ones(len(kept)), 1 - keep
    return lost_share_bound(lost, int(teacher_scores.sum()), rows, delta), 1 - keep


def _graded_bounds(
    kept: NDArray[np.bool_], local_scores: Floats, teacher_scores: Floats, keep: float, delta: float
) -> tuple[Floats, float]:
    gains = np.where(kept, local_scores, teacher_scores) - keep * teacher_scores
    return betting_p_value(gains, keep) if len(kept) else np.empty(0), delta


def _curve(
    grid: Floats,
    kept: NDArray[np.bool_],
    local_scores: Floats,
    teacher_scores: Floats,
    *,
    bounds: Floats,
    limit: float,
    stop: int,
) -> tuple[Point, ...]:
    rows = len(teacher_scores)
    teacher = float(teacher_scores.mean()) if rows else 0.0
    points = []
    for index, threshold in enumerate(grid):
        routed = float(np.where(kept[index], local_scores, teacher_scores).mean()) if rows else 0.0
        points.append(
            Point(
                threshold=float(threshold),
                local_share=float(kept[index].mean()) if rows else 0.0,
                routed=routed,
                retention=routed / teacher if teacher else None,
                bound=float(bounds[index]),
                limit=limit,
                passed=bool(bounds[index] <= limit),
                tested=index <= stop,
            )
        )
    return tuple(points)


def _refusal(point: Point, rows: int, examples: int | None, keep: float, confidence: float) -> str:
    promise = f"{keep:.0%} of the teacher's score with {confidence:.0%} confidence"
    if examples is not None:
        return (
            f"{rows} calibration rows do not prove {promise}; about {examples:,} more examples in the calibrate "
            "split could, if the local answers stay as good or get better"
        )
    kept = "nothing" if point.retention is None else f"{point.retention:.1%}"
    return (
        f"with the surest {point.local_share:.0%} of the answers kept, {kept} of the teacher's score is left, "
        f"{promise} is asked for, and more rows would not help: train on more examples, or lower quality.keep"
    )

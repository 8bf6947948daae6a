"""Means with intervals: what a measured score says about the score on all requests.

Binary scores get Wilson's interval (Wilson 1927), graded ones a percentile bootstrap with a fixed
seed; a ratio of two systems on the same examples gets a paired bootstrap; a difference between two
releases, of which only means and intervals are known, gets MOVER (Zou and Donner 2008), which for
Wilson's intervals is Newcombe's method 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value and the interval that covers the true one with the confidence that was asked for."""

    mean: float
    low: float
    high: float


def mean_interval(scores: Floats, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of the scores [n], each 0..1, with its interval. Fewer than two rows prove nothing: 0..1."""
    if len(scores) < 2:
        return Interval(float(scores.mean()) if len(scores) else 0.0, 0.0, 1.0)
    mean = float(scores.mean())
    if np.isin(scores, (0.0, 1.0)).all():
        found = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(confidence, method="wilson")
    else:
        found = stats.bootstrap(
            (scores,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def ratio_interval(part: Floats, whole: Floats, confidence: float = 0.95, seed: int = 0) -> Interval | None:
    """Mean of `part` over mean of `whole`, both [n] on the same examples, with its interval.

    None where fewer than two rows, or a `whole` that never scores, make the ratio meaningless.
    """
    if len(whole) < 2 or whole.mean() <= 0:
        return None
    found = stats.bootstrap(
        (part, whole),
        _ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(part.mean() / whole.mean()), float(found.low), float(found.high))


def difference_interval(new: Interval, old: Interval) -> Interval:
    """`new` − `old` of two independent samples, from their means and intervals (MOVER)."""
    low = np.hypot(new.mean - new.low, old.high - old.mean)
    high = np.hypot(new.high - new.mean, old.mean - old.low)
    difference = new.mean - old.mean
    return Interval(difference, difference - float(low), difference + float(high))


def _ratio(part: Floats, whole: Floats, axis: int = -1) -> Floats:
    # a resample in which the whole never scores says nothing: counted as equal, not as infinite
    top, bottom = part.mean(axis=axis), whole.mean(axis=axis)
    return np.asarray(np.divide(top, bottom, out=np.ones_like(np.asarray(top)), where=bottom > 0))

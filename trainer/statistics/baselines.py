"""The runners-up: simpler scores of how sure a local answer is, against which reports compare.

Each gives a number that is higher the surer it is; only the order counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from serve.confidence import LocalAnswer, Neighbours

Floats = NDArray[np.float64]


def mean_logprob(answer: LocalAnswer) -> float:
    """Mean token logprob of the whole answer, in nats; −100 without logprobs."""
    found = [float(entry["logprob"]) for entry in answer.logprobs]
    return float(np.mean(found)) if found else -100.0


def query_length(answer: LocalAnswer) -> float:
    """Short queries first: minus the characters of the query."""
    return -float(len(answer.query))


def at_random(example: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on nothing but the example's id and the seed."""
    return int(hashlib.sha256(f"{seed}:{example}".encode()).hexdigest()[:13], 16) / 16**13


def nearest_outcomes(query: str, known: Neighbours, outcomes: Floats, count: int = 5) -> float:
    """Mean outcome of the `count` known queries that are nearest, each weighted by its similarity."""
    distances, rows = known.nearest(query, count)
    weights = 1.01 - distances  # never 0: rows that share nothing still count alike
    return float(np.average(outcomes[rows], weights=weights)) if len(rows) else 0.0


def auroc(scores: Sequence[float] | Floats, outcomes: NDArray[np.bool_]) -> float | None:
    """Chance that a good answer scores above a bad one; None when all outcomes are the same."""
    return float(roc_auc_score(outcomes, scores)) if 0 < outcomes.sum() < len(outcomes) else None


def coverage_at_risk(scores: Floats, losses: Floats, risk: float) -> float:
    """Largest share of rows kept, surest first, whose summed losses over all rows stay within `risk`.

    Args:
        scores: [n]; rows with equal scores are kept together, as a threshold would.
        losses: [n], what keeping each row costs: teacher's score minus the local one.
        risk: allowed mean loss over all n rows.
    """
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    total = np.cumsum(losses[order]) / len(scores)
    last_of_ties = np.append(np.diff(scores[order]) != 0, True)
    allowed = np.flatnonzero(last_of_ties & (total <= risk + 1e-12))
    return float(allowed[-1] + 1) / len(scores) if len(allowed) else 0.0

"""Fits the confidence model: standardise → logistic regression → calibration.

Fitted with scikit-learn here, shipped as the few numbers of `serve.confidence.ConfidenceModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from serve.confidence import ConfidenceModel

Floats = NDArray[np.float64]

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Inverse L2 strengths that cross-validation chooses from."""
SOLVER = "newton-cholesky"
"""Exact in a few steps where rows outnumber features by far; the default takes hundreds of small ones, each
of which waits for BLAS threads on a busy machine (2.9 s against 0.1 s here)."""
FOLDS = 5
ISOTONIC_ROWS = 1000
"""From here on isotonic regression; below it overfits and a sigmoid is better (Niculescu-Mizil and
Caruana, "Predicting good probabilities with supervised learning", 2005)."""
FEWEST_OF_A_CLASS = 3
"""With fewer rows of one outcome nothing about telling them apart can be learnt, let alone checked."""


@dataclass(frozen=True)
class Fitted:
    """The model, and how it came about."""

    model: ConfidenceModel
    kind: str
    """`constant`, `sigmoid` or `isotonic`."""
    strength: float | None
    rows: int
    share: float
    """Rows in which the local answer is as good as the teacher's."""
    note: str = ""


def fit(rows: Sequence[Mapping[str, float]], outcomes: NDArray[np.bool_], seed: int = 0) -> Fitted:
    """Fit on features [n] and outcomes [n]: true where the local score reaches the teacher's.

    The strength is chosen by cross-validated log loss, the calibration is fitted on the same folds'
    out-of-fold scores: on the training fit's own scores it would learn to trust an overfit.
    """
    share = float(outcomes.mean()) if len(outcomes) else 0.0
    rarer = int(min(outcomes.sum(), (~outcomes).sum()))
    if rarer < FEWEST_OF_A_CLASS:
        return constant(rows, outcomes, f"{rarer} of {len(outcomes)} fit rows have the rarer outcome")
    names = tuple(rows[0])
    matrix = np.array([[row[name] for name in names] for row in rows])
    folds = StratifiedKFold(min(FOLDS, rarer), shuffle=True, random_state=seed)
    held_out = {strength: _out_of_fold(matrix, outcomes, strength, folds) for strength in STRENGTHS}
    strength = min(STRENGTHS, key=lambda each: log_loss(outcomes, expit(held_out[each])))
    calibration = calibrate(held_out[strength], outcomes)
    if calibration is None:
        return constant(rows, outcomes, "the features do not tell good answers from bad ones")
    pipeline = _pipeline(strength).fit(matrix, outcomes)
    model = exported(pipeline, names, calibration)
    return Fitted(model, calibration["kind"], strength, len(rows), share)


def constant(rows: Sequence[Mapping[str, float]], outcomes: NDArray[np.bool_], note: str) -> Fitted:
    """The model of nothing learnt: every answer has the smoothed share of good ones as confidence."""
    rate = (float(outcomes.sum()) + 1) / (len(outcomes) + 2)
    names = tuple(rows[0]) if rows else ()
    zeros = (0.0,) * len(names)
    calibration = {"kind": "sigmoid", "a": 1.0, "b": 0.0}
    model = ConfidenceModel(names, zeros, (1.0,) * len(names), zeros, float(logit(rate)), calibration)
    share = float(outcomes.mean()) if len(outcomes) else 0.0
    return Fitted(model, "constant", None, len(rows), share, note)


def calibrate(scores: Floats, outcomes: NDArray[np.bool_]) -> dict[str, Any] | None:
    """Calibration of out-of-fold scores [n]; None when they rank the outcomes the wrong way round."""
    sigmoid = _sigmoid(scores, outcomes)
    if sigmoid["a"] <= 0:
        return None
    if len(scores) < ISOTONIC_ROWS:
        return sigmoid
    isotonic = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, outcomes.astype(float))
    points = {"x": isotonic.X_thresholds_.tolist(), "y": isotonic.y_thresholds_.tolist()}
    return {"kind": "isotonic", **points}


def exported(pipeline: Pipeline, names: Sequence[str], calibration: Mapping[str, Any]) -> ConfidenceModel:
    """The pipeline's numbers as the model that serving evaluates."""
    scaler, regression = pipeline[0], pipeline[-1]
    return ConfidenceModel(
        features=tuple(names),
        mean=tuple(scaler.mean_.tolist()),
        scale=tuple(scaler.scale_.tolist()),
        weights=tuple(regression.coef_[0].tolist()),
        bias=float(regression.intercept_[0]),
        calibration=dict(calibration),
    )


def _pipeline(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, solver=SOLVER))


def _out_of_fold(
    matrix: Floats, outcomes: NDArray[np.bool_], strength: float, folds: StratifiedKFold
) -> Floats:
    scores = cross_val_predict(_pipeline(strength), matrix, outcomes, cv=folds, method="decision_function")
    return np.asarray(scores, dtype=float)


def _sigmoid(scores: Floats, outcomes: NDArray[np.bool_]) -> dict[str, Any]:
    """Platt scaling with his smoothed targets, which keep it finite where the classes are separable.

    Source: Platt, "Probabilistic outputs for support vector machines", 1999.
    """
    good, bad = int(outcomes.sum()), int((~outcomes).sum())
    target = np.where(outcomes, (good + 1) / (good + 2), 1 / (bad + 2))
    twice = np.concatenate([scores, scores])[:, None]
    label = np.repeat([1, 0], len(scores))
    weight = np.concatenate([target, 1 - target])
    platt = LogisticRegression(C=1e6, solver=SOLVER).fit(twice, label, sample_weight=weight)
    return {"kind": "sigmoid", "a": float(platt.coef_[0, 0]), "b": float(platt.intercept_[0])}

"""The confidence model: what is exported equals what scikit-learn says, and degenerate data is no trap."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression

from serve.confidence import HIGHEST, LOWEST, ConfidenceModel
from trainer.statistics import fit as fitting
from trainer.statistics.fit import Fitted, calibrate, fit

Floats = NDArray[np.float64]


def rows(
    count: int, seed: int = 0, strength: float = 2.0
) -> tuple[list[dict[str, float]], NDArray[np.bool_]]:
    """Features of which one tells, one is noise and one never changes; and outcomes."""
    source = np.random.default_rng(seed)
    telling = source.normal(5.0, 3.0, count)
    outcomes = source.random(count) < expit(strength * (telling - 4.0) / 3.0)
    noise = source.random(count)
    made = [
        {"telling": float(a), "noise": float(b), "fixed": 12.0} for a, b in zip(telling, noise, strict=True)
    ]
    return made, outcomes


def matrix(features: list[dict[str, float]]) -> Floats:
    return np.array([list(row.values()) for row in features])


@pytest.mark.parametrize(("count", "kind"), [(200, "sigmoid"), (1500, "isotonic")])
def test_exported_probabilities_are_sklearns(count: int, kind: str) -> None:
    features, outcomes = rows(count)
    made = fit(features, outcomes)
    assert made.kind == kind and made.strength is not None
    pipeline = fitting._pipeline(made.strength).fit(matrix(features), outcomes)
    scores = pipeline.decision_function(matrix(features))
    model = ConfidenceModel.from_json(json.loads(json.dumps(made.model.to_json())))
    if kind == "sigmoid":
        expected = expit(model.calibration["a"] * scores + model.calibration["b"])
    else:
        isotonic = IsotonicRegression(out_of_bounds="clip").fit(
            model.calibration["x"], model.calibration["y"]
        )
        expected = isotonic.predict(scores)
    found = [model.probability(row) for row in features]
    assert np.abs(found - np.clip(expected, LOWEST, HIGHEST)).max() < 1e-6


def test_isotonic_calibration_is_sklearns() -> None:
    source = np.random.default_rng(1)
    scores = source.normal(0, 2, 1200)
    outcomes = source.random(1200) < expit(scores)
    found = calibrate(scores, outcomes)
    assert found is not None
    reference = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, outcomes.astype(float))
    asked = np.linspace(-9, 9, 500)
    model = ConfidenceModel(("s",), (0.0,), (1.0,), (1.0,), 0.0, found)
    probabilities = np.array([model.probability({"s": float(value)}) for value in asked])
    assert np.abs(probabilities - np.clip(reference.predict(asked), LOWEST, HIGHEST)).max() < 1e-6


@pytest.mark.parametrize("count", [400, 1500])
def test_confidence_is_calibrated_on_rows_that_it_has_not_seen(count: int) -> None:
    made = fit(*rows(count))
    features, outcomes = rows(4000, seed=9)
    sure = np.array([made.model.probability(row) for row in features])
    for part in np.array_split(np.argsort(sure), 5):
        assert sure[part].mean() == pytest.approx(outcomes[part].mean(), abs=0.08)


def test_calibration_is_not_fitted_on_the_training_fit() -> None:
    """Forty noise features and few rows: fitted on its own scores, the model would be sure of itself."""
    source = np.random.default_rng(3)
    noise = source.normal(size=(60, 40))
    outcomes = source.random(60) < 0.5
    made = fit([{str(place): float(value) for place, value in enumerate(row)} for row in noise], outcomes)
    sure = [
        made.model.probability({str(place): float(value) for place, value in enumerate(row)})
        for row in source.normal(size=(500, 40))
    ]
    assert np.quantile(np.abs(np.array(sure) - outcomes.mean()), 0.9) < 0.25


@pytest.mark.parametrize(
    ("outcomes", "rate"),
    [([True] * 20, 21 / 22), ([False] * 20, 1 / 22), ([True] * 18 + [False] * 2, 19 / 22)],
)
def test_too_few_of_an_outcome_give_the_constant_model(outcomes: list[bool], rate: float) -> None:
    features, _ = rows(20)
    made = fit(features, np.array(outcomes))
    assert made.kind == "constant" and "rarer outcome" in made.note
    assert made.share == pytest.approx(np.mean(outcomes))
    assert [made.model.probability(row) for row in features] == pytest.approx([rate] * 20)


def test_no_rows_give_the_constant_model_of_no_knowledge() -> None:
    made = fit([], np.empty(0, dtype=bool))
    assert made.kind == "constant" and made.model.probability({}) == pytest.approx(0.5)


def test_scores_that_rank_the_wrong_way_round_are_not_used() -> None:
    scores = np.linspace(-1, 1, 50)
    assert calibrate(scores, scores < 0) is None


def test_a_separable_fit_stays_finite() -> None:
    features, _ = rows(60)
    made = fit(features, np.array([row["telling"] > 5 for row in features]))
    assert made.kind == "sigmoid"
    assert all(LOWEST <= made.model.probability(row) <= HIGHEST for row in features)


def test_the_same_rows_give_the_same_model() -> None:
    def once() -> Fitted:
        return fit(*rows(150), seed=4)

    assert once() == once()

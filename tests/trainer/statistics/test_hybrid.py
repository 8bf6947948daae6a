"""What is reported about the hybrid on sealed rows, and the runners-up beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serve.confidence import LocalAnswer, Neighbours
from trainer.statistics import baselines, hybrid
from trainer.statistics.hybrid import Rows


def rows(confidences: list[float], local: list[float], teacher: list[float]) -> Rows:
    answers = [
        LocalAnswer("text", [{"token": "x", "logprob": -1.0 - sure}], "stop", 5, f"query number {place}")
        for place, sure in enumerate(confidences)
    ]
    count = len(confidences)
    ids = [f"e{place}" for place in range(count)]
    failed = np.zeros(count, dtype=bool)
    return Rows(ids, answers, np.array(confidences), np.array(local), np.array(teacher), failed)


FOUR = rows([0.9, 0.8, 0.6, 0.0], [1, 0, 1, 0], [1, 1, 0, 1])


def test_routed_score_share_and_risk() -> None:
    found = hybrid.measured(FOUR, 0.7)
    assert (found["mean"], found["local_share"], found["risk"], found["n"]) == (0.5, 0.5, 0.25, 4)
    assert found["retention"]["mean"] == pytest.approx(2 / 3)
    assert found["low"] < 0.5 < found["high"]
    everything = hybrid.measured(FOUR, 0.0001)
    assert everything["local_share"] == 0.75, "what no threshold may keep goes to the teacher"
    refused = hybrid.measured(FOUR, None)
    assert (refused["mean"], refused["local_share"], refused["risk"]) == (0.75, 0.0, 0.0)


def test_a_failed_teacher_counts_only_where_it_is_asked() -> None:
    failed = np.array([True, False, False, True])
    asked = Rows(FOUR.ids, FOUR.answers, FOUR.confidences, FOUR.local, FOUR.teacher, failed)
    assert hybrid.measured(asked, 0.7)["failures"] == 1


def test_risk_coverage_goes_from_sure_to_unsure() -> None:
    points = hybrid.risk_coverage(FOUR)
    assert [point["coverage"] for point in points] == [0.25, 0.5, 0.75]
    assert [point["risk"] for point in points] == [0.0, 0.25, 0.25]
    assert [point["selective_risk"] for point in points] == [0.0, 0.5, pytest.approx(1 / 3)]
    assert points[-1]["routed"] == pytest.approx(0.75)
    assert hybrid.risk_coverage(rows([0.0], [1], [1])) == []


def test_reliability_compares_confidence_with_what_came_true() -> None:
    source = np.random.default_rng(0)
    sure = source.random(5000)
    good = (source.random(5000) < sure).astype(float)
    honest = hybrid.reliability(rows(sure.tolist(), good.tolist(), [1.0] * 5000))
    assert len(honest["bins"]) == hybrid.BINS and sum(each["n"] for each in honest["bins"]) == 5000
    assert honest["error"] < 0.03 and honest["brier"] == pytest.approx(1 / 6, abs=0.01)
    boastful = hybrid.reliability(rows([0.99] * 100, [0.0, 1.0] * 50, [1.0] * 100))
    assert boastful["error"] == pytest.approx(0.49)
    assert hybrid.reliability(rows([0.0], [1], [1])) == {"bins": [], "error": None, "brier": None}


def test_runners_up_are_compared_behind_the_same_gate() -> None:
    count = 40
    good = [float(place < 20) for place in range(count)]
    made = rows([0.9 if value else 0.1 for value in good[:-1]] + [0.0], good, [1.0] * count)
    replies = {f"e{place}": "True" if place % 2 else "no idea" for place in range(count)}
    found = hybrid.compared(made, made, risk=0.0, replies=replies)
    assert set(found) == {"confidence", "mean_logprob", "nearest", "random", "query_length", "self_ask"}
    assert found["confidence"] == pytest.approx({"auroc": 1.0, "coverage": 0.5})
    assert found["mean_logprob"]["auroc"] is not None and found["mean_logprob"]["auroc"] < 0.2
    assert found["random"]["auroc"] == pytest.approx(0.5, abs=0.3)
    assert "self_ask" not in hybrid.compared(made, made, risk=0.0)


def test_coverage_at_risk_keeps_ties_together() -> None:
    losses = np.array([0.0, 0.0, 1.0, 0.0])
    assert baselines.coverage_at_risk(np.array([0.9, 0.8, 0.7, 0.6]), losses, 0.0) == 0.5
    assert baselines.coverage_at_risk(np.array([0.9, 0.7, 0.7, 0.6]), losses, 0.0) == 0.25
    assert baselines.coverage_at_risk(np.array([0.9, 0.8, 0.7, 0.6]), losses, 0.25) == 1.0
    assert baselines.coverage_at_risk(np.ones(4), losses, 0.0) == 0.0
    assert baselines.coverage_at_risk(np.empty(0), np.empty(0), 0.5) == 0.0


def test_nearest_outcomes_follow_similar_queries() -> None:
    known = Neighbours.build(
        ["reset my password", "forgot my password", "invoice is wrong", "invoice too high"]
    )
    outcomes = np.array([1.0, 1.0, 0.0, 0.0])
    assert baselines.nearest_outcomes("password please", known, outcomes, 2) == pytest.approx(1.0)
    assert baselines.nearest_outcomes("wrong invoice", known, outcomes, 2) == pytest.approx(0.0)
    assert baselines.nearest_outcomes("x", Neighbours.build([]), np.empty(0)) == 0.0


def test_simple_scores() -> None:
    def sure(logprobs: list[dict[str, Any]]) -> float:
        return baselines.mean_logprob(LocalAnswer("", logprobs, "stop", 1, "four"))

    assert sure([{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -3.0}]) == -2.0
    assert sure([]) == -100.0
    assert baselines.query_length(LocalAnswer("", [], "stop", 1, "four")) == -4.0
    assert baselines.at_random("a") == baselines.at_random("a") != baselines.at_random("a", seed=1)
    assert baselines.auroc([1.0, 2.0], np.array([True, True])) is None

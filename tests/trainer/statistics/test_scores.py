"""Intervals against published values, simulation and the edges."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.statistics.scores import Interval, difference_interval, mean_interval, ratio_interval


def test_binary_scores_get_wilsons_interval() -> None:
    # Newcombe 1998, table I: 81 of 263 has Wilson's interval 0.2553 to 0.3662
    found = mean_interval(np.array([1.0] * 81 + [0.0] * 182))
    assert [found.low, found.high] == pytest.approx([0.2553, 0.3662], abs=1e-4)


def test_all_right_is_not_certain() -> None:
    assert mean_interval(np.ones(20)).low == pytest.approx(0.839, abs=1e-3)


def test_graded_scores_are_covered_about_as_often_as_promised() -> None:
    source = np.random.default_rng(1)
    found = [mean_interval(source.beta(2, 5, size=80), seed=number) for number in range(200)]
    covered = np.mean([interval.low <= 2 / 7 <= interval.high for interval in found])
    assert 0.90 <= covered <= 0.99


def test_the_same_seed_gives_the_same_interval() -> None:
    scores = np.random.default_rng(0).random(50)
    assert mean_interval(scores, seed=3) == mean_interval(scores, seed=3)


@pytest.mark.parametrize("scores", [[], [1.0]])
def test_fewer_than_two_rows_prove_nothing(scores: list[float]) -> None:
    found = mean_interval(np.array(scores))
    assert (found.low, found.high) == (0.0, 1.0)


def test_a_ratio_is_paired() -> None:
    whole = (np.arange(200) % 2).astype(float)
    found = ratio_interval(whole * 0.9, whole)
    assert found is not None  # row by row it is 0.9, whatever rows are drawn
    assert [found.mean, found.low, found.high] == pytest.approx([0.9, 0.9, 0.9])


def test_a_ratio_to_nothing_is_none() -> None:
    assert ratio_interval(np.ones(5), np.zeros(5)) is None


def test_a_difference_of_proportions_is_newcombes() -> None:
    # Newcombe 1998 (two samples), method 10, example 56/70 − 48/80: 0.0524 to 0.3339
    one = mean_interval(np.array([1.0] * 56 + [0.0] * 14))
    other = mean_interval(np.array([1.0] * 48 + [0.0] * 32))
    found = difference_interval(one, other)
    assert [found.low, found.high] == pytest.approx([0.0524, 0.3339], abs=1e-4)


def test_equal_means_leave_equality_possible() -> None:
    same = Interval(0.9, 0.87, 0.93)
    found = difference_interval(same, same)
    assert found.low < 0 < found.high

"""Rows that are alike come together; every row comes once; the order follows from seed and epoch."""

from __future__ import annotations

import random

from trainer.template import IGNORED
from trainer.training.batches import ByLength, collate, common, groups_of

PAD = 0


def row(prompt: list[int], answer: int = 3) -> dict[str, list[int]]:
    return {
        "input_ids": [*prompt, *range(900, 900 + answer)],
        "labels": [IGNORED] * len(prompt) + [9] * answer,
    }


def two_predictors(rows: int, prefix: int = 120) -> list[dict[str, list[int]]]:
    """Interleaved rows of two predictors, whose instructions share their first 20 tokens."""
    chance = random.Random(0)
    head = list(range(20))
    first, second = ([*head, *(chance.randrange(50, 800) for _ in range(prefix))] for _ in range(2))
    return [
        row([*(first if at % 2 else second), *(chance.randrange(50, 800) for _ in range(10 + at % 7))])
        for at in range(rows)
    ]


def test_every_row_comes_once_and_seed_and_epoch_decide_the_order() -> None:
    lengths = [at * 37 % 101 for at in range(83)]
    order = ByLength(lengths, 8, seed=3)
    first = list(order)
    assert sorted(first) == list(range(83)) == sorted(range(len(order)))
    assert list(order) == first == list(ByLength(lengths, 8, seed=3))
    order.set_epoch(1)
    assert list(order) != first
    assert list(ByLength(lengths, 8, seed=4)) != first


def test_rows_of_a_step_are_of_like_length() -> None:
    lengths = [at * 37 % 101 for at in range(128)]
    order = list(ByLength(lengths, 8, seed=3))
    spans = [
        max(found) - min(found)
        for at in range(0, 128, 8)
        if (found := [lengths[i] for i in order[at : at + 8]])
    ]
    assert max(spans) <= 20


def test_a_step_holds_rows_of_one_predictor() -> None:
    rows = two_predictors(128)
    groups = groups_of(rows, 8)
    assert [groups[at] == groups[0] for at in range(128)] == [at % 2 == 0 for at in range(128)]
    order = list(ByLength([len(each["input_ids"]) for each in rows], 8, seed=0, groups=groups))
    steps = [{groups[at] for at in order[start : start + 8]} for start in range(0, 128, 8)]
    assert sum(len(each) > 1 for each in steps) <= 1  # where one group ends in the middle of a step


def test_odd_rows_do_not_hide_the_predictors() -> None:
    """Replayed general rows share nothing with anything, and stand on the top level beside the predictors."""
    rows = [*two_predictors(64), *(row([700 + at, *range(at, at + 90)]) for at in range(24))]
    groups = groups_of(rows, 8)
    assert len({groups[0], groups[1]} | set(groups[64:])) >= 3
    assert groups[:64] == groups[:2] * 32
    assert not set(groups[:2]) & set(groups[64:])


def test_values_that_happen_to_begin_alike_make_no_group() -> None:
    rows = [row([*range(200), at % 3, *range(at, at + 20)]) for at in range(60)]
    assert set(groups_of(rows, 8)) == {0}
    assert groups_of([], 8) == []
    assert groups_of(rows[:1], 8) == [0]


def test_common_beginnings() -> None:
    assert common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common([1, 2, 3], [1, 2, 3]) == 3
    assert common([], [1]) == common([2], [1]) == 0


def test_a_batch_is_padded_on_the_right_and_like_rows_stand_together() -> None:
    batch = collate([row([5, 6, 7]), row([1, 2]), row([5, 6])], PAD)
    assert batch["input_ids"].tolist()[0] == [1, 2, 900, 901, 902, PAD]
    assert [ids[:2] for ids in batch["input_ids"].tolist()] == [[1, 2], [5, 6], [5, 6]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 6, 5]
    assert batch["labels"].tolist()[0] == [IGNORED, IGNORED, 9, 9, 9, IGNORED]

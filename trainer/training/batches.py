"""Which rows go through the model together, in which order, as which tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.data import Sampler

from trainer.template import IGNORED

POOL = 16
"""Steps' worth of rows that are sorted together."""

COARSE = 16
"""Tokens that count when common beginnings are compared, so that few levels are looked at."""

Range = tuple[int, int]
"""From, and before."""

GAIN = 0.1
"""Share of its tokens that dividing a group must save."""


class ByLength(Sampler[int]):
    """Rows in an order that seed and epoch decide, neighbours alike so that little is computed twice or padded.

    Args:
        lengths: tokens of each row.
        step: rows of an optimizer step.
        groups: of each row, as `groups_of` gives them; none means that all are one.
    """

    def __init__(self, lengths: list[int], step: int, seed: int, groups: list[int] | None = None) -> None:
        self._keys = list(zip(groups or [0] * len(lengths), lengths, strict=True))
        self._step = step
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self._seed}:{self._epoch}")
        order = list(range(len(self._keys)))
        chance.shuffle(order)
        size = self._step * POOL
        pools = (order[at : at + size] for at in range(0, len(order), size))
        ordered = [row for pool in pools for row in sorted(pool, key=self._keys.__getitem__)]
        whole = len(ordered) // self._step * self._step
        batches = [ordered[at : at + self._step] for at in range(0, whole, self._step)]
        chance.shuffle(batches)
        yield from (row for batch in [*batches, ordered[whole:]] for row in batch)


def groups_of(rows: list[dict[str, list[int]]], step: int) -> list[int]:
    """The group of each row: rows whose prompts begin alike for long, such as those of one DSPy predictor.

    All rows are divided, and the parts again, where the parts' longer common beginnings spare a tenth of
    the tokens; parts with fewer rows than a step stay together.

    Args:
        rows: {"input_ids", "labels"} a row.
        step: rows of an optimizer step.
    """
    prompts = [row["input_ids"][: prompt_length(row["labels"])] for row in rows]
    order = sorted(range(len(rows)), key=prompts.__getitem__)
    alike = [common(prompts[one], prompts[other]) // COARSE * COARSE for one, other in pairwise(order)]
    lengths = [len(rows[at]["input_ids"]) for at in order]
    groups = [0] * len(rows)
    for number, (start, end) in enumerate(_divided(alike, lengths, step, (0, len(rows)))[1]):
        for at in order[start:end]:
            groups[at] = number
    return groups


def prompt_length(labels: list[int]) -> int:
    """How many of a row's tokens stand before the first learned one."""
    return next((at for at, label in enumerate(labels) if label != IGNORED), len(labels))


def common(one: list[int], other: list[int]) -> int:
    """How many first values two lists share."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _divided(alike: list[int], lengths: list[int], step: int, whole: Range) -> tuple[int, list[Range]]:
    """Tokens that sharing spares in a range of the sorted rows, and the groups that it is best divided into.

    Args:
        alike: tokens that each row shares with the next.
        lengths: tokens of each row.
    """
    start, end = whole
    shared = min(alike[start : end - 1], default=0)
    spared = (end - start) * shared
    cuts = [at + 1 for at in range(start, end - 1) if alike[at] == shared]
    parts = _merged(list(pairwise([start, *cuts, end])), step)
    if len(parts) > 1:
        inside = [_divided(alike, lengths, step, part) for part in parts]
        together = sum(tokens for tokens, _ in inside)
        if together > spared + GAIN * sum(lengths[start:end]):
            return together, [group for _, groups in inside for group in groups]
    return spared, [whole]


def _merged(parts: list[Range], step: int) -> list[Range]:
    """Neighbouring parts of fewer than `step` rows put together."""
    merged = parts[:1]
    for start, end in parts[1:]:
        before = merged[-1]
        if end - start < step and before[1] - before[0] < step:
            merged[-1] = (before[0], end)
        else:
            merged.append((start, end))
    return merged


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """Rows as tensors [rows, tokens], padded on the right; rows that begin alike stand together."""
    rows = sorted(rows, key=lambda row: row["input_ids"])
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, pad),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }


def padded(rows: list[list[int]], filler: int) -> Tensor:
    """Rows as a tensor [rows, longest], filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

"""Which rows go through the model together, in which order, as which tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from trainer.template import IGNORED

POOL = 16
"""Steps' worth of rows that are sorted by length together."""

CPU_ACTIVATIONS = 2_000_000_000
"""Bytes that the activations of one pass may take on a CPU."""


class ByLength(Sampler[int]):
    """Rows in an order that seed and epoch decide, neighbours of like length so that little is padded."""

    def __init__(self, lengths: list[int], step: int, seed: int) -> None:
        self._lengths = lengths
        self._step = step
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self._seed}:{self._epoch}")
        order = list(range(len(self._lengths)))
        chance.shuffle(order)
        size = self._step * POOL
        pools = (order[at : at + size] for at in range(0, len(order), size))
        ordered = [row for pool in pools for row in sorted(pool, key=self._lengths.__getitem__)]
        whole = len(ordered) // self._step * self._step
        batches = [ordered[at : at + self._step] for at in range(0, whole, self._step)]
        chance.shuffle(batches)
        yield from (row for batch in [*batches, ordered[whole:]] for row in batch)


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """Rows as tensors [rows, tokens], padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": filled(ids, pad),
        "attention_mask": filled([[1] * len(row) for row in ids], 0),
        "labels": filled([row["labels"] for row in rows], IGNORED),
    }


def split_step(step: int, batch: int, longest: int, config: Any) -> int:
    """Rows that pass through the model at once on a CPU: all of a step where their activations fit.

    Larger passes share the common prefix among more rows. The estimate counts 30 hidden-sized values and
    three attention weights a head for every token and layer.
    """
    row = (
        4
        * config.num_hidden_layers
        * longest
        * (30 * config.hidden_size + 3 * config.num_attention_heads * longest)
    )
    sizes = [size for size in range(step, batch, -1) if step % size == 0 and size * row <= CPU_ACTIVATIONS]
    return sizes[0] if sizes else batch

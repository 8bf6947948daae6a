"""Which examples are distinct, and which split each belongs to: decided before anything is paid for.

The split of an example follows from its own hash, so new data never moves old examples; and no two
examples that are near-duplicates survive, so no split shares one with another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from SetSimilaritySearch import all_pairs

from trainer import task
from trainer.data import Example
from trainer.settings import CurateSettings
from trainer.task import Task

SEALED_FIRST = ("test", "calibrate", "train")
"""Of two duplicates the one in the more sealed split is kept, so that training never sees a test row."""
SHINGLE = 4
MIN_SEALED = 30
"""Examples without which calibrate or test say nothing."""


@dataclass
class Assignment:
    """Distinct examples by split, and what was dropped for which reason."""

    splits: dict[str, list[Example]]
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """Reason to example ids."""

    def examples(self) -> list[Example]:
        """All distinct examples, training first."""
        return [example for split in ("train", "calibrate", "test") for example in self.splits[split]]


def shuffled(examples: Sequence[Example]) -> list[Example]:
    """The examples by their ids, which are hashes: data that comes sorted by class is mixed, always alike."""
    return sorted(examples, key=lambda example: example.id)


def assigned(loaded: Task) -> Assignment:
    """The task's distinct examples by split, read from its data files."""
    settings = loaded.settings
    return assign(task.examples(loaded), settings.inputs, settings.curate, settings.seed)


def assign(examples: Iterable[Example], inputs: list[str], settings: CurateSettings, seed: int) -> Assignment:
    """Drop exact and near-duplicates of the inputs and give every other example its split."""
    placed = [(example.split or _split(example.id, settings, seed), example) for example in examples]
    placed.sort(key=lambda pair: SEALED_FIRST.index(pair[0]))
    distinct: dict[str, tuple[str, Example]] = {}
    result = Assignment({split: [] for split in SEALED_FIRST})
    for split, example in placed:
        if example.id in distinct:
            result.dropped.setdefault("exact duplicate", []).append(example.id)
        else:
            distinct[example.id] = (split, example)
    rows = list(distinct.values())
    near = near_duplicates([_text(example, inputs) for _, example in rows], settings.near_duplicate)
    for index, (split, example) in enumerate(rows):
        if index in near:
            result.dropped.setdefault("near-duplicate", []).append(example.id)
        else:
            result.splits[split].append(example)
    return result


def _split(identity: str, settings: CurateSettings, seed: int) -> str:
    point = int(hashlib.sha256(f"{seed}:{identity}".encode()).hexdigest()[:8], 16) / 2**32
    if point < settings.split.train:
        return "train"
    return "calibrate" if point < settings.split.train + settings.split.calibrate else "test"


def _text(example: Example, inputs: list[str]) -> str:
    return " ".join(" ".join(str(example.values[name]) for name in inputs).lower().split())


def near_duplicates(texts: Sequence[str], threshold: float) -> set[int]:
    """Indices of the texts that are too similar to an earlier one that is kept.

    Exact search over sets of character 4-grams (SetSimilaritySearch's all-pairs), not a sketch:
    "no near-duplicate" has to hold, not to be likely.
    """
    if threshold >= 1 or len(texts) < 2:
        return set()
    shingles = [_shingles(text) for text in texts]
    earlier: dict[int, list[int]] = {}
    for one, other, _ in all_pairs(shingles, similarity_func_name="jaccard", similarity_threshold=threshold):
        earlier.setdefault(max(one, other), []).append(min(one, other))
    dropped: set[int] = set()
    for index in sorted(earlier):
        if any(other not in dropped for other in earlier[index]):
            dropped.add(index)
    return dropped


def _shingles(text: str) -> set[str]:
    return {text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1))}

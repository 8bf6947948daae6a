"""Curated conversations as token rows: which are trained on, which are held back, what is mixed in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import TrainError
from trainer.settings import TrainSettings
from trainer.template import Template
from trainer.training import chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD = "<|finetune_right_pad_id|>"

Row = dict[str, list[int]]
"""{"input_ids", "labels"}, of equal length; a label is -100 where nothing is learned."""


@dataclass(frozen=True)
class Rows:
    """The tokenized train split."""

    train: list[Row]
    evaluate: list[Row]
    too_long: int
    replayed: int = 0
    """Rows of general data among `train`."""

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.train)


def tokenize(
    conversations: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    settings: TrainSettings,
    seed: int,
) -> Rows:
    """Tokenize the conversations and hold some examples back, all rows of an example on the same side.

    An example with many rows, such as a question that a program asks again and again, is trained on: held
    back, it would take what only its rows can teach.

    Raises:
        TrainError: fewer than two examples fit into `max_length`.
    """
    fitting: dict[str, list[Row]] = {}
    longest = 0
    too_long = 0
    for row in conversations:
        ids, labels = template.encode(tokenizer, row["messages"], row["completion"])
        longest = max(longest, len(ids))
        if len(ids) > settings.max_length:
            too_long += 1
        else:
            fitting.setdefault(row["example"], []).append({"input_ids": ids, "labels": labels})
    if len(fitting) < 2:
        raise TrainError(
            f"{len(fitting)} of {len(fitting) + too_long} training examples fit into student.train.max_length, "
            f"{settings.max_length} tokens; at least 2 are needed: raise it to {longest}"
        )
    order = _shuffled(fitting, seed)
    held = _held([len(fitting[example]) for example in order], settings.eval_share)
    return Rows(
        train=[row for at, example in enumerate(order) if at not in held for row in fitting[example]],
        evaluate=[row for at, example in enumerate(order) if at in held for row in fitting[example]],
        too_long=too_long,
    )


def _held(sizes: Sequence[int], share: float) -> set[int]:
    """Which examples are held back: a share of them, the first ones that have no unusual number of rows.

    Args:
        sizes: rows of each example, in the order of choice.
        share: of the examples, and about that of the rows; one example at least.
    """
    mean = sum(sizes) / len(sizes)
    wanted = max(1, round(len(sizes) * share))
    room = wanted * math.ceil(mean)
    held: set[int] = set()
    for at, size in enumerate(sizes):
        if len(held) < wanted and size <= min(room, 2 * mean):
            held.add(at)
            room -= size
    return held


def with_replay(
    rows: Rows,
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    settings: TrainSettings,
    seed: int,
) -> Rows:
    """Mix general conversations into the training rows, up to the share that the settings ask for.

    Which ones follows from seed and line number. The held-back rows stay the task's own. Conversations
    above `max_length` are passed over.

    Raises:
        DataError: lines of it are not conversations.
    """
    assert settings.replay
    wanted = round(len(rows.train) * settings.replay.share / (1 - settings.replay.share))
    conversations = chats.read(file)
    mixed: list[Row] = []
    for number in _shuffled([str(number) for number in range(len(conversations))], seed):
        if len(mixed) == wanted:
            break
        *messages, answer = conversations[int(number)]
        ids, labels = template.encode(tokenizer, messages, answer["content"])
        if len(ids) <= settings.max_length:
            mixed.append({"input_ids": ids, "labels": labels})
    return Rows([*rows.train, *mixed], rows.evaluate, rows.too_long, len(mixed))


def steps(rows: int, settings: TrainSettings) -> int:
    """Optimizer steps of the whole training."""
    return max(1, math.ceil(settings.epochs * math.ceil(rows / settings.step_rows)))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows up: Llama 3's own, else the tokenizer's; masked, so any will do at last."""
    found = tokenizer.get_vocab().get(PAD, tokenizer.pad_token_id)
    return int(found if found is not None else tokenizer.eos_token_id)


def _shuffled(names: Iterable[str], seed: int) -> Sequence[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())

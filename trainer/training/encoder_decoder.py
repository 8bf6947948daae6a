"""Batches and loss of an encoder-decoder: the encoder reads the prompt, the decoder learns the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.template import IGNORED
from trainer.training.batches import padded, prompt_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """Rows as tensors, prompts and answers each padded on the right.

    Args:
        rows: {"input_ids", "labels"} a row, prompt and answer one behind the other.

    Returns:
        input_ids and attention_mask [rows, prompt tokens], labels [rows, 1 + answer tokens]: what stands
        first is never learned, as in a decoder's labels.
    """
    cut = [(row, prompt_length(row["labels"])) for row in rows]
    prompts = [row["input_ids"][:end] for row, end in cut]
    return {
        "input_ids": padded(prompts, pad),
        "attention_mask": padded([[1] * len(prompt) for prompt in prompts], 0),
        "labels": padded([[IGNORED, *row["labels"][end:]] for row, end in cut], IGNORED),
    }


def loss_sum(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The summed cross entropy of the answers, as a scalar in float32 (float64 for a float64 model).

    Args:
        model: not a PEFT wrapper, but the model in it.
        input_ids, attention_mask, labels: of `collate`.
    """
    wanted = labels[:, 1:].contiguous()
    shift: Any = model  # which puts the start token in front and takes the last one off
    seen = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        decoder_input_ids=shift.prepare_decoder_input_ids_from_labels(wanted),
    ).logits
    logits = seen if seen.dtype == torch.float64 else seen.float()
    return functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
    )

"""The loss of a batch whose prompts begin alike, with the common beginning computed once.

A DSPy trace is mostly the same fixed instructions. Keys and values of a causal model's first tokens
do not depend on what follows, so one row computes them for the whole batch, with gradient, and only
what differs runs per row. Logits are made only where there is something to learn. The loss and the
gradients are those of the plain computation; with dropout the shared tokens draw one mask a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.template import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3"})
"""Model types whose logits are the output embedding of the decoder's last hidden state, without sliding windows."""

WORTHWHILE = 16
"""Tokens from which a common prefix is computed apart."""


def supports(model: PreTrainedModel) -> bool:
    """Whether the loss of this model can be computed here."""
    config = model.config
    return config.model_type in ARCHITECTURES and not getattr(config, "use_sliding_window", False)


def common_prefix(input_ids: Tensor, labels: Tensor) -> int:
    """How many first tokens all rows share, short of the token that predicts the first label.

    Args:
        input_ids: [rows, tokens], padded on the right.
        labels: [rows, tokens], -100 where nothing is learned.
    """
    same = (input_ids == input_ids[:1]).all(dim=0) & (labels == IGNORED).all(dim=0)
    length = int(same.long().cumprod(dim=0).sum())
    return max(0, length - 1)  # the last shared position predicts a label, or is the only one of a row


def loss_sum(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The summed cross entropy of the labels, as a scalar in float32.

    Args:
        model: a causal model of `ARCHITECTURES`, not a PEFT wrapper around one.
        input_ids: [rows, tokens], padded on the right.
        attention_mask: [rows, tokens], 0 on padding.
        labels: [rows, tokens], -100 where nothing is learned; the first token is never learned.
    """
    shared = common_prefix(input_ids, labels)
    shared = shared if shared >= WORTHWHILE and len(input_ids) > 1 else 0
    decoder: Any = model.get_decoder()
    cache = _prefix_cache(decoder, input_ids[:1, :shared], len(input_ids)) if shared else None
    positions = torch.arange(shared, input_ids.shape[1], device=input_ids.device)[None]
    hidden = decoder(
        input_ids=input_ids[:, shared:],
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    targets = labels[:, shared + 1 :]
    learned = targets != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][learned])
    return functional.cross_entropy(logits.float(), targets[learned], reduction="sum")


def _prefix_cache(decoder: Any, prefix: Tensor, rows: int) -> Any:
    """Keys and values of the prefix [1, tokens] for `rows` rows; a view, so that gradients add up."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    decoder(input_ids=prefix, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys = layer.keys.expand(rows, -1, -1, -1)
        layer.values = layer.values.expand(rows, -1, -1, -1)
    return cache

"""The loss of a batch whose prompts begin alike, with the common beginning computed once.

A DSPy trace is mostly the same fixed instructions. Keys and values of a causal model's first tokens
do not depend on what follows, so one row computes them for the whole batch, with gradient, and only
what differs runs per row. A batch of several predictors is cut into passes that have a beginning in
common. Logits are made only where there is something to learn. The loss and the gradients are those of
the plain computation; with dropout the shared tokens draw one mask a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions, functional
from torch.utils.checkpoint import checkpoint

from trainer.template import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"})
"""Model types whose logits are the output embedding of the decoder's last hidden state, softcapped at most."""

ATTENTION = frozenset({"eager", "sdpa"})
"""Implementations that take more keys than queries with padding on the right; flash attention 2 does not."""

FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings that do not change with the length of what is computed."""

WORTHWHILE = 16
"""Tokens from which a common prefix is computed apart."""

PASS = 256
"""What a further pass through the model costs, in tokens."""

SMALL_LOGITS = 1 << 26
"""Logits up to which they are made at once; more are made in pieces, which costs a little time."""


Loss = Callable[["PreTrainedModel", Tensor, Tensor, Tensor], Tensor]
"""Of a model, input ids, attention mask and labels, summed over the labels."""


class Pass(NamedTuple):
    """Rows from `start` to before `end`, whose first `shared` tokens are computed once."""

    start: int
    end: int
    shared: int


def supports(model: PreTrainedModel) -> bool:
    """Whether the loss of this model can be computed here, exactly.

    Args:
        model: not a PEFT wrapper, but the model in it.
    """
    config = model.config
    return (
        config.model_type in ARCHITECTURES
        and config._attn_implementation in ATTENTION
        and not getattr(config, "use_bidirectional_attention", False)
        and set(_ropes(config)) <= FIXED_ROPE | {"longrope"}
    )


def install(model: PreTrainedModel, loss: Loss) -> None:
    """Let the model's forward return the summed loss wherever it is given labels.

    Args:
        loss: computes it.

    So it is reached through every wrapper: adapters, autocast, the hooks of several processes.
    """
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if kwargs.get("labels") is None or kwargs.get("input_ids") is None:
            return plain(*args, **kwargs)
        names = ("input_ids", "attention_mask", "labels")
        return CausalLMOutputWithPast(loss=loss(model, *(kwargs[name] for name in names)))

    model.forward = forward


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep a layer's input only and compute the rest again in the backward pass: less memory, more time.

    transformers' own gradient checkpointing must stay off: it takes the prefix away from the layers.
    """
    decoder: Any = model.get_decoder()
    for layer in decoder.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def loss_sum(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The summed cross entropy of the labels, as a scalar in float32 (float64 for a float64 model).

    Args:
        model: one that `supports`, not a PEFT wrapper around it.
        input_ids: [rows, tokens], padded on the right; rows that begin alike stand together.
        attention_mask: [rows, tokens], 0 on padding.
        labels: [rows, tokens], -100 where nothing is learned; the first token is never learned.
    """
    lengths = attention_mask.sum(dim=1).tolist()
    cut = [Pass(0, len(lengths), 0)]
    if max(lengths) <= _limit(model.config):
        cut = passes(neighbours(input_ids, attention_mask, labels), lengths)
    hidden, targets = [], []
    for start, end, shared in cut:
        width = max(lengths[start:end])
        rows = (slice(start, end), slice(0, width))
        states = _hidden(model, input_ids[rows], attention_mask[rows], shared)
        following = labels[start:end, shared + 1 : width]
        learned = following != IGNORED
        hidden.append(states[:, :-1][learned])
        targets.append(following[learned])
    return _cross_entropy(model, torch.cat(hidden), torch.cat(targets))


def neighbours(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> list[int]:
    """How many first tokens each row shares with the next one, short of what predicts either's first label.

    Args:
        input_ids: [rows, tokens], padded on the right; the mask and the labels alike.
    """
    open_ = (labels == IGNORED) & (attention_mask == 1)
    same = (input_ids[1:] == input_ids[:-1]) & open_[1:] & open_[:-1]
    # the last shared position predicts a label, or is the last one of a row
    shared: list[int] = (same.long().cumprod(dim=1).sum(dim=1) - 1).clamp(min=0).tolist()
    return shared


def passes(alike: list[int], lengths: list[int]) -> list[Pass]:
    """Cut a batch into passes so that the least tokens are computed, padding included.

    Args:
        alike: tokens that each row shares with the next.
        lengths: tokens of each row.
    """
    count = len(lengths)
    cost = [0] + [0] * count  # of the best way to cut the first rows
    last: list[Pass] = []  # the last pass of that way
    for end in range(1, count + 1):
        width, common, found = 0, lengths[end - 1], []
        for start in range(end - 1, -1, -1):
            width = max(width, lengths[start])
            common = min(common, alike[start]) if start < end - 1 else common
            shared = common if start < end - 1 and common >= WORTHWHILE else 0
            tokens = (end - start) * (width - shared) + shared
            found.append((cost[start] + tokens + PASS, Pass(start, end, shared)))
        cost[end], best = min(found)
        last.append(best)
    cut: list[Pass] = []
    while count:
        cut.append(last[count - 1])
        count = cut[-1].start
    return cut[::-1]


def _hidden(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, shared: int) -> Tensor:
    """Last hidden states [rows, tokens - shared, hidden] of what follows the shared tokens."""
    decoder: Any = model.get_decoder()
    cache = None
    if shared:
        from trainer.training.prefix_cache import prefixed

        cache = prefixed(decoder, input_ids[:1, :shared], len(input_ids))
    positions = torch.arange(shared, input_ids.shape[1], device=input_ids.device)[None]
    states: Tensor = decoder(
        input_ids=input_ids[:, shared:],
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return states


def _cross_entropy(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy; hidden [learned tokens, hidden], targets [learned tokens]."""
    head: Any = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    plain_head = type(head) is torch.nn.Linear and softcap is None
    if plain_head and len(targets) * head.out_features > SMALL_LOGITS:
        kind = hidden.device.type
        mixed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        return functional.linear_cross_entropy(
            hidden.to(mixed),
            head.weight.to(mixed),
            targets,
            linear_bias=head.bias,
            reduction="sum",
            options=LinearCrossEntropyOptions(),
        ).to(torch.float64 if mixed == torch.float64 else torch.float32)
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, targets, reduction="sum")


def _ropes(config: Any) -> list[str]:
    """The kinds of rotary embedding; Gemma 3 has one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [each for each in rope.values() if isinstance(each, dict)]
    return [kind.get("rope_type", "default") for kind in kinds]


def _limit(config: Any) -> float:
    """Tokens up to which a prefix's keys do not depend on what follows: "longrope" turns over at one length."""
    if "longrope" not in _ropes(config):
        return float("inf")
    original = config.rope_parameters.get("original_max_position_embeddings")
    return float(original or getattr(config, "original_max_position_embeddings", 0))

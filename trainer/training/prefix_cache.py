"""Keys and values of a prefix, computed in one row and used by all: caches of transformers that never grow.

What they return depends on their arguments alone, so a layer may be computed again in the backward pass.
Import this after unsloth where unsloth is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Kept(DynamicLayer):  # type: ignore[misc]  # untyped in the library
    """Keeps what the first call gives, [1, heads, prefix, size]."""

    is_initialized: bool

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values = keys, values
            self.is_initialized = True
        return keys, values


class Prefixed(DynamicLayer):  # type: ignore[misc]  # untyped in the library
    """Puts the prefix in front of every row. Its expansion is a view, so that gradients add up."""

    def __init__(self, kept: Kept, rows: int) -> None:
        super().__init__()
        self.keys = kept.keys.expand(rows, -1, -1, -1)
        self.values = kept.values.expand(rows, -1, -1, -1)
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)


def prefixed(decoder: Any, prefix: Tensor, rows: int) -> Cache:
    """Compute the prefix [1, tokens], with gradient, for `rows` rows that follow it."""
    first: Any = Cache(layer_class_to_replicate=Kept)
    decoder(input_ids=prefix, past_key_values=first, use_cache=True)
    return Cache(layers=[Prefixed(kept, rows) for kept in first.layers])

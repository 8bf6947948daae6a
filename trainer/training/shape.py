"""A base model as its files describe it: nothing is loaded but config.json and the weight files' headers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.conversion import families
from trainer.errors import TrainError
from trainer.runs import read_json
from trainer.training import base as bases

GROUPS = {"attention": ("attn", "attention", "Attention"), "mlp": ("mlp", "feed_forward", "DenseReluDense")}
"""What a linear layer's path contains, by group of `student.train.target_modules`."""
LAYER = re.compile(r"\.\d+\.")
KEYS = {
    "heads": ("num_attention_heads", "num_heads", "n_head"),
    "hidden": ("hidden_size", "d_model", "n_embd"),
    "layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "vocabulary": ("vocab_size",),
}
"""What config.json calls it: most models, T5, GPT-2."""


@dataclass(frozen=True)
class Shape:
    """What counts for memory and arithmetic."""

    parameters: int
    matrices: dict[str, tuple[int, int]]
    """[out, in] of every linear layer inside the decoder's layers, by its path."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_width: int
    """Width of the keys, which equals that of the values."""
    vocabulary: int
    weight_bytes: int
    fused: bool = True
    """Attention is computed without keeping every pair's weight."""

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """Read config.json and the headers of the safetensors files.

        Raises:
            TrainError: the configuration lacks what every decoder has.
        """
        config: dict[str, Any] = read_json(folder / "config.json")
        config = config.get("text_config") or config
        sizes = _headers(folder)
        heads, hidden = _value(folder, config, "heads"), _value(folder, config, "hidden")
        width = int(config.get("head_dim") or config.get("d_kv") or hidden // heads)
        return cls(
            parameters=sum(math.prod(size) for size in sizes.values()),
            matrices={
                name.removesuffix(".weight"): (size[0], size[1])
                for name, size in sizes.items()
                if len(size) == 2 and LAYER.search(name)
            },
            layers=_value(folder, config, "layers"),
            hidden=hidden,
            intermediate=int(config.get("intermediate_size") or config.get("d_ff") or 4 * hidden),
            heads=heads,
            kv_width=width * int(config.get("num_key_value_heads") or heads),
            vocabulary=_value(folder, config, "vocabulary"),
            weight_bytes=bases.weight_bytes(folder),
            fused=families.attention(str(config.get("model_type"))) == "sdpa",
        )

    @property
    def linear(self) -> int:
        """Weights that every token is multiplied with, the head left out."""
        return sum(rows * columns for rows, columns in self.matrices.values())


def targeted(path: str, wanted: str | list[str]) -> bool:
    """Whether `student.train.target_modules` means the linear layer at this path."""
    if wanted == "all-linear":
        return True
    if isinstance(wanted, str):
        return any(part in path for part in GROUPS[wanted])
    return any(f".{path}".endswith(f".{name}") for name in wanted)


def _value(folder: Path, config: dict[str, Any], what: str) -> int:
    for key in KEYS[what]:
        if config.get(key):
            return int(config[key])
    raise TrainError(
        f"{folder / 'config.json'} has no {KEYS[what][0]}, so nothing can be estimated; "
        "use a base that generates text"
    )


def _headers(folder: Path) -> dict[str, list[int]]:
    """Shape of every tensor; a safetensors file begins with the length of its JSON header."""
    found: dict[str, list[int]] = {}
    for file in sorted(folder.glob(bases.WEIGHTS)):
        with open(file, "rb") as weights:
            header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
        found |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return found

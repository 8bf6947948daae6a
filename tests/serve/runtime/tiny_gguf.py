"""A GGUF of a few thousand random weights: Llama's architecture, byte tokens, Llama 3's special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LONG = "x" * 40
"""A token that is longer than the 32 bytes which llama-cpp-python's own detokenizer can hold."""
TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def write(path: Path, *, template: str | None = TEMPLATE, hidden: int = 32, heads: int = 2) -> Path:
    """Write the model; the same bytes every time."""
    words = [*_byte_names(), "th", LONG]
    tokens = words + SPECIAL
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(words) + [3] * len(SPECIAL))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(len(words))
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(True)
    if template:
        writer.add_chat_template(template)
    _add_tensors(writer, len(tokens), hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensors(writer: Any, vocabulary: int, hidden: int) -> None:
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, hidden),
        "output.weight": (vocabulary, hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.ffn_gate.weight": (2 * hidden, hidden),
        "blk.0.ffn_up.weight": (2 * hidden, hidden),
        "blk.0.ffn_down.weight": (hidden, 2 * hidden),
        **{f"blk.0.attn_{name}.weight": (hidden, hidden) for name in ("q", "k", "v", "output")},
    }
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else draw.standard_normal(shape) * 0.3
        writer.add_tensor(name, values.astype(np.float32))


def _byte_names() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of the bytes."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def lora(path: Path, *, rank: int = 2, alpha: float = 8.0, tensor: str = "blk.0.ffn_down.weight") -> Path:
    """Write a LoRA adapter with random matrices on one tensor of `write`'s model."""
    draw, hidden = np.random.default_rng(1), 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, shape in (("a", (rank, 2 * hidden)), ("b", (hidden, rank))):
        writer.add_tensor(f"{tensor}.lora_{name}", draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""Bases for the benchmarks: Llama 3.2's shapes with random weights, under the demo's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

TICKETS = Path(__file__).resolve().parents[3] / "examples" / "tickets"
LLAMA = {
    # hidden, intermediate, layers, heads, key-value heads, head size: as published
    "1b": (2048, 8192, 16, 32, 8, 64),
    "3b": (3072, 8192, 28, 24, 8, 128),
}
VOCABULARY = 128256


def make_base(folder: Path, shape: str, layers: int = 0, vocabulary: int = VOCABULARY) -> Path:
    """Write a Llama of that shape in bfloat16 with tied embeddings.

    Args:
        layers: fewer than the shape has, or 0 for all.
        vocabulary: tokens; the tokenizer gives the first few thousand of them.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, all_layers, heads, kv_heads, size = LLAMA[shape]
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TICKETS / "base" / name, folder / name)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=4085,
        eos_token_id=[4086, 4093, 4094],
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    return folder

"""What a GGUF must hold to be served as its model was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from trainer.template import Template

CONTROL = 3
"""llama.cpp's token type of a special token."""

ENDS = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>"})
"""Ends of turn that llama.cpp finds by their text where they are special tokens."""


def faults(gguf: Path, model: Path, template: Template) -> list[str]:
    """Compare a GGUF with the folder that it was made of.

    Returns:
        What is missing or different, a sentence each; empty when all is well.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))

    def value(key: str) -> Any:
        field = reader.fields.get(key)
        return field.contents() if field else None

    tensors = {str(tensor.name) for tensor in reader.tensors}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    base = value(f"{value('general.architecture')}.rope.freq_base")
    wrong: list[str] = []
    if base is None or not math.isclose(base, theta, rel_tol=1e-6):
        wrong.append(f"rope.freq_base is {base}, the model's is {theta}")
    if rope.get("rope_type") == "llama3" and "rope_freqs.weight" not in tensors:
        wrong.append("rope_freqs is missing, which carries Llama 3's rope scaling")
    if config.get("tie_word_embeddings") and "output.weight" in tensors:
        wrong.append("the embeddings are tied, yet there is an output.weight")
    if value("tokenizer.chat_template") != template.jinja:
        wrong.append("the chat template is not the frozen one")
    return wrong + _vocabulary_faults(value, config, template)


def _vocabulary_faults(value: Any, config: dict[str, Any], template: Template) -> list[str]:
    wrong = []
    tokens: list[str] = value("tokenizer.ggml.tokens") or []
    types: list[int] = value("tokenizer.ggml.token_type") or []
    if len(tokens) != config["vocab_size"]:
        wrong.append(f"there are {len(tokens)} tokens, the model has {config['vocab_size']}")
    end = template.stop[0]
    at = tokens.index(end) if end in tokens else -1
    known = {value("tokenizer.ggml.eos_token_id"), value("tokenizer.ggml.eot_token_id")}
    if at < 0 or types[at] != CONTROL or (at not in known and end not in ENDS):
        wrong.append(f"{end} does not end an answer")
    bos = value("tokenizer.ggml.bos_token_id")
    adds = value("tokenizer.ggml.add_bos_token")
    if template.bos and (bos is None or tokens[bos] != template.bos or adds is not True):
        wrong.append(
            f"{template.bos} is not put in front of a prompt (bos_token_id {bos}, add_bos_token {adds})"
        )
    if not template.bos and adds:
        wrong.append("a beginning-of-text token is put in front of a prompt that was trained without one")
    return wrong

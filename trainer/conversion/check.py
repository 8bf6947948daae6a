"""What a GGUF must hold to be served as its model was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from trainer.template import Template

CONTROL = 3
"""llama.cpp's token type of a special token."""

ROPE_BASE = 10000.0

FULL_EVERY = {"gemma2": 2, "gemma3": 6}
"""Architecture → every how manieth layer attends to everything, in llama.cpp."""

SCALED_BY_WIDTH = frozenset({46, 62})
"""How many layers the 27B models of Gemma 2 and 3 have: llama.cpp knows them by it, and scales them their own way."""

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
    wrong = _position_faults(value, config, tensors) + _attention_faults(value, config)
    if config.get("model_type") == "t5":
        if "output.weight" not in tensors:
            wrong.append("output.weight is missing, the head that T5 scales or keeps apart")
    elif config.get("tie_word_embeddings") and "output.weight" in tensors:
        wrong.append("the embeddings are tied, yet there is an output.weight")
    if value("tokenizer.chat_template") != template.jinja:
        wrong.append("the chat template is not the frozen one")
    return wrong + _vocabulary_faults(value, config, template)


def _position_faults(value: Any, config: dict[str, Any], tensors: set[str]) -> list[str]:
    """Rotary positions: their base, for sliding layers too, and their scaling."""
    architecture = value("general.architecture")
    ropes = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = ropes.get("full_attention", ropes)  # Gemma 3 has one for each kind of layer
    wanted = {"freq_base": rope.get("rope_theta", config.get("rope_theta", ROPE_BASE))}
    sliding = ropes.get("sliding_attention", {}).get("rope_theta", config.get("rope_local_base_freq"))
    if sliding is not None:
        wanted["freq_base_swa"] = sliding
    wrong = []
    for key, theta in wanted.items():
        base = (
            value(f"{architecture}.rope.{key}") or ROPE_BASE
        )  # what llama.cpp takes where nothing is written
        if not math.isclose(base, theta, rel_tol=1e-6):
            wrong.append(f"rope.{key} is {base}, the model's is {theta}")
    if rope.get("rope_type") == "llama3" and "rope_freqs.weight" not in tensors:
        wrong.append("rope_freqs is missing, which carries Llama 3's rope scaling")
    if "longrope" in (rope.get("rope_type"), rope.get("type")) and "rope_factors_short.weight" not in tensors:
        wrong.append("rope_factors_short is missing, which carries Phi's rope scaling")
    return wrong


def _attention_faults(value: Any, config: dict[str, Any]) -> list[str]:
    """Gemma's soft caps, sliding windows and scale, of which llama.cpp fixes some by the architecture."""
    architecture = value("general.architecture")
    if architecture not in FULL_EVERY:
        return []
    wrong = []
    for key, name in (("attn_logit_softcapping", "attn_logit"), ("final_logit_softcapping", "final_logit")):
        found, wanted = value(f"{architecture}.{name}_softcapping"), config.get(key)
        if (found or wanted) and not math.isclose(found or 0.0, wanted or 0.0, rel_tol=1e-6):
            wrong.append(f"{name}_softcapping is {found}, the model's is {wanted}")
    window = value(f"{architecture}.attention.sliding_window")
    if window != config.get("sliding_window"):
        wrong.append(f"attention.sliding_window is {window}, the model's is {config.get('sliding_window')}")
    every, kinds = FULL_EVERY[architecture], config.get("layer_types") or []
    usual = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(len(kinds))]
    if kinds != usual:
        wrong.append(f"layer_types differ from what llama.cpp computes, one full layer in every {every}")
    scalar, width = config.get("query_pre_attn_scalar"), config.get("head_dim")
    if config["num_hidden_layers"] not in SCALED_BY_WIDTH and scalar != width:
        wrong.append(f"query_pre_attn_scalar is {scalar}, llama.cpp scales by the head's width, {width}")
    return wrong


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

"""GGUF files for tests: one with nothing but a header and a tensor, and a real tiny Llama."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

F16, Q8_0 = 1, 7


def shell(path: Path, *, jinja: str | None = None, file_type: int = F16, seed: int = 0) -> Path:
    """A GGUF that is well formed and cannot answer: metadata and one tensor of 64 kB."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(file_type)
    if jinja is not None:
        writer.add_chat_template(jinja)
    values = np.random.default_rng(seed).standard_normal((64, 256)).astype(np.float32)
    writer.add_tensor("token_embd.weight", values)
    return _finish(writer, path)


def llama(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, jinja: str) -> Path:
    """The model in 32 bits with its tokenizer, as llama.cpp's converter lays them out."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_vocabulary(writer, tokenizer)
    writer.add_chat_template(jinja)
    writer.add_tensor("rope_freqs.weight", _rope_factors(config))
    for name, values in _tensors(model).items():
        writer.add_tensor(name, values)
    return _finish(writer, path)


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    special = set(tokenizer.get_added_vocab())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    state = tokenizer.backend_tokenizer.model.__getstate__()
    import json

    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in json.loads(state)["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|begin_of_text|>"))
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|eot_id|>"))
    writer.add_eot_token_id(tokenizer.convert_tokens_to_ids("<|eot_id|>"))


def _tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    state = {key: value.detach().float().numpy() for key, value in model.state_dict().items()}
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in names.items():
            values = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):  # llama.cpp rotates neighbouring pairs, transformers halves
                count = heads if ours == "attn_q" else groups
                split = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
                values = np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))
            found[f"blk.{layer}.{ours}.weight"] = values
    return found


def _rope_factors(config: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Llama 3's frequency factors, as in llama.cpp's converter."""
    rope = config.rope_parameters
    dimensions = config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, dimensions, 2, dtype=np.float64) / dimensions)
    low, high, original = (
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )
    factors = []
    for frequency in frequencies:
        length = 2 * math.pi / frequency
        smooth = (original / length - low) / (high - low)
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(rope["factor"])
        else:
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

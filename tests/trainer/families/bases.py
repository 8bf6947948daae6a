"""A small random base of every family: its architecture, its kind of tokenizer, its special tokens, its chat format.

The chat templates are written here in each family's format; none is a copy of a published file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from tests.tiny import LLAMA3_SPLIT, tiny_base, tiny_tokenizer
from tests.trainer.families.templates import (
    CHATML,
    GEMMA2,
    GEMMA3,
    LLAMA2,
    MISTRAL,
    NEMO,
    PHI3,
    PHI4,
    PHI4_MINI,
    THINKING,
)
from tests.trainer.families.tokenizers import (
    O200K_SPLIT,
    QWEN_SPLIT,
    TEKKEN_SPLIT,
    byte_level,
    sentence_piece,
)

PADDING = 24
SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Family:
    """How a family's base is written."""

    name: str
    tokenizer: Callable[[Path], None]
    config: Callable[..., Any]
    ends: tuple[str, ...]
    """Tokens that end an answer, as its generation_config names them."""
    padded: bool = False
    """Whether the model has more rows of embeddings than the tokenizer has tokens."""

    def describe(self, folder: Path, hidden: int = 64) -> Any:
        """Write tokenizer and configuration, which is returned."""
        self.tokenizer(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        ends = [tokenizer.convert_tokens_to_ids(text) for text in self.ends]
        config = self.config(
            vocab_size=len(tokenizer) + (PADDING if self.padded else 0),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
        )
        config.save_pretrained(folder)
        return config

    def write(self, folder: Path, hidden: int = 64) -> Path:
        """Write the base in bfloat16; random weights, seed 0."""
        config = self.describe(folder, hidden)
        torch.manual_seed(0)
        model: Any = cast(Any, AutoModelForCausalLM).from_config(config)
        model.generation_config = GenerationConfig.from_model_config(config)
        model.to(torch.bfloat16).save_pretrained(folder)
        return folder


def _config(kind: Any, **values: Any) -> Callable[..., Any]:
    return lambda **shape: kind(**(SHAPE | shape | values))


def _llama2(folder: Path) -> None:
    sentence_piece(
        folder,
        begin="<s>",
        end="</s>",
        ids=(0, 1, 2),
        config={
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": LLAMA2,
        },
    )


def _mistral(folder: Path) -> None:
    sentence_piece(
        folder,
        begin="<s>",
        end="</s>",
        ids=(0, 1, 2),
        pieces=["[INST]", "[/INST]"],
        config={
            "tokenizer_class": "LlamaTokenizer",
            "legacy": True,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": MISTRAL,
        },
    )


def _nemo(folder: Path) -> None:
    byte_level(
        folder,
        split=TEKKEN_SPLIT,
        special=["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
        ignore_merges=True,
        bos="<s>",
        config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": NEMO,
        },
    )


def _qwen(template: str, more: list[str]) -> Callable[[Path], None]:
    return lambda folder: byte_level(
        folder,
        split=QWEN_SPLIT,
        special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        plain=more,
        normal_form=True,
        config={
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "chat_template": template,
        },
    )


def _phi3(folder: Path) -> None:
    turns = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    sentence_piece(
        folder,
        begin="<s>",
        end="</s>",
        ids=(0, 1, 2),
        added=[
            AddedToken(text, special=True, normalized=False, rstrip=text != "<|endoftext|>") for text in turns
        ],
        begins=False,
        config={
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<unk>",
            "chat_template": PHI3,
        },
    )


def _phi4(split: str, turns: list[str], end: str, pad: str, template: str) -> Callable[[Path], None]:
    return lambda folder: byte_level(
        folder,
        split=split,
        special=["<|endoftext|>", *turns],
        config={
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": "<|endoftext|>",
            "eos_token": end,
            "pad_token": pad,
            "unk_token": "<|endoftext|>",
            "chat_template": template,
        },
    )


def _gemma(template: str) -> Callable[[Path], None]:
    return lambda folder: sentence_piece(
        folder,
        begin="<bos>",
        end="<eos>",
        ids=(3, 2, 1),
        pieces=["<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n"],
        spaces="none",
        config={
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "chat_template": template,
        },
    )


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0, 1.02, 1.05, 1.1, 1.2, 1.4],
    "long_factor": [1.1, 1.3, 2.0, 4.0, 9.0, 20.0],
}
FAMILIES = {
    family.name: family
    for family in [
        Family("llama-2", _llama2, _config(LlamaConfig, rms_norm_eps=1e-5), ("</s>",)),
        Family("mistral", _mistral, _config(MistralConfig, head_dim=16, sliding_window=None), ("</s>",)),
        Family("mistral-nemo", _nemo, _config(MistralConfig, head_dim=32, sliding_window=None), ("</s>",)),
        Family(
            "qwen-2.5",
            _qwen(CHATML, []),
            _config(Qwen2Config, tie_word_embeddings=True, rope_theta=1000000.0),
            ("<|im_end|>", "<|endoftext|>"),
            padded=True,
        ),
        Family(
            "qwen-3",
            _qwen(THINKING, ["<think>", "</think>"]),
            _config(Qwen3Config, tie_word_embeddings=True, head_dim=32, rope_theta=1000000.0),
            ("<|im_end|>", "<|endoftext|>"),
            padded=True,
        ),
        Family(
            "phi-3",
            _phi3,
            _config(Phi3Config, num_key_value_heads=4, sliding_window=2047),
            ("<|endoftext|>", "<|end|>"),
            padded=True,
        ),
        Family(
            "phi-4",
            _phi4(
                LLAMA3_SPLIT,
                ["<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|dummy_85|>"],
                end="<|im_end|>",
                pad="<|dummy_85|>",
                template=PHI4,
            ),
            _config(Phi3Config, sliding_window=None),
            ("<|im_end|>",),
        ),
        Family(
            "phi-4-mini",
            _phi4(
                O200K_SPLIT,
                ["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],
                end="<|endoftext|>",
                pad="<|endoftext|>",
                template=PHI4_MINI,
            ),
            _config(
                Phi3Config,
                tie_word_embeddings=True,
                sliding_window=262144,
                max_position_embeddings=131072,
                original_max_position_embeddings=4096,
                rope_parameters=LONG,
            ),
            ("<|endoftext|>", "<|end|>"),
            padded=True,
        ),
        Family(
            "gemma-2",
            _gemma(GEMMA2),
            _config(
                Gemma2Config,
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=32,
                attn_logit_softcapping=5.0,
            ),
            ("<eos>", "<end_of_turn>"),
        ),
        Family(
            "gemma-3",
            _gemma(GEMMA3),
            _config(
                Gemma3TextConfig,
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=32,
                num_hidden_layers=6,
            ),
            ("<eos>", "<end_of_turn>"),
        ),
    ]
}


def write(name: str, folder: Path, hidden: int = 64) -> Path:
    """Write the base of a family: a key of FAMILIES, or "llama-3", whose base other tests use too."""
    return tiny_base(folder, hidden=hidden) if name == "llama-3" else FAMILIES[name].write(folder, hidden)


def describe(name: str, folder: Path) -> None:
    """Write the tokenizer of a family, named as in `write`."""
    if name == "llama-3":
        tiny_tokenizer().save_pretrained(folder)
    else:
        FAMILIES[name].tokenizer(folder)

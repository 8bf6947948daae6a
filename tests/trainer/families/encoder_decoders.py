"""Small random T5 bases, in the layout that they are published in: the first version, and that of Flan-T5."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
import torch
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from tests.trainer.families.tokenizers import TEXTS

FIRST, FLAN = "t5", "flan-t5"
PADDING = 28
"""Rows of embeddings that no token has, as published."""
UNKNOWN = "{}<"
"""Characters that the vocabulary lacks, besides the line end."""


def write(name: str, folder: Path) -> Path:
    """Write the base in float32; random weights, seed 0. FIRST ties its head and scales what goes into it."""
    folder.mkdir(parents=True)
    pieces = _unigram(folder)
    flan = name == FLAN
    config = T5Config(
        vocab_size=pieces + 100 + PADDING,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu" if flan else "relu",
        tie_word_embeddings=not flan,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    if flan:
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    model.generation_config = GenerationConfig(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    model.save_pretrained(folder)
    _as_published(folder, tied=not flan)
    return folder


def _unigram(folder: Path) -> int:
    """Write the tokenizer's files; returns how many pieces it has."""
    written = io.BytesIO()
    lines = [
        line.translate({ord(each): " " for each in UNKNOWN}) for text in TEXTS for line in text.split("\n")
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines * 4 if line.strip()]),
        model_writer=written,
        model_type="unigram",
        vocab_size=400,
        character_coverage=1.0,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(written.getvalue())
    sentinels = [f"<extra_id_{number}>" for number in range(100)]
    about = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 100,
        "additional_special_tokens": sentinels,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).vocab_size()


def _as_published(folder: Path, *, tied: bool) -> None:
    """config.json as transformers 4 wrote it, which says by one key whether the head is tied and scaled."""
    config = json.loads((folder / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))

"""What cannot be carried through to an answer is refused by name, before anything is spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import MT5Config, T5Config

from tests.tiny import tiny_base
from trainer.conversion.families import SUPPORTED, check
from trainer.errors import TrainError


def folder(path: Path, tokenizer: dict[str, Any] | None = None, **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer or {}))
    return path


def test_a_supported_base_is_named(tmp_path: Path) -> None:
    assert check(tiny_base(tmp_path)).name == "Llama 2 and 3"


def test_the_reason_and_the_remedy_are_named(tmp_path: Path) -> None:
    MT5Config(architectures=["MT5ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(TrainError, match=r"MT5ForConditionalGeneration: its vocabulary is laid out") as error:
        check(tmp_path)
    assert all(family.name in str(error.value) for family in SUPPORTED.values())
    assert "use a base of Llama 2 and 3 (unsloth/Llama-3.2-1B-Instruct)" in str(error.value)


def test_a_decoder_of_another_depth_than_its_encoder(tmp_path: Path) -> None:
    T5Config(
        architectures=["T5ForConditionalGeneration"], num_layers=2, num_decoder_layers=3
    ).save_pretrained(tmp_path)
    with pytest.raises(TrainError, match="2 layers in its encoder and 3 in its decoder"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["FalconForCausalLM"]},
            "FalconForCausalLM: it is not proven from training to a served",
        ),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "it also reads images"),
        ({"model_type": "mamba"}, "none .model_type 'mamba'."),
    ],
)
def test_other_architectures(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        check(folder(tmp_path, **config))


@pytest.mark.parametrize(
    ("architecture", "tokenizer", "needed"),
    [
        ("Gemma2ForCausalLM", "GemmaTokenizer", True),
        ("Gemma3ForCausalLM", "GemmaTokenizerFast", True),
        ("Phi3ForCausalLM", "LlamaTokenizer", True),
        ("Phi3ForCausalLM", "GPT2Tokenizer", False),
        ("MistralForCausalLM", "LlamaTokenizer", False),
    ],
)
def test_tokenizer_model_is_asked_for_where_the_converter_reads_it(
    tmp_path: Path, architecture: str, tokenizer: str, needed: bool
) -> None:
    base = folder(tmp_path, {"tokenizer_class": tokenizer}, architectures=[architecture])
    if needed:
        with pytest.raises(TrainError, match=r"holds no tokenizer\.model.*add the file"):
            check(base)
        (base / "tokenizer.model").write_bytes(b"")
    assert check(base) is SUPPORTED[architecture]


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "context", "longest"),
    [
        ({"sliding_window": 2047}, 2048, None),
        ({"sliding_window": 2047}, 2049, 2048),
        ({"sliding_window": None}, 100_000, None),
        ({"sliding_window": 262144, "rope_parameters": LONG}, 8192, 4096),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}, 4097, 4096),
    ],
)
def test_a_context_that_llama_cpp_computes_otherwise_is_refused(
    tmp_path: Path, config: dict[str, Any], context: int, longest: int | None
) -> None:
    base = folder(tmp_path, {"tokenizer_class": "GPT2Tokenizer"}, architectures=["Phi3ForCausalLM"], **config)
    check(base)
    if longest is None:
        check(base, context)
    else:
        with pytest.raises(TrainError, match=f"student.context is {context}.*; use at most {longest}"):
            check(base, context)

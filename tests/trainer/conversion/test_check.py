"""What llama.cpp would compute otherwise than the weights say is found in the GGUF's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from trainer.conversion.check import faults
from trainer.runs import write_json
from trainer.template import Template

GEMMA2: dict[str, Any] = {
    "vocab_size": 0,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def gguf(folder: Path, architecture: str, bases: dict[str, float]) -> Path:
    """Keys alone, as the converter writes them for Gemma."""
    writer = GGUFWriter(folder / "m.gguf", architecture)
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)
    writer.add_sliding_window(32)
    for key, base in bases.items():
        writer.add_float32(f"{architecture}.rope.{key}", base)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


def found(folder: Path, architecture: str, config: dict[str, Any], **bases: float) -> list[str]:
    """Faults, those of the missing vocabulary aside."""
    write_json(folder / "config.json", config)
    every = faults(gguf(folder, architecture, bases), folder, Template("", "", ["<end_of_turn>"], {}))
    vocabulary = ("the chat template is not the frozen one", "<end_of_turn> does not end an answer")
    return [fault for fault in every if fault not in vocabulary]


def test_gemma_2_as_it_is_converted(tmp_path: Path) -> None:
    assert found(tmp_path, "gemma2", GEMMA2) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"attn_logit_softcapping": 20.0}, "attn_logit_softcapping is 50.0, the model's is 20.0"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping is 30.0, the model's is None"),
        ({"sliding_window": 64}, "attention.sliding_window is 32, the model's is 64"),
        (
            {"layer_types": ["full_attention"] * 4},
            "layer_types differ from what llama.cpp computes, one full layer in every 2",
        ),
        (
            {"query_pre_attn_scalar": 144},
            "query_pre_attn_scalar is 144, llama.cpp scales by the head's width, 16",
        ),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope.freq_base is 10000.0, the model's is 500000.0"),
    ],
)
def test_what_gemma_2_is_computed_otherwise(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    (only,) = found(tmp_path, "gemma2", GEMMA2 | change)
    assert only.startswith(fault)


def test_the_27b_models_are_scaled_their_own_way(tmp_path: Path) -> None:
    large = {"num_hidden_layers": 46, "query_pre_attn_scalar": 144, "layer_types": GEMMA2["layer_types"]}
    assert found(tmp_path, "gemma2", GEMMA2 | large) == []


def test_gemma_3_has_a_base_for_each_kind_of_layer(tmp_path: Path) -> None:
    ropes = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    config = GEMMA2 | {"rope_parameters": ropes, "layer_types": ["sliding_attention"] * 4}
    assert found(tmp_path, "gemma3", config, freq_base=1e6) == [
        "rope.freq_base_swa is 10000.0, the model's is 20000.0"
    ]
    assert found(tmp_path, "gemma3", config, freq_base=1e6, freq_base_swa=2e4) == []


def test_long_rope_needs_its_factors(tmp_path: Path) -> None:
    config = {"vocab_size": 0, "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0}}
    (only,) = found(tmp_path, "phi3", config)
    assert only.startswith("rope_factors_short is missing")

"""Which architectures can be distilled here, from data to a served answer; every other one is refused early."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.errors import TrainError

TOKENIZER_MODEL = "tokenizer.model"

WINDOW_LEFT_OUT = frozenset({"MistralForCausalLM", "Phi3ForCausalLM"})
"""Architectures whose sliding window llama.cpp does not compute."""

SOFT_CAPPED = frozenset({"gemma2"})
"""Model types whose attention is capped softly, which transformers' fused attention leaves out without a word."""

ENCODER_DECODERS = frozenset({"t5"})
"""Model types that read the prompt with an encoder and answer with a decoder."""


@dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    name: str
    example: str
    """A base to use, on the Hugging Face hub."""


SUPPORTED = {
    "LlamaForCausalLM": Family("Llama 2 and 3", "unsloth/Llama-3.2-1B-Instruct"),
    "MistralForCausalLM": Family("Mistral", "mistralai/Mistral-7B-Instruct-v0.3"),
    "Qwen2ForCausalLM": Family("Qwen 2.5", "Qwen/Qwen2.5-1.5B-Instruct"),
    "Qwen3ForCausalLM": Family("Qwen 3", "Qwen/Qwen3-1.7B"),
    "Phi3ForCausalLM": Family("Phi 3 and 4", "microsoft/Phi-3-mini-4k-instruct"),
    "Gemma2ForCausalLM": Family("Gemma 2", "google/gemma-2-2b-it"),
    "Gemma3ForCausalLM": Family("Gemma 3", "google/gemma-3-1b-it"),
    "T5ForConditionalGeneration": Family("T5 and Flan-T5", "google/flan-t5-base"),
}

REASONS = {
    "MT5ForConditionalGeneration": "its vocabulary is laid out in another way than T5's",
    "Gemma3ForConditionalGeneration": "it also reads images, and only its text-only sizes (270m, 1b) are proven",
    "Mistral3ForConditionalGeneration": "it also reads images, and only text-only models are proven",
}
"""Why a well-known architecture is not among them."""


def known(config: dict[str, Any], name: str) -> Family:
    """The family that a configuration belongs to; nothing else of the base is needed.

    Args:
        config: the parsed config.json.
        name: of the base, for the error.

    Raises:
        TrainError: its architecture is not supported.
    """
    architecture = _architecture(config)
    family = SUPPORTED.get(architecture)
    if family is None:
        reason = REASONS.get(architecture, "it is not proven from training to a served answer")
        others = ", ".join(f"{each.name} ({each.example})" for each in SUPPORTED.values())
        raise TrainError(f"{name} has the architecture {architecture}: {reason}; use a base of {others}")
    return family


def check(folder: Path, context: int | None = None) -> Family:
    """The family of the base in a folder.

    Args:
        context: tokens that the local runtime is to hold; checked where it is given.

    Raises:
        TrainError: its architecture is not supported, a file that the conversion reads is missing, or
            llama.cpp does not compute so long a context as the training does.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family, architecture = known(config, str(folder)), _architecture(config)
    if _reads_tokenizer_model(architecture, folder) and not (folder / TOKENIZER_MODEL).is_file():
        raise TrainError(
            f"{folder} holds no {TOKENIZER_MODEL}, from which llama.cpp's converter reads the tokenizer of "
            f"{family.name}; add the file from the model's publisher"
        )
    if config.get("num_decoder_layers") not in (None, config.get("num_layers")):
        raise TrainError(
            f"{folder} has {config['num_layers']} layers in its encoder and {config['num_decoder_layers']} in its "
            "decoder, and llama.cpp's converter knows equal numbers alone; use another base"
        )
    longest = _longest_context(architecture, config)
    if context is not None and longest is not None and context > longest:
        raise TrainError(
            f"student.context is {context}, and of {folder} llama.cpp computes at most {longest} tokens as it was "
            f"trained (beyond them it leaves out sliding windows or takes other positions); use at most {longest}"
        )
    return family


def _architecture(config: dict[str, Any]) -> str:
    named: list[str] = config.get("architectures") or [f"none (model_type {config.get('model_type')!r})"]
    return named[0]


def _longest_context(architecture: str, config: dict[str, Any]) -> int | None:
    """Tokens up to which llama.cpp and transformers attend alike; None where there is no such bound."""
    bounds = []
    if architecture in WINDOW_LEFT_OUT and config.get("sliding_window"):
        bounds.append(config["sliding_window"] + 1)  # the last token's own answer no longer fits
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        # llama.cpp takes the long factors by the size of the context, transformers by the length of the text
        original = rope.get("original_max_position_embeddings")
        bounds.append(original or config["original_max_position_embeddings"])
    return min(bounds, default=None)


def auto_class(model_type: str) -> Any:
    """transformers' class that loads this type of model with its language model head."""
    import transformers

    encodes = model_type in ENCODER_DECODERS
    return transformers.AutoModelForSeq2SeqLM if encodes else transformers.AutoModelForCausalLM


def attention(model_type: str) -> Literal["eager", "sdpa"]:
    """The fastest attention of transformers that computes this type of model right."""
    return "eager" if model_type in SOFT_CAPPED else "sdpa"


def _reads_tokenizer_model(architecture: str, folder: Path) -> bool:
    """Whether the converter has no other source for the vocabulary."""
    if architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM"):
        return True
    if architecture != "Phi3ForCausalLM":
        return False
    about = folder / "tokenizer_config.json"
    written = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    return bool(written.get("tokenizer_class") != "GPT2Tokenizer")

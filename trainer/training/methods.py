"""The methods: what of a model is trained, how it is loaded, and what a machine must have for it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer import process
from trainer.conversion import families
from trainer.errors import TrainError
from trainer.training import prompt
from trainer.training.shape import targeted

log = logging.getLogger("homestill.train")

KEPT = {"lora": "adapter", "qlora": "adapter", "full": "weights", "prompt": "prompt"}
"""Folder of the trained weights by method, below the stage's work folder."""

CUDA_PROBE = "import torch; assert torch.cuda.is_available(), 'no CUDA device'; import bitsandbytes"
UNSLOTH_PROBE = (
    "import torch; assert torch.cuda.is_available(); import unsloth; assert unsloth.DEVICE_TYPE == 'cuda'"
)


def refusal(method: str, environment: Mapping[str, str]) -> str:
    """Why this machine cannot train by this method; empty where it can. Asked in a process of its own."""
    if method != "qlora":
        return ""
    reason = "bitsandbytes is not installed"
    if find_spec("bitsandbytes") is not None:
        done = _probe(CUDA_PROBE, environment)
        reason = done.last_line if done.code else ""
    return reason and (
        f"student.method is 'qlora', which needs CUDA and bitsandbytes ({reason}); use lora here, or train "
        "on a machine with an NVIDIA GPU and the gpu extra installed"
    )


def choose_backend(
    method: str, environment: Mapping[str, str], model_type: str = "llama", *, dora: bool = False
) -> str:
    """`unsloth` where its import succeeds on CUDA, in a process of its own for it patches its neighbours."""
    takes = KEPT[method] == "adapter" and not dora and model_type not in families.ENCODER_DECODERS
    if not takes or find_spec("unsloth") is None:
        return "trl"
    done = _probe(UNSLOTH_PROBE, environment)
    if done.code:
        log.info("unsloth is installed but not used: %s", done.last_line)
    return "trl" if done.code else "unsloth"


def target_modules(base: Path, wanted: str | list[str]) -> list[str]:
    """Names of the linear layers that get an adapter: every layer whose path ends in one of them.

    The head is never among them: it is often tied to the embeddings, and llama.cpp keeps it apart.

    Raises:
        TrainError: the model has no layer of a given name, or none of the group.
    """
    paths = linear_layers(base)
    names = sorted({path.rpartition(".")[2] for path in paths})
    if isinstance(wanted, str):
        found = {path.rpartition(".")[2] for path in paths if targeted(path, wanted)}
        unknown = [] if found else [wanted]
    else:
        found = set(wanted)
        unknown = [name for name in wanted if not any(targeted(path, [name]) for path in paths)]
    if unknown:
        raise TrainError(
            f"student.train.target_modules names {', '.join(unknown)}, which {base} has not; "
            f"use all-linear, attention, mlp, or some of {', '.join(names)}"
        )
    return sorted(found)


def linear_layers(base: Path) -> list[str]:
    """Paths of a model's linear layers but the head; no weights are loaded.

    Raises:
        TrainError: transformers does not know the architecture, or it generates no text.
    """
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        with torch.device("meta"):
            model: Any = families.auto_class(config.model_type).from_config(config)
    except (ValueError, KeyError, OSError) as error:
        raise TrainError(
            f"{base} cannot be built from its config.json: {error}; use a base that generates text"
        ) from error
    head = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def load_model(spec: dict[str, Any], cuda: bool) -> tuple[Any, Any]:
    """Model and tokenizer, with what is trained added and everything else frozen.

    Args:
        spec: of `train.prepare`.
    """
    if spec["backend"] == "unsloth":
        return _unsloth(spec)  # before transformers and peft are imported, which it patches
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoTokenizer, set_seed

    set_seed(spec["seed"])  # what is added starts from random weights
    model_type = AutoConfig.from_pretrained(spec["base"], local_files_only=True).model_type
    model: Any = families.auto_class(model_type).from_pretrained(
        spec["base"],
        dtype=torch.bfloat16 if cuda and spec["method"] != "full" else torch.float32,
        attn_implementation=families.attention(model_type),
        local_files_only=True,
        **(_four_bits() if spec["method"] == "qlora" else {}),
    )
    if KEPT[spec["method"]] == "adapter":
        config = LoraConfig(
            task_type="SEQ_2_SEQ_LM" if model_type in families.ENCODER_DECODERS else "CAUSAL_LM",
            target_modules=spec["modules"],
            use_dora=spec["settings"]["dora"],
            **_adapter(spec),
        )
        model = get_peft_model(model, config)
    elif spec["method"] == "prompt":
        prompt.attach(model, spec["soft"], spec["seed"])
    return model, AutoTokenizer.from_pretrained(spec["tokenizer"], local_files_only=True)


def _adapter(spec: dict[str, Any]) -> dict[str, Any]:
    settings = spec["settings"]
    return {
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": settings["dropout"],
        "use_rslora": settings["rslora"],
        "bias": "none",
    }


def _four_bits() -> dict[str, Any]:
    """The base as QLoRA keeps it (arXiv 2305.14314): 4-bit normal floats, their scales quantised again."""
    import os

    import torch
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    quantised = config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantised, "device_map": {"": int(os.environ.get("LOCAL_RANK", "0"))}}


def _unsloth(spec: dict[str, Any]) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        spec["base"],
        max_seq_length=spec["settings"]["max_length"],
        dtype=None,
        load_in_4bit=spec["method"] == "qlora",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        target_modules=spec["modules"],
        use_gradient_checkpointing="unsloth",
        random_state=spec["seed"],
        **_adapter(spec),
    )
    return model, tokenizer


def _probe(code: str, environment: Mapping[str, str]) -> process.Done:
    return process.run([sys.executable, "-c", code], timeout=600, environment=environment)

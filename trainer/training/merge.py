"""The process that turns what was trained into train's 16-bit model: `python -m trainer.training.merge spec`.

A process of its own, for trl and unsloth patch what they import. The base is loaded afresh from its
16-bit weights, the adapter or the soft prompt is added in float32, and the sum is rounded once.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging

from trainer import child
from trainer.conversion import families
from trainer.template import Template
from trainer.training import base as bases
from trainer.training import methods, prompt

APART = "Input and output embeddings are no longer tied"
"""peft's warning of Flan-T5, whose configuration calls a head tied that never was."""


def merge(spec: dict[str, Any], trained: Path, out: Path) -> None:
    """Write the merged model with its tokenizer and the frozen template.

    Args:
        spec: of `train.prepare`.
        trained: an adapter's folder, full weights' or a soft prompt's.
        out: made anew.
    """
    base, kept = Path(spec["base"]), methods.KEPT[spec["method"]]
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    model: Any = families.auto_class(config.model_type).from_pretrained(
        trained if kept == "weights" else base,
        config=config,  # trl writes its token ids into its own
        dtype=torch.float32,
        local_files_only=True,
    )
    if kept == "adapter":
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, trained)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", APART)
            model = adapted.merge_and_unload(safe_merge=True)
    elif kept == "prompt":
        prompt.bake(model, prompt.load(trained), spec["soft"]["first"])
    shutil.rmtree(out, ignore_errors=True)
    model.to(sixteen_bit(base)).save_pretrained(out)
    bases.complete(out, base, Template.from_json(spec["template"]), Path(spec["tokenizer"]))


def sixteen_bit(base: Path) -> torch.dtype:
    """The base's own 16-bit type; float16 for a float32 base, whose small weights bfloat16 would coarsen."""
    stored = AutoConfig.from_pretrained(base, local_files_only=True).dtype
    return stored if stored in (torch.bfloat16, torch.float16) else torch.float16


def main() -> None:
    spec = child.read_spec()
    logging.disable_progress_bar()
    work = Path.cwd()
    merge(spec, work / methods.KEPT[spec["method"]], work / "merged")


if __name__ == "__main__":
    main()

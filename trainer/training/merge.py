"""The process that turns an adapter or full weights into train's 16-bit model: `python -m trainer.training.merge spec`.

A process of its own, for trl and unsloth patch what they import. The base is loaded afresh from its
16-bit weights, the adapter is added in float32, and the sum is rounded once.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from trainer import child
from trainer.template import Template
from trainer.training import base as bases


def merge(base: Path, trained: Path, method: str, template: Template, out: Path) -> None:
    """Write the merged model with the base's tokenizer and the frozen template.

    Args:
        trained: a LoRA adapter's folder, or the folder of full weights.
        out: made anew.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        base if method == "lora" else trained,
        config=AutoConfig.from_pretrained(
            base, local_files_only=True
        ),  # trl writes its token ids into its own
        dtype=torch.float32,
        local_files_only=True,
    )
    if method == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, trained).merge_and_unload(safe_merge=True)
    shutil.rmtree(out, ignore_errors=True)
    model.to(sixteen_bit(base)).save_pretrained(out)
    bases.complete(out, base, template)


def sixteen_bit(base: Path) -> torch.dtype:
    """The base's own 16-bit type; float16 for a float32 base, whose small weights bfloat16 would coarsen."""
    stored = AutoConfig.from_pretrained(base, local_files_only=True).dtype
    return stored if stored in (torch.bfloat16, torch.float16) else torch.float16


def main() -> None:
    spec = child.read_spec()
    logging.disable_progress_bar()
    work = Path.cwd()
    trained = work / ("adapter" if spec["method"] == "lora" else "weights")
    template = Template.from_json(spec["template"])
    merge(Path(spec["base"]), trained, spec["method"], template, work / "merged")


if __name__ == "__main__":
    main()

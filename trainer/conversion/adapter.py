"""A LoRA adapter as GGUF, to be served beside its base: `python -m trainer.conversion.adapter LLAMA_CPP BASE ADAPTER OUT`.

The process runs llama.cpp's own convert_lora_to_gguf.py. What that script would drop or scale wrongly is
looked for in the adapter's configuration before, and the finished file is compared with it afterwards.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

from trainer import process
from trainer.runs import read_json, write_json

SCRIPT = "convert_lora_to_gguf.py"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WITHIN = 1e-5
"""Relative difference allowed between the scale that was trained with and the one that is served with."""

REFUSED = {
    "use_dora": "DoRA also trains the length of every row, which a GGUF adapter has no place for",
    "modules_to_save": "whole trained layers are no low-rank matrices",
    "trainable_token_indices": "trained token vectors are no low-rank matrices",
    "target_parameters": "parameters outside linear layers have no name in a GGUF adapter",
    "lora_bias": "a GGUF adapter holds no biases",
    "layer_replication": "the base would have more layers than its file",
    "rank_pattern": "a GGUF adapter has one alpha for all ranks",
    "alpha_pattern": "a GGUF adapter has one alpha",
    "use_qalora": "its inputs are pooled, which llama.cpp does not do",
    "use_bdlora": "its matrices are block-diagonal, which llama.cpp does not do",
    "alora_invocation_tokens": "it is switched on in the middle of a prompt, which the routing does not do",
}
"""Keys of PEFT's configuration whose effect a GGUF adapter cannot carry, and why."""


def unservable(adapter: Path) -> list[str]:
    """Why an adapter can only be served merged into its base; empty where it can stand beside it.

    Args:
        adapter: PEFT's folder.
    """
    config: dict[str, Any] = read_json(adapter / CONFIG)
    found = [
        f"{key} is {json.dumps(config[key])}: {reason}" for key, reason in REFUSED.items() if config.get(key)
    ]
    if config.get("peft_type", "LORA") != "LORA":
        found.append(f"peft_type is {config['peft_type']}: llama.cpp knows LORA alone")
    if config.get("bias", "none") != "none":
        found.append(f"bias is {config['bias']}: a GGUF adapter holds no biases")
    return found


def scale(config: dict[str, Any]) -> float:
    """What PEFT multiplies B·A by: alpha / r, or alpha / √r with rsLoRA (arXiv 2312.03732)."""
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def stage(adapter: Path, folder: Path) -> Path:
    """The adapter as llama.cpp understands it: its scale is always alpha / r, so rsLoRA gets another alpha.

    The base's path on this machine is left out, for it would end up in the file.

    Returns:
        `folder`, made anew.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config: dict[str, Any] = read_json(adapter / CONFIG)
    changed = {"lora_alpha": scale(config) * config["r"], "use_rslora": False}
    config.pop("base_model_name_or_path", None)
    write_json(folder / CONFIG, config | changed)
    (folder / WEIGHTS).symlink_to((adapter / WEIGHTS).resolve())
    return folder


def faults(gguf: Path, adapter: Path, base: Path) -> list[str]:
    """Compare a GGUF adapter with PEFT's and with the GGUF of the base that it is served on.

    Returns:
        What is missing or different, a sentence each; empty when all is well.
    """
    from gguf import GGUFReader
    from safetensors import safe_open

    config: dict[str, Any] = read_json(adapter / CONFIG)
    made, under = GGUFReader(gguf), GGUFReader(base)
    with safe_open(adapter / WEIGHTS, framework="np") as trained:
        wanted = len(list(trained.keys()))
    values = {key: made.fields[key].contents() for key in made.fields}
    wrong = []
    if (values.get("general.type"), values.get("adapter.type")) != ("adapter", "lora"):
        wrong.append(f"it is a {values.get('general.type')}, no LoRA adapter")
    architecture = under.fields["general.architecture"].contents()
    if values.get("general.architecture") != architecture:
        wrong.append(f"it is for {values.get('general.architecture')}, the base is {architecture}")
    if len(made.tensors) != wanted:
        wrong.append(f"it holds {len(made.tensors)} matrices, {wanted} were trained")
    served = values.get("adapter.lora.alpha", 0.0) / config["r"]
    if not math.isclose(served, scale(config), rel_tol=WITHIN):
        wrong.append(f"it is scaled by {served:g}, trained was {scale(config):g}")
    return wrong + _homeless(made, under)


def _homeless(made: Any, under: Any) -> list[str]:
    """Matrices whose tensor the base does not have."""
    known = {str(tensor.name) for tensor in under.tensors}
    names = {str(tensor.name).rpartition(".lora_")[0] for tensor in made.tensors}
    lost = sorted(names - known)
    return [f"the base has no {', '.join(lost[:3])}"] if lost else []


def main() -> None:
    process.on_parent_death(lambda: os._exit(1))
    llama_cpp, base, adapter, out = map(Path, sys.argv[1:5])
    sys.path.insert(0, str(llama_cpp))
    sys.argv = [SCRIPT, "--base", str(base), "--outtype", "f32", "--outfile", str(out), str(adapter)]
    runpy.run_path(str(llama_cpp / SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main()

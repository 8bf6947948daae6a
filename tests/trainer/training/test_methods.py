"""What is trained by each method, with which layers, and where it is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_base
from tests.tiny_run import tiny_run
from tests.trainer.training.support import curve, prepared
from trainer import train
from trainer.errors import TrainError
from trainer.runs import read_json
from trainer.training import loop, merge, methods

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("all-linear", sorted(ATTENTION + MLP)),
        ("attention", ATTENTION),
        ("mlp", MLP),
        (["q_proj", "layers.1.mlp.up_proj"], ["layers.1.mlp.up_proj", "q_proj"]),
    ],
)
def test_target_modules_by_group_and_by_name(base: Path, wanted: Any, found: list[str]) -> None:
    assert methods.target_modules(base, wanted) == found


def test_layers_that_the_model_has_not_are_refused_with_those_that_it_has(base: Path) -> None:
    with pytest.raises(
        TrainError, match=r"names qkv_proj, lm_head, which .* has not; use .* some of down_proj, gate"
    ):
        methods.target_modules(base, ["q_proj", "qkv_proj", "lm_head"])


@pytest.mark.parametrize(
    ("recipe", "adapted", "each"),
    [
        ("target_modules: attention, rslora: true", 8, 1),
        ("target_modules: [q_proj, up_proj], dora: true", 4, 1),
        ("rank: 4, alpha: 4, dropout: 0.0", 14, 1),
    ],
)
def test_the_adapter_is_what_the_recipe_says(tmp_path: Path, recipe: str, adapted: int, each: int) -> None:
    """Trained, merged, and still what the adapter over the base computes."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    run = tiny_run(tmp_path, train=f"epochs: 1, learning_rate: 0.01, {recipe}")
    spec, work = prepared(run)
    loop.train(spec, work)
    losses = [loss for _, loss in curve(work)]
    assert losses[-1] < losses[0]
    weights = load_file(work / "adapter" / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in weights) == adapted
    config, settings = read_json(work / "adapter" / "adapter_config.json"), run.task.settings.student.train
    assert (config["use_rslora"], config["use_dora"]) == (settings.rslora, settings.dora)
    assert (config["r"], config["lora_alpha"]) == (settings.rank, settings.alpha)
    merge.merge(spec, work / "adapter", work / "merged")
    ids = torch.tensor([[3, 5, 7, 11, 13]])
    plain: Any = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=torch.float32)
    merged: Any = AutoModelForCausalLM.from_pretrained(work / "merged", dtype=torch.float32)
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        adapted_logits = PeftModel.from_pretrained(plain, work / "adapter")(input_ids=ids).logits
        after = merged(input_ids=ids).logits
    assert (after - adapted_logits).abs().max() < 0.1 < (after - before).abs().max()


def test_four_bits_are_nf4_quantised_twice() -> None:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    config = methods._four_bits()["quantization_config"]
    assert config.load_in_4bit
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)


def test_without_cuda_the_backend_is_trl() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    assert methods.choose_backend("lora", {}) == methods.choose_backend("prompt", {}) == "trl"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dora", ["false", "true"])
def test_qlora_learns_and_merges_onto_16_bit_weights(tmp_path: Path, dora: str) -> None:
    """Through unsloth where it is installed, and through transformers (dora) in any case."""
    from transformers import AutoModelForCausalLM

    recipe = f"epochs: 3, learning_rate: 0.01, dora: {dora}"
    run = tiny_run(tmp_path, method="qlora", train=recipe, environment=os.environ)  # compilers want a PATH
    train.run(run)
    losses = [loss for _, loss in curve(run.folder / "train" / "work")]
    assert losses[-1] < losses[0] / 2
    merged: Any = AutoModelForCausalLM.from_pretrained(run.folder / "train" / "model", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert not hasattr(merged.config, "quantization_config")

"""An adapter served beside its base answers as the merged weights do, and what cannot is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve.errors import EmbeddedError
from serve.runtime.generation import Generator
from tests.contract import files
from tests.tiny import tiny_model, tiny_tokenizer
from trainer import export, process
from trainer.conversion import adapter as adapters
from trainer.errors import ExportError
from trainer.runs import read_json, write_json
from trainer.template import GOLDEN, Template

RANK, ALPHA = 4, 6


def write_adapter(folder: Path, model: Any, **options: Any) -> Any:
    """Save a LoRA adapter with random matrices on `model`; returns PEFT's model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=RANK, lora_alpha=ALPHA, **options
    )
    torch.manual_seed(1)
    adapted: Any = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder)
    return adapted


def made(root: Path, **options: Any) -> tuple[Any, Path, Path]:
    """The adapted model in PyTorch, its base as GGUF, and its adapter as GGUF by llama.cpp's script."""
    try:
        llama_cpp = export.converter({}, adapters.SCRIPT)
    except ExportError as error:
        pytest.skip(str(error))
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    tokenizer.save_pretrained(root / "base")
    model.save_pretrained(root / "base")
    base = files.llama(root / "base.gguf", model, tokenizer, Template.freeze(tokenizer).jinja)
    adapted = write_adapter(root / "adapter", model, **options)
    staged, out = adapters.stage(root / "adapter", root / "staged"), root / "adapter.gguf"
    words = process.module("trainer.conversion.adapter", llama_cpp, root / "base", staged, out)
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as done:
        assert done.stdout
        said = done.stdout.read().decode()
    assert done.returncode == 0, said
    return adapted, base, out


def check_logits(adapted: Any, base: Path, adapter: Path) -> None:
    """Logits of the GGUF pair are those of PEFT's model, and not those of the base alone."""
    import llama_cpp

    tokenizer = tiny_tokenizer()
    ids = Template.freeze(tokenizer).prompt_ids(tokenizer, GOLDEN[0])
    with torch.no_grad():
        expected = adapted(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
        with adapted.disable_adapter():
            bare = adapted(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    generator = Generator.load(base, 512, 1, adapter)
    generator._llama.eval(ids)
    pointer = llama_cpp.llama_get_logits_ith(generator._llama.ctx, -1)
    found = np.ctypeslib.as_array(pointer, (len(expected),)).copy()
    generator._llama.close()
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert np.abs(bare - expected).max() > 0.2 * np.abs(expected).max(), "the adapter must matter here"


def test_rslora_is_served_at_the_scale_it_was_trained_with(tmp_path: Path) -> None:
    adapted, base, adapter = made(tmp_path, use_rslora=True)
    check_logits(adapted, base, adapter)
    assert adapters.faults(adapter, tmp_path / "adapter", base) == []
    assert str(tmp_path) not in adapter.read_bytes().decode("latin-1"), "no path of this machine in the file"
    config = read_json(tmp_path / "adapter" / adapters.CONFIG)
    write_json(tmp_path / "adapter" / adapters.CONFIG, config | {"use_rslora": False})
    (wrong,) = adapters.faults(adapter, tmp_path / "adapter", base)
    assert wrong == "it is scaled by 3, trained was 1.5"
    other = files.shell(tmp_path / "other.gguf")
    assert any(
        "the base has no blk.0" in each for each in adapters.faults(adapter, tmp_path / "adapter", other)
    )
    with pytest.raises(EmbeddedError, match=r"base\.gguf is no LoRA adapter"):
        Generator.load(base, 128, 1, base)


@pytest.mark.slow
def test_plain_lora(tmp_path: Path) -> None:
    adapted, base, adapter = made(tmp_path)
    check_logits(adapted, base, adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "use_dora is true: DoRA also trains the length of every row"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"]'),
        ({"rank_pattern": {"q_proj": 8}}, "one alpha for all ranks"),
        ({"bias": "all"}, "bias is all"),
        ({"peft_type": "PROMPT_TUNING"}, "llama.cpp knows LORA alone"),
    ],
)
def test_what_a_gguf_adapter_cannot_hold_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False}
    write_json(tmp_path / adapters.CONFIG, plain)
    assert adapters.unservable(tmp_path) == []
    write_json(tmp_path / adapters.CONFIG, plain | change)
    (found,) = adapters.unservable(tmp_path)
    assert reason in found

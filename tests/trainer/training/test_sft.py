"""The trainer with the shared prefix learns what TRL's own loss learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig

from tests.tiny import tiny_model, tiny_tokenizer
from trainer.template import IGNORED
from trainer.training.batches import ByLength, collate, groups_of
from trainer.training.sft import SharedPrefixTrainer

STEP = 4
PREFIX = list(range(100, 140))


def rows(count: int) -> list[dict[str, list[int]]]:
    chance = torch.Generator().manual_seed(0)

    def some(length: int) -> list[int]:
        values: list[int] = torch.randint(1, 300, (length,), generator=chance).tolist()
        return values

    prompts, answers = (
        ([*PREFIX, *some(5 + at % 4)] for at in range(count)),
        (some(2 + at % 3) for at in range(count)),
    )
    return [
        {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def trained(
    folder: Path, *, shared: bool, batch: int = STEP, adapter: bool = True
) -> tuple[dict[str, torch.Tensor], list[float], Any]:
    """Three steps. Returns the trained weights, the logged losses and the trainer."""
    base = tiny_model(tiny_tokenizer(), hidden=32)
    base.set_attn_implementation("eager")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora) if adapter else base
    data = rows(3 * STEP)
    trainer = SharedPrefixTrainer(
        order=ByLength([len(row["input_ids"]) for row in data], STEP, 0, groups_of(data, STEP)),
        summed=base if shared else None,
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=STEP // batch,
            max_steps=3,
            learning_rate=0.1,
            optim="sgd",  # Adam would blow the rounding of gradients near zero up
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data[:5]),
        data_collator=lambda batch: collate(batch, 0),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return weights, [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


@pytest.mark.parametrize("adapter", [True, False])
def test_the_shared_prefix_learns_what_trls_loss_learns(tmp_path: Path, adapter: bool) -> None:
    expected, losses, plain = trained(tmp_path, shared=False, adapter=adapter)
    found, ours, trainer = trained(tmp_path, shared=True, adapter=adapter)
    assert ours == pytest.approx(losses, abs=1e-4)
    assert trainer.tokens == plain.tokens == sum(len(row["input_ids"]) for row in rows(3 * STEP))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-4)


def test_how_a_step_is_cut_changes_nothing(tmp_path: Path) -> None:
    whole, losses, _ = trained(tmp_path, shared=True)
    cut, others, _ = trained(tmp_path, shared=True, batch=2)
    assert others == pytest.approx(losses, abs=1e-4)
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, atol=1e-5, rtol=1e-4)

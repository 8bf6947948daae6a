"""An encoder-decoder's loss is transformers' own, however its rows are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

from tests.trainer.families import encoder_decoders
from trainer.template import IGNORED
from trainer.training import encoder_decoder
from trainer.training.passes import cut, learned

ROWS = [
    {"input_ids": [*prompt, *answer], "labels": [IGNORED] * len(prompt) + answer}
    for prompt, answer in [([5, 6, 7, 1], [9, 1]), ([8, 1], [10, 11, 12, 1]), ([5, 6, 1], [13, 1])]
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = encoder_decoders.write(encoder_decoders.FLAN, tmp_path_factory.mktemp("t5") / "base")
    return T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).train()


def gradients(model: Any, losses: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    return sum(float(loss.detach()) for loss in losses), [
        weight.grad.clone() for weight in model.parameters()
    ]


def test_prompts_and_answers_are_padded_apart() -> None:
    batch = encoder_decoder.collate(ROWS, pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [8, 1, 0, 0], [5, 6, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"][0].tolist() == [IGNORED, 9, 1, IGNORED, IGNORED]
    assert int(learned(batch)) == 8


def test_the_loss_is_transformers_own_row_by_row(model: Any) -> None:
    apart = []
    for row in ROWS:
        at = row["labels"].count(IGNORED)
        answer = torch.tensor([row["labels"][at:]])
        mean = model(input_ids=torch.tensor([row["input_ids"][:at]]), labels=answer).loss
        apart.append(mean * answer.numel())
    expected, wanted = gradients(model, apart)
    found, ours = gradients(model, [encoder_decoder.loss_sum(model, **encoder_decoder.collate(ROWS, pad=0))])
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(
        torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(ours, wanted, strict=True)
    )


def test_passes_of_fewer_rows_add_up(model: Any) -> None:
    batch = encoder_decoder.collate(ROWS, pad=0)
    whole = gradients(model, [encoder_decoder.loss_sum(model, **batch)])
    parts = gradients(model, [encoder_decoder.loss_sum(model, **part) for part in cut(batch, 2)])
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(parts[1], whole[1], strict=True))


def test_a_target_group_finds_its_layers(tmp_path: Path) -> None:
    from trainer.training.methods import target_modules

    folder = encoder_decoders.write(encoder_decoders.FIRST, tmp_path / "base")
    assert target_modules(folder, "attention") == ["k", "o", "q", "v"]
    assert target_modules(folder, "mlp") == ["wi", "wo"]

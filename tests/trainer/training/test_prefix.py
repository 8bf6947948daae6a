"""The shared prefix changes the work, not the loss nor the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.tiny import tiny_model, tiny_tokenizer
from trainer.template import IGNORED
from trainer.training import prefix

PAD = 0


def make_batch(shared: int, suffixes: list[int], answer: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that begin with `shared` equal tokens, then differ; padded on the right."""
    chance = torch.Generator().manual_seed(1)
    width = shared + max(suffixes)
    ids = torch.randint(1, 300, (len(suffixes), width), generator=chance)
    ids[:, :shared] = ids[0, :shared].clone()
    ids[:, shared] = torch.arange(1, len(suffixes) + 1)  # the first token after the prefix differs for sure
    labels = torch.full_like(ids, IGNORED)
    mask = torch.ones_like(ids)
    for row, suffix in enumerate(suffixes):
        end = shared + suffix
        labels[row, end - answer : end] = ids[row, end - answer : end]
        ids[row, end:] = PAD
        mask[row, end:] = 0
    return ids, mask, labels


def make_model(attention: str) -> Any:
    model = tiny_model(tiny_tokenizer(), hidden=32)
    model.set_attn_implementation(attention)
    return model.train()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("shared", "suffixes"), [(40, [12, 30, 7]), (16, [9, 9]), (5, [20, 30]), (0, [20, 11]), (30, [9])]
)
def test_loss_and_gradients_are_those_of_the_plain_computation(
    attention: str, shared: int, suffixes: list[int]
) -> None:
    model = make_model(attention)
    ids, mask, labels = make_batch(shared, suffixes)
    plain = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    expected = gradients(model, plain)
    loss = prefix.loss_sum(model, ids, mask, labels) / (labels != IGNORED).sum()
    found = gradients(model, loss)
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_an_adapter_gets_the_same_gradients() -> None:
    model = make_model("eager")
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the gradients of lora_A
            torch.nn.init.normal_(weight, std=0.1)
    ids, mask, labels = make_batch(40, [12, 30, 7])
    plain = wrapped(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    expected = gradients(wrapped, plain)
    loss = prefix.loss_sum(wrapped.get_base_model(), ids, mask, labels) / (labels != IGNORED).sum()
    found = gradients(wrapped, loss)
    assert len(expected) == 2 * 7 * 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_prefix_ends_before_the_token_that_predicts_the_first_label() -> None:
    ids = torch.tensor([[7, 8, 9, 1, 5], [7, 8, 9, 2, 5]])
    none = torch.full_like(ids, IGNORED)
    assert prefix.common_prefix(ids, none) == 2
    labels = none.clone()
    labels[0, 2] = 9
    assert prefix.common_prefix(ids, labels) == 1
    labels[0, 0] = 7
    assert prefix.common_prefix(ids, labels) == 0


def test_only_known_architectures_are_supported() -> None:
    model = make_model("eager")
    assert prefix.supports(model)
    model.config.model_type = "gemma2"
    assert not prefix.supports(model)

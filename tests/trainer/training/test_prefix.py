"""The shared prefix changes the work, not the loss nor the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import tiny_model, tiny_tokenizer
from trainer.template import IGNORED
from trainer.training import prefix

PAD = 0
WINDOW = 28
"""Shorter than the rows, longer than any padding: eager attention makes NaN of rows without any key."""


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


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "phi3": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def make_family(name: str, attention: str = "eager", **more: Any) -> Any:
    """A random model of two layers, in float64."""
    shape = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**shape, **FAMILIES[name], **more})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().train()


def reference(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy from all logits, in the model's precision; the library's own loss is float32."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_exact_beyond_its_sliding_window_too(name: str, attention: str) -> None:
    """Losses in float64; gradients to 1e-6, for the libraries' norms and softmax stay in float32."""
    model = make_family(name, attention)
    assert prefix.supports(model)
    ids, mask, labels = make_batch(40, [12, 30, 7])
    plain = reference(model, ids, mask, labels)
    expected = gradients(model, plain)
    for recomputed in (False, True):
        if recomputed:
            prefix.checkpoint_layers(model)
        loss = prefix.loss_sum(model, ids, mask, labels) / (labels != IGNORED).sum()
        found = gradients(model, loss)
        torch.testing.assert_close(loss, plain, atol=1e-12, rtol=1e-12)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-6)


def test_rows_of_several_predictors_are_cut_into_passes() -> None:
    model = make_family("llama")
    one, two = make_batch(160, [12, 30, 7, 9]), make_batch(150, [25, 11, 40, 6])
    two[0][:, 3:150] = two[0][:, 3:150].flip(1)  # begins as the first, then is another predictor's prompt
    width = max(one[0].shape[1], two[0].shape[1])
    ids, mask, labels = (
        torch.cat(
            [functional.pad(part[at], (0, width - part[at].shape[1]), value=filler) for part in (one, two)]
        )
        for at, filler in ((0, PAD), (1, 0), (2, IGNORED))
    )
    cut = prefix.passes(prefix.neighbours(ids, mask, labels), mask.sum(dim=1).tolist())
    assert [(each.start, each.end) for each in cut] == [(0, 4), (4, 8)]
    assert [each.shared for each in cut] == [159, 149]
    plain = reference(model, ids, mask, labels)
    expected = gradients(model, plain)
    loss = prefix.loss_sum(model, ids, mask, labels) / (labels != IGNORED).sum()
    found = gradients(model, loss)
    torch.testing.assert_close(loss, plain, atol=1e-12, rtol=1e-12)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-6)


def test_one_long_row_does_not_pad_the_others() -> None:
    assert prefix.passes([0, 0, 0], [50, 50, 50, 900]) == [(0, 3, 0), (3, 4, 0)]
    assert prefix.passes([30, 30, 30], [50, 50, 50, 60]) == [(0, 4, 30)]
    assert prefix.passes([], [50]) == [(0, 1, 0)]


def test_many_logits_are_made_in_pieces_with_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family("llama")
    ids, mask, labels = make_batch(40, [12, 30, 7])
    expected = gradients(model, prefix.loss_sum(model, ids, mask, labels))
    monkeypatch.setattr(prefix, "SMALL_LOGITS", 0)
    found = gradients(model, prefix.loss_sum(model, ids, mask, labels))
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("small", [0, prefix.SMALL_LOGITS])
def test_half_precision_by_autocast(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(prefix, "SMALL_LOGITS", small)
    model = make_family("llama").float()
    ids, mask, labels = make_batch(40, [12, 30, 7])
    exact = prefix.loss_sum(model, ids, mask, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = prefix.loss_sum(model, ids, mask, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0, rtol=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [False, True])
def test_on_cuda_the_gradients_are_those_of_the_plain_computation(recomputed: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model = make_family("llama", "sdpa").float().cuda()
    ids, mask, labels = (each.cuda() for each in make_batch(40, [12, 30, 7]))
    expected = gradients(model, reference(model, ids, mask, labels))
    if recomputed:
        prefix.checkpoint_layers(model)
    found = gradients(model, prefix.loss_sum(model, ids, mask, labels) / (labels != IGNORED).sum())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-4, rtol=1e-3)


def test_a_longrope_prefix_is_not_shared_where_the_rotation_turns_over() -> None:
    """Beyond the original length all keys turn in another way, those of the prefix too."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 60,
    }
    model = make_family("phi3", rope_parameters=rope, original_max_position_embeddings=60)
    assert prefix.supports(model)
    for shared, suffixes in ((40, [12, 18, 7]), (40, [12, 30, 7])):  # up to the limit, and beyond
        batch = make_batch(shared, suffixes)
        plain = reference(model, *batch)
        loss = prefix.loss_sum(model, *batch) / (batch[2] != IGNORED).sum()
        torch.testing.assert_close(loss, plain, atol=1e-12, rtol=1e-12)


def test_the_loss_is_reached_through_an_adapter_and_answers_stay_as_they_were() -> None:
    model = make_family("llama")
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids, mask, labels = make_batch(40, [12, 30, 7])
    before = wrapped(input_ids=ids, attention_mask=mask).logits
    summed = prefix.loss_sum(model, ids, mask, labels)
    prefix.install(model, prefix.loss_sum)
    assert torch.equal(wrapped(input_ids=ids, attention_mask=mask, labels=labels).loss, summed)
    assert torch.equal(wrapped(input_ids=ids, attention_mask=mask).logits, before)


def test_neighbours_stop_before_the_token_that_predicts_the_first_label() -> None:
    ids = torch.tensor([[7, 8, 9, 1, 5], [7, 8, 9, 2, 5]])
    mask = torch.ones_like(ids)
    none = torch.full_like(ids, IGNORED)
    assert prefix.neighbours(ids, mask, none) == [2]
    labels = none.clone()
    labels[0, 2] = 9
    assert prefix.neighbours(ids, mask, labels) == [1]
    labels[0, 0] = 7
    assert prefix.neighbours(ids, mask, labels) == [0]
    mask[:, 2:] = 0  # equal padding is nothing to share
    assert prefix.neighbours(ids, mask, none) == [1]


def test_only_what_is_exact_is_supported() -> None:
    assert prefix.supports(make_family("gemma2"))
    refused = [
        make_family("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        make_family("gemma3_text", use_bidirectional_attention=True),
    ]
    assert not any(prefix.supports(model) for model in refused)
    model = make_family("llama")
    model.config.model_type = "cohere"  # scales its logits
    assert not prefix.supports(model)
    model = make_family("llama")
    model.config._attn_implementation = "flash_attention_2"  # takes right padding for left beside a cache
    assert not prefix.supports(model)

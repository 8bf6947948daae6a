"""The soft prompt: learned alone, baked in as tokens that are never said, served like any model."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_run import conversations, tiny_run
from tests.trainer.families import bases
from tests.trainer.training.support import curve, prepared
from trainer import child, export, process
from trainer.conversion.check import faults
from trainer.errors import ExportError, TemplateError
from trainer.runs import read_json
from trainer.template import GOLDEN, Template
from trainer.training import base as training_base
from trainer.training import loop, merge, prompt

RECIPE = "epochs: 3, learning_rate: 0.05, eval_steps: 9, prompt_tokens: 6"


def test_the_template_puts_the_tokens_behind_the_beginning_of_text() -> None:
    tokenizer = tiny_tokenizer()
    plain = Template.freeze(tokenizer)
    template = prompt.extend(tokenizer, 3)
    assert template == Template.freeze(tokenizer)
    text = "<|soft_0|><|soft_1|><|soft_2|>"
    for messages in GOLDEN:
        before, after = (each.render(messages, add_generation_prompt=True) for each in (plain, template))
        assert after == plain.bos + text + before.removeprefix(plain.bos)
        ids = template.prompt_ids(tokenizer, messages)
        assert ids[1:4] == tokenizer.convert_tokens_to_ids(prompt.names(3))
        assert [ids[0], *ids[4:]] == plain.prompt_ids(tokenizer, messages)
    assert template.go.count(text) == 2  # in front of a system message, and of a conversation without one


def test_a_template_without_beginning_of_text_gets_them_at_the_start() -> None:
    tokenizer = tiny_tokenizer()
    chatml = "{% for m in messages %}<|start_header_id|>{{ m.role }}\n{{ m.content }}<|eot_id|>\n{% endfor %}"
    tokenizer.chat_template = (
        chatml + "{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
    )
    template = prompt.extend(tokenizer, 2)
    ids = template.prompt_ids(tokenizer, GOLDEN[0])
    assert tokenizer.convert_ids_to_tokens(ids[:4]) == [
        "<|begin_of_text|>",
        "<|soft_0|>",
        "<|soft_1|>",
        "<|start_header_id|>",
    ]


def test_a_base_that_has_such_tokens_is_refused() -> None:
    taken = tiny_tokenizer()
    taken.add_tokens(["<|soft_0|>"])
    with pytest.raises(TemplateError, match=r"has tokens such as <\|soft_0\|> already; a soft .*lora"):
        prompt.extend(taken, 2)


def test_a_chat_format_that_has_no_place_for_them_is_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bases.write("mistral", tmp_path / "base"))
    with pytest.raises(TemplateError, match=r"no place in front of all turns .*; use student.method lora"):
        prompt.extend(tokenizer, 2)


def test_a_template_that_writes_its_beginning_otherwise_or_in_every_turn_carries_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("bos_token", "'<|begin_of_text|>'")
    ids = prompt.extend(tokenizer, 2).prompt_ids(tokenizer, GOLDEN[1])
    assert ids[:3] == tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", *prompt.names(2)])


def test_only_the_vectors_learn_and_other_tokens_keep_their_embeddings() -> None:
    model: Any = tiny_model(tiny_tokenizer())
    ids = torch.tensor([[3, 5, 7, 11]])
    before = model(input_ids=ids).logits
    first = model.config.vocab_size
    prompt.attach(model, {"first": first, "count": 4}, seed=1)
    assert torch.equal(model(input_ids=ids).logits, before)
    model(input_ids=torch.tensor([[3, first, first + 3, 5]])).logits.sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert list(gradients) == ["model.embed_tokens.vectors"]
    used = gradients["model.embed_tokens.vectors"].abs().sum(dim=1) > 0
    assert used.tolist() == [True, False, False, True]


def test_baked_in_the_tokens_act_alike_and_cannot_be_said() -> None:
    model: Any = tiny_model(tiny_tokenizer())
    first = model.config.vocab_size
    prompt.attach(model, {"first": first, "count": 4}, seed=1)
    vectors = torch.randn(4, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    prompt.learned(model).data.copy_(vectors)
    ids = torch.tensor([[3, *range(first, first + 4), 5, 7, 11]])
    with torch.no_grad():
        attached = model(input_ids=ids).logits
        plain: Any = tiny_model(tiny_tokenizer())
        prompt.bake(plain, vectors, first)
        baked = plain(input_ids=ids).logits
    assert torch.allclose(baked[..., :first], attached, atol=1e-5)
    added = baked[..., first:]
    assert torch.allclose(added, baked[..., :first].mean(dim=-1, keepdim=True).expand_as(added), atol=1e-4)
    assert (added < baked[..., :first].max(dim=-1, keepdim=True).values).all()
    assert (baked.softmax(dim=-1)[..., first:] <= 1 / first + 1e-6).all()


def test_training_learns_and_checkpoints_hold_the_vectors_alone(tmp_path: Path) -> None:
    spec, work = prepared(tiny_run(tmp_path, method="prompt", train=RECIPE))
    result = loop.train(spec, work)
    assert result["trainable_parameters"] == 6 * 64
    losses = [loss for _, loss in curve(work)]
    assert losses[-1] < losses[0] - 0.3
    last = work / "checkpoints" / "checkpoint-27"
    assert (last / prompt.FILE).stat().st_size < 4_000
    assert not (last / "model.safetensors").exists()


def test_the_model_folder_is_an_ordinary_model(tmp_path: Path) -> None:
    spec, work = prepared(tiny_run(tmp_path, method="prompt", train=RECIPE))
    loop.train(spec, work)
    model = work / "merged"
    merge.merge(spec, work / "prompt", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = Template.freeze(tokenizer)
    assert template == Template.from_json(spec["template"])
    merged: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    ids = template.prompt_ids(tokenizer, conversations(1)[0]["messages"])
    assert ids[1:7] == tokenizer.convert_tokens_to_ids(prompt.names(6))
    vocabulary = read_json(model / "config.json")["vocab_size"]
    assert len(merged.model.embed_tokens.weight) == vocabulary == max(ids[1:7]) + 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-2", "phi-3", "qwen-3"])
def test_every_kind_of_tokenizer_is_read_alike_behind_the_soft_prompt(tmp_path: Path, family: str) -> None:
    """SentencePiece and BPE, with and without a beginning-of-text token: the GGUF's tokens and logits."""
    from llama_cpp import Llama

    try:
        converter = export.converter({})
    except ExportError as error:
        pytest.skip(str(error))
    base, model = bases.write(family, tmp_path / "base"), tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = prompt.extend(tokenizer, 3)
    prompt.write_tokenizer(tokenizer, base, tmp_path / "tokenizer")
    first = tokenizer.convert_tokens_to_ids(prompt.names(1)[0])
    baked: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prompt.bake(baked, torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), first)
    baked.to(torch.float16).save_pretrained(model)
    training_base.complete(model, base, template, tmp_path / "tokenizer")
    words = process.module("trainer.conversion.convert", converter, model, tmp_path / "f16.gguf")
    assert child.run(words, folder=tmp_path, log=tmp_path / "log", environment=child.environment({})) == 0
    assert faults(tmp_path / "f16.gguf", model, template) == []
    ids = template.prompt_ids(AutoTokenizer.from_pretrained(model), GOLDEN[1])
    text = template.render(GOLDEN[1], add_generation_prompt=True)
    weights: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = weights(input_ids=torch.tensor([ids])).logits[0].numpy()
    with closing(Llama(str(tmp_path / "f16.gguf"), n_ctx=256, logits_all=True, verbose=False)) as served:
        assert served.tokenize(text.encode(), add_bos=False, special=True) == ids
        served.eval(ids)
        assert abs(served.scores[: len(ids), : expected.shape[1]] - expected).max() < 0.02

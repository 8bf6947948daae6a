"""T5 from data to an answer: made to hold a conversation, trained, merged, converted, proven equal, asked."""

from __future__ import annotations

import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from serve.confidence import Field, LocalAnswer, features
from serve.errors import ApiError
from serve.runtime.generation import Generator, Sampling
from tests.tiny_run import conversations
from tests.trainer.families import encoder_decoders, stages
from trainer import export, register
from trainer.conversion.check import faults
from trainer.runs import read_json
from trainer.runtimes.choice import EmbeddedRuntime
from trainer.runtimes.local import Chat, recorded
from trainer.runtimes.parity import Tokens, Vocabulary
from trainer.template import GOLDEN, Template

WITHIN = {"f16": 0.03, "q8_0": 0.5}
"""How far logits may lie from those of the weights; a head at another scale is off by tens."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("needs_the_converter", "one_thread")]


def computed(gguf: Path, prompt: list[int], decoder: list[int]) -> Any:
    """Logits [tokens, vocabulary] of the decoder's tokens, by llama.cpp."""
    import llama_cpp

    with closing(llama_cpp.Llama(str(gguf), n_ctx=512, n_batch=512, n_threads=1, verbose=False)) as served:
        tokens = (llama_cpp.llama_token * len(prompt))(*prompt)
        assert llama_cpp.llama_encode(served.ctx, llama_cpp.llama_batch_get_one(tokens, len(prompt))) == 0
        found = []
        for token in decoder:
            served.eval([token])
            pointer = llama_cpp.llama_get_logits_ith(served.ctx, -1)
            found.append(np.ctypeslib.as_array(pointer, (served.n_vocab(),)).copy())
    return np.stack(found)


def computes_as_trained(model: Path, gguf: Path, tokens: Tokens) -> None:
    prompt = tokens.ids(conversations(9)[8]["messages"])
    decoder = [0, *prompt[:8]]
    weights: Any = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        asked = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([decoder])}
        expected = weights(**asked).logits[0].numpy()
    for quantization in ("f16", "q8_0", "q4_k_m"):
        file = gguf if quantization == "f16" else stages.quantised(gguf, quantization)
        assert faults(file, model, tokens.template) == []
        apart = np.abs(computed(file, prompt, decoder) - expected).max()
        assert apart < WITHIN.get(quantization, np.inf)


def test_an_adapter_beside_its_base_answers_as_the_merged_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stages.STUDENT, "deliver", "adapter")
    run = stages.curated(tmp_path, partial(encoder_decoders.write, encoder_decoders.FLAN))
    model = stages.train(run)
    shutil.copytree(run.stage("train") / "work" / "adapter", run.stage("train") / "adapter")
    export.run(run)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with closing(Vocabulary(run.stage("export") / "base.gguf")) as vocabulary:
        tokens = Tokens(tokenizer, Template.freeze(tokenizer), vocabulary, 512)
        stages.answer_with_16_bits(run, model, tokens)
    register.run(run)
    parity = read_json(run.stage("register") / "parity.json")
    assert (parity["fault"], parity["answers_equal"]) == (None, 1.0)


def tells_each_token_as_it_stands_in_the_answer(gguf: Path) -> None:
    """Confidence finds a field's tokens by their texts, which together are the answer's."""
    generator = Generator.load(gguf, 512, 1)
    text = "[[ ## label ## ]]\nred\n\n[[ ## size ## ]]\nlarge\n\n[[ ## completed ## ]]"
    said, entries = b"", []
    for token in generator._llama.tokenize(text.encode(), add_bos=False, special=True):
        piece = generator._said(token, said)
        named = {"token": piece.decode(), "bytes": list(piece), "logprob": -0.1}
        entries.append({**named, "top_logprobs": [named]})
        said += piece
    assert said.decode() == text
    fields = [Field("label", ("red", "blue")), Field("size", ("large", "small"))]
    found = features(LocalAnswer(text, entries, "stop", 9, ""), fields, None)
    assert found["unaligned"] == 0
    assert found["label.label"] > 5
    assert found["size.label"] > 5


def fills_the_context(gguf: Path) -> None:
    """llama.cpp rounds a context of 300 up to 512, and ends the process where a prompt outgrows its batch."""
    generator = Generator.load(gguf, 300, 1)
    longest = [{"role": "user", "content": "red " * 100}]
    one = len(generator.render(longest)[1]) / 100
    longest[0]["content"] = "red " * int(500 / one)
    assert 300 < len(generator.render(longest)[1]) < 512
    assert generator.answer(longest, Sampling(max_tokens=2), lambda: False).completion_tokens <= 2
    longest[0]["content"] *= 2
    with pytest.raises(ApiError, match="the context holds 512"):
        generator.answer(longest, Sampling(max_tokens=2), lambda: False)


@pytest.mark.parametrize("name", [encoder_decoders.FIRST, encoder_decoders.FLAN])
def test_from_data_to_an_answer(tmp_path: Path, name: str) -> None:
    run = stages.curated(tmp_path, partial(encoder_decoders.write, name))
    model = stages.train(run)
    export.run(run)
    tokenizer, gguf = AutoTokenizer.from_pretrained(model), run.stage("export") / "model.gguf"
    with closing(Vocabulary(gguf)) as vocabulary:
        tokens = Tokens(tokenizer, Template.freeze(tokenizer), vocabulary, 512)
        assert tokens.training([*conversations(40), *stages.STRANGE]) > 1000
        tokens.embedded_template()
        computes_as_trained(model, gguf, tokens)
        fills_the_context(gguf)
        tells_each_token_as_it_stands_in_the_answer(gguf)
        stages.answer_with_16_bits(run, model, tokens)
        register.run(run)
        parity = read_json(run.stage("register") / "parity.json")
        assert parity["fault"] is None
        assert parity["prompt_tokens_equal"] is True
        assert parity["answers_equal"] == 1.0, parity["evidence"]
        written, runtime = recorded(run.folder), EmbeddedRuntime()
        with runtime.serving(written["model"]) as endpoint:
            for talk in GOLDEN:
                asked = [{**message, "content": message["content"].strip()} for message in talk]
                tokens.served(asked, runtime.render(endpoint, asked))
            first, _, again = (Chat().ask(endpoint, stages.messages(n), max_tokens=32) for n in (40, 41, 40))
    assert first.text.strip()
    assert first.logprobs
    assert (again.text, again.logprobs) == (first.text, first.logprobs), "whatever was asked in between"

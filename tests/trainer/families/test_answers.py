"""Every family from data to an answer: trained, merged, converted, quantised, proven equal, asked."""

from __future__ import annotations

import json
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_run import conversations
from tests.trainer.families import bases, stages
from trainer import export, register
from trainer.conversion.check import faults
from trainer.conversion.families import attention
from trainer.errors import RegisterError
from trainer.runs import read_json
from trainer.runtimes.choice import EmbeddedRuntime
from trainer.runtimes.local import Chat, recorded
from trainer.runtimes.parity import Tokens, Vocabulary
from trainer.template import GOLDEN, Template

WITHIN = {"f16": 0.03, "q8_0": 0.5}
"""How far logits may lie from those of the weights, whose standard deviation is 0.8; measured are 0.013 and 0.28."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("needs_the_converter", "one_thread")]


def reads_as_trained(tokens: Tokens, name: str) -> None:
    """The GGUF's tokenizer makes the training's ids of strange texts too."""
    assert tokens.training([*conversations(40), *stages.STRANGE]) > 1000
    tokens.embedded_template()
    if name.startswith("qwen"):
        with pytest.raises(RegisterError, match="bring the task's data to Unicode's form C"):
            tokens.training([{"messages": GOLDEN[0], "completion": "e\u0301"}])


def computes_as_trained(model: Path, gguf: Path, tokens: Tokens) -> None:
    """Logits of the quantised files against those of the merged weights; what serving needs is in every file."""
    from llama_cpp import Llama

    ids = tokens.ids(conversations(9)[8]["messages"])
    assert len(ids) > 32, "longer than the sliding windows"
    kind = attention(json.loads((model / "config.json").read_text())["model_type"])
    weights: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=kind)
    with torch.no_grad():
        expected = weights(input_ids=torch.tensor([ids])).logits[0].numpy()
    for quantization in ("f16", "q8_0", "q4_k_m"):
        file = gguf if quantization == "f16" else stages.quantised(gguf, quantization)
        assert faults(file, model, tokens.template) == []
        with closing(Llama(str(file), n_ctx=512, n_threads=1, logits_all=True, verbose=False)) as served:
            served.eval(ids)
            apart = np.abs(served.scores[: len(ids)] - expected).max()
            assert apart < WITHIN.get(quantization, np.inf)


@pytest.mark.parametrize("name", ["llama-3", *bases.FAMILIES])
def test_from_data_to_an_answer(tmp_path: Path, name: str) -> None:
    run = stages.curated(tmp_path, partial(bases.write, name))
    model = stages.train(run)
    export.run(run)
    tokenizer, gguf = AutoTokenizer.from_pretrained(model), run.stage("export") / "model.gguf"
    with closing(Vocabulary(gguf)) as vocabulary:
        tokens = Tokens(tokenizer, Template.freeze(tokenizer), vocabulary, 512)
        reads_as_trained(tokens, name)
        computes_as_trained(model, gguf, tokens)
        stages.answer_with_16_bits(run, model, tokens)
        register.run(run)
        parity = read_json(run.stage("register") / "parity.json")
        assert parity["fault"] is None
        assert parity["prompt_tokens_equal"] is True
        assert parity["evidence"]["tokens"]["conversations"] == 24
        assert parity["evidence"]["answers"]["n"] == len(stages.HELD_OUT)
        assert parity["answers_equal"] == 1.0, parity["evidence"]
        written, runtime = recorded(run.folder), EmbeddedRuntime()
        with runtime.serving(written["model"]) as endpoint:
            for talk in GOLDEN:  # with earlier answers in them, and without a system message
                asked = [{**message, "content": message["content"].strip()} for message in talk]
                tokens.served(asked, runtime.render(endpoint, asked))
            reply = Chat().ask(endpoint, stages.messages(40), max_tokens=8)
    assert reply.complete
    assert reply.text.strip()
    assert reply.logprobs

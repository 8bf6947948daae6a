"""Every family from data to an answer: trained, merged, converted, quantised, proven equal, asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tasks import row, write_task
from tests.tiny_run import conversations
from tests.trainer.families import bases
from trainer import child, export, prepare, process, program, register, task
from trainer.conversion.check import faults
from trainer.conversion.families import attention
from trainer.data import example_id
from trainer.errors import ExportError, RegisterError
from trainer.runs import Home, Run, read_json, write_json, write_jsonl
from trainer.runtimes import sixteen_bit
from trainer.runtimes.choice import EmbeddedRuntime
from trainer.runtimes.local import Chat, Registration
from trainer.runtimes.parity import Tokens, Vocabulary
from trainer.template import GOLDEN, Template
from trainer.traces import Answer, Store
from trainer.training import loop, merge

SYSTEM = "Your input fields are: `text` (str). Your output fields are: `label` (str)."
STUDENT = {
    "base": "./base",
    "quantize": "f16",
    "context": 512,
    "max_tokens": 12,
    "train": {"epochs": 4, "batch_size": 4, "accumulation": 1, "learning_rate": 0.01, "eval_steps": 100},
}
STRANGE = [{"messages": talk, "completion": '  {"a": "é \U0001f999 1234"}\n'} for talk in GOLDEN]
WITHIN = {"f16": 0.03, "q8_0": 0.5}
"""How far logits may lie from those of the weights, whose standard deviation is 0.8; measured are 0.013 and 0.28."""
HELD_OUT = sorted(range(30, 36), key=lambda number: example_id(row(number), ["text"]))
"""In the order in which register asks for their answers."""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def needs_the_converter() -> None:
    try:
        export.converter({})
    except ExportError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def messages(number: int) -> list[dict[str, str]]:
    text = f"[[ ## text ## ]]\n{row(number)['text']}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def answer(number: int) -> str:
    return f"[[ ## label ## ]]\n{row(number)['label']}\n\n[[ ## completed ## ]]"


def curated(root: Path, name: str) -> Run:
    """A run of the words task on the family's base, as curate leaves it."""
    folder = write_task(root / "task", student=STUDENT)
    bases.write(name, folder / "base")
    home, loaded = Home(root / "home"), task.load(folder)
    home.root.mkdir()
    environment = {"OMP_NUM_THREADS": "1"}
    run = Run(loaded, home, Store.open(home.database_url), home.runs("words") / "r", environment=environment)
    captured = {"program": "p", "teacher": "t", "system": "teacher"}
    write_json(run.stage("capture") / "summary.json", captured)
    write_json(run.stage("capture") / "program.json", program.load(loaded).state)
    write_jsonl(
        run.stage("curate") / "train.jsonl",
        [
            {"messages": messages(n), "completion": answer(n), "example": str(n), "predictor": "sort"}
            for n in range(24)
        ],
    )
    identities = {n: example_id(row(n), ["text"]) for n in HELD_OUT}
    write_jsonl(
        run.stage("curate") / "calibrate.jsonl",
        [{"id": identity, "values": row(n)} for n, identity in identities.items()],
    )
    for n, identity in identities.items():
        call = {"predictor": "sort", "messages": messages(n), "completion": answer(n)}
        run.store.add_answer(
            Answer("teacher", identity, "teacher", "words", {}, 1.0, 1.0, 1, 1, 0.0, None, [call])
        )
    return run


def train(run: Run) -> Path:
    """What the train stage has two processes do, whose imports would take most of these tests' time."""
    work = run.stage("train") / "work"
    work.mkdir()
    spec = prepare.prepare(run, {}).spec
    loop.train(spec, work)
    merge.merge(spec, work / "adapter", work.parent / "model")
    return work.parent / "model"


def answer_with_16_bits(run: Run, model: Path, tokens: Tokens) -> None:
    """The answers that register compares with, for the same reason in this process."""
    request = {
        "model": str(model),
        "prompts": [tokens.ids(messages(n)) for n in HELD_OUT],
        "max_tokens": STUDENT["max_tokens"],
        "ends": [tokens.tokenizer.convert_tokens_to_ids(text) for text in tokens.template.stop],
        "pad": 0,
        "batch": 8,
    }
    write_json(run.stage("register") / "sixteen_bit.json", sixteen_bit.answers(request))


def reads_as_trained(tokens: Tokens, name: str) -> None:
    """The GGUF's tokenizer makes the training's ids of strange texts too."""
    assert tokens.training([*conversations(40), *STRANGE]) > 1000
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
        file = gguf if quantization == "f16" else quantised(gguf, quantization)
        assert faults(file, model, tokens.template) == []
        with closing(Llama(str(file), n_ctx=512, n_threads=1, logits_all=True, verbose=False)) as served:
            served.eval(ids)
            apart = np.abs(served.scores[: len(ids)] - expected).max()
            assert apart < WITHIN.get(quantization, np.inf)


def quantised(gguf: Path, kind: str) -> Path:
    folder, out = gguf.parent, gguf.with_name(f"{kind}.gguf")
    words = process.module("trainer.conversion.quantise", gguf, out, kind)
    log = folder / "log"
    assert child.run(words, folder=folder, log=log, environment=child.environment({})) == 0, log.read_text()
    return out


@pytest.mark.parametrize("name", ["llama-3", *bases.FAMILIES])
def test_from_data_to_an_answer(tmp_path: Path, name: str) -> None:
    run = curated(tmp_path, name)
    model = train(run)
    export.run(run)
    tokenizer, gguf = AutoTokenizer.from_pretrained(model), run.stage("export") / "model.gguf"
    with closing(Vocabulary(gguf)) as vocabulary:
        tokens = Tokens(tokenizer, Template.freeze(tokenizer), vocabulary, 512)
        reads_as_trained(tokens, name)
        computes_as_trained(model, gguf, tokens)
        answer_with_16_bits(run, model, tokens)
        register.run(run)
        parity = read_json(run.stage("register") / "parity.json")
        assert parity["fault"] is None
        assert parity["prompt_tokens_equal"] is True
        assert parity["evidence"]["tokens"]["conversations"] == 24
        assert parity["evidence"]["answers"]["n"] == len(HELD_OUT)
        assert parity["answers_equal"] == 1.0, parity["evidence"]
        written, runtime = read_json(run.stage("register") / "registration.json"), EmbeddedRuntime()
        with runtime.serving(Registration.from_json(written["model"])) as endpoint:
            for talk in GOLDEN:  # with earlier answers in them, and without a system message
                asked = [{**message, "content": message["content"].strip()} for message in talk]
                tokens.served(asked, runtime.render(endpoint, asked))
            reply = Chat().ask(endpoint, messages(40), max_tokens=8)
    assert reply.complete
    assert reply.text.strip()
    assert reply.logprobs

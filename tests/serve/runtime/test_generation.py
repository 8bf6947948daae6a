"""The same prompt gives the same log-probabilities, whatever was asked before."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.runtime.generation import BLOCK, Generator, Sampling
from tests.contract import files
from tests.tiny import tiny_model, tiny_tokenizer

GREEDY = Sampling(max_tokens=12, temperature=0.0, logprobs=True, top_logprobs=3)
SYSTEM = "Answer the ticket with one label. " * 12  # more than two blocks, the same in every prompt
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, hidden=256, layers=4)
    return files.llama(tmp_path_factory.mktemp("model") / "model.gguf", model, tokenizer, TEMPLATE)


def conversation(number: int) -> list[dict[str, str]]:
    tail = "the printer is broken " * (number % 5 + 1) + f"ticket {number}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": tail}]


def logprobs(generator: Generator, number: int) -> list[float]:
    answer = generator.answer(conversation(number), GREEDY, lambda: False)
    assert answer.tokens
    return [token["logprob"] for token in answer.tokens]


def test_what_was_asked_before_does_not_change_an_answer(gguf: Path) -> None:
    busy = Generator.load(gguf, 1024, 1)
    assert len(busy.render(conversation(0))[1]) > 2 * BLOCK
    order = [0, 1, 2, 0, 7, 7, 3, 1, 0]
    seen = [(number, logprobs(busy, number)) for number in order]
    for number, found in seen:
        fresh = Generator.load(gguf, 1024, 1)
        assert logprobs(fresh, number) == found


def test_an_interrupted_answer_leaves_no_trace(gguf: Path) -> None:
    generator = Generator.load(gguf, 1024, 1)
    expected = logprobs(generator, 3)
    generator.answer(conversation(4), GREEDY, lambda: True)
    assert logprobs(generator, 3) == expected

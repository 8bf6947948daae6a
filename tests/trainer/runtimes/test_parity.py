"""Parity finds a changed tokenizer, template, number of starts, or answers that got worse."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from serve.runtime.embedded import Endpoint
from tests.contract import files
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.errors import RegisterError
from trainer.runtimes.local import Chat, Rendered
from trainer.runtimes.parity import (
    Answered,
    Parity,
    Prompt,
    Tokens,
    Vocabulary,
    ask_all,
    compare_answers,
    difference,
    equal_share,
    token_difference,
)
from trainer.template import Template

TALK = [
    {"role": "system", "content": "Your input fields are: `text` (str)."},
    {"role": "user", "content": "[[ ## text ## ]]\nDie Rechnung über 1.234 € {{ \U0001f999 }}"},
]
COMPLETION = "[[ ## label ## ]]\nbilling\n\n[[ ## completed ## ]]"
ROW = {"messages": TALK, "completion": COMPLETION}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def template(tokenizer: PreTrainedTokenizerFast) -> Template:
    return Template.freeze(tokenizer)


@pytest.fixture(scope="module")
def gguf(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, template: Template
) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return files.llama(path, tiny_model(tokenizer, hidden=32, layers=1), tokenizer, template.jinja)


@pytest.fixture
def tokens(gguf: Path, tokenizer: PreTrainedTokenizerFast, template: Template) -> Iterator[Tokens]:
    with closing(Vocabulary(gguf)) as vocabulary:
        yield Tokens(tokenizer, template, vocabulary, context=512)


class TestTokens:
    def test_training_text_is_the_same_to_both_tokenizers(self, tokens: Tokens) -> None:
        ids, _ = tokens.template.encode(tokens.tokenizer, TALK, COMPLETION)
        assert tokens.training([ROW]) == len(ids)

    def test_a_changed_tokenizer_is_named_with_its_place(self, tokens: Tokens) -> None:
        other = tiny_tokenizer()
        other.backend_tokenizer.normalizer = normalizers.Lowercase()
        with pytest.raises(RegisterError, match=r"other tokens of a prompt than training: token \d+, after "):
            replace(tokens, tokenizer=other).training([ROW])

    def test_what_each_kind_of_server_shows(self, tokens: Tokens) -> None:
        ids = tokens.ids(TALK)
        text = tokens.template.render(TALK, add_generation_prompt=True)
        tokens.served(TALK, Rendered(tokens=ids))
        tokens.served(TALK, Rendered(text=text.removeprefix(tokens.template.bos)))
        tokens.served(TALK, Rendered(count=len(ids)))

    def test_a_start_that_is_written_and_added_is_counted(self, tokens: Tokens) -> None:
        text = tokens.template.render(TALK, add_generation_prompt=True)
        with pytest.raises(
            RegisterError, match=r"the server puts 2 beginning-of-text tokens .* training had 1"
        ):
            tokens.served(TALK, Rendered(text=text))

    def test_a_missing_start_is_counted(self, tokens: Tokens) -> None:
        with pytest.raises(RegisterError, match="the server puts 0 beginning-of-text tokens"):
            tokens.served(TALK, Rendered(tokens=tokens.ids(TALK)[1:]))

    def test_another_template_is_shown_around_the_difference(self, tokens: Tokens) -> None:
        text = tokens.template.render(TALK, add_generation_prompt=True).removeprefix(tokens.template.bos)
        with pytest.raises(RegisterError, match=r"at character \d+ trained '.*user.*', served '.*USER"):
            tokens.served(TALK, Rendered(text=text.replace("user", "USER")))

    def test_another_number_of_tokens(self, tokens: Tokens) -> None:
        with pytest.raises(RegisterError, match="renders another chat template"):
            tokens.served(TALK, Rendered(count=3))

    def test_the_template_in_the_gguf(self, tokens: Tokens) -> None:
        tokens.embedded_template()
        other = replace(tokens, template=replace(tokens.template, jinja=tokens.template.jinja + "{# more #}"))
        with pytest.raises(RegisterError, match="the GGUF's chat template differs from the trained one"):
            other.embedded_template()

    def test_a_prompt_that_does_not_fit(self, tokens: Tokens) -> None:
        count = len(tokens.ids(TALK))
        with pytest.raises(
            RegisterError, match=f"has {count} tokens, the runtime holds {count}; raise student.context"
        ):
            replace(tokens, context=count).ids(TALK)


def test_a_vocabulary_needs_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF nothing")
    with pytest.raises(RegisterError, match="cannot be loaded"):
        Vocabulary(path)


def test_differences_point_at_the_first_place() -> None:
    assert difference("abcdef", "abXdef") == "at character 2 trained 'abcdef', served 'abXdef'"
    assert difference("abc", "abcd").startswith("at character 3")
    assert (
        token_difference([1, 2, 3], [1, 9, 3], str)
        == "token 1, after '[1]', is [2, 3] in training and [9, 3] here"
    )


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"e{number:02}", "predict", TALK) for number in range(count)]


def right(_: Prompt, text: str) -> float:
    return float(text == "right")


class TestAnswers:
    def compare(self, trained: Sequence[str | None], served: Sequence[str | None]) -> Parity:
        parity = Parity()
        compare_answers(parity, prompts(len(trained)), Answered(trained), Answered(served), right)
        return parity

    def test_equal_answers(self) -> None:
        parity = self.compare(["right", "wrong"], ["right\n", "wrong"])
        assert (parity.answers_equal, parity.metric_delta) == (1.0, -0.5), (
            "the metric reads the text as it came"
        )

    def test_other_answers_that_are_no_worse(self) -> None:
        parity = self.compare(["right", "wrong"], ["right", "bad"])
        assert (parity.answers_equal, parity.metric_delta) == (0.5, 0.0)
        assert parity.evidence["answers"]["differing"] == [
            {"example": "e01", "trained": "wrong", "served": "bad"}
        ]

    def test_one_example_more_or_less_is_no_evidence(self) -> None:
        parity = self.compare(["right"] * 50, ["right"] * 49 + ["wrong"])
        assert parity.metric_delta == pytest.approx(-0.02)

    def test_two_examples_in_fifty_block(self) -> None:
        with pytest.raises(
            RegisterError, match=r"scores 0\.960 where the trained weights score 1\.000 on 50"
        ) as caught:
            self.compare(["right"] * 50, ["right"] * 48 + ["wrong"] * 2)
        assert "example e48: at character 0 trained 'right', served 'wrong'" in str(caught.value)

    def test_a_drop_within_the_allowance(self) -> None:
        parity = self.compare(["right"] * 300, ["right"] * 297 + ["wrong"] * 3)
        assert parity.metric_delta == pytest.approx(-0.01)

    def test_broken_off_answers_are_wrong_and_equal_to_nothing(self) -> None:
        with pytest.raises(RegisterError):
            self.compare(["right", "right"], [None, None])
        assert equal_share(Answered([None]), Answered([None])) == 0.0

    def test_without_a_judge_only_equality_counts(self) -> None:
        parity = Parity()
        compare_answers(parity, prompts(2), Answered(["a", "b"]), Answered(["a", "c"]), None)
        assert (parity.answers_equal, parity.metric_delta) == (0.5, None)


def test_asking_is_greedy_and_notes_what_broke_off() -> None:
    bodies = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        reason = "stop" if len(bodies) == 1 else None
        choice = {"message": {"content": "text"}, "finish_reason": reason}
        return httpx.Response(200, json={"choices": [choice], "usage": {"prompt_tokens": 7}})

    answered = ask_all(
        Chat(httpx.MockTransport(answer)), Endpoint("http://x/v1", "m"), prompts(2), max_tokens=9
    )
    assert answered.texts == ["text", None]
    assert {(body["temperature"], body["max_tokens"], body["model"]) for body in bodies} == {(0.0, 9, "m")}

"""The frozen template: no date, one beginning-of-text token, the Go template renders what the Jinja renders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.contract import go_template
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer
from trainer.errors import TemplateError
from trainer.template import GOLDEN, IGNORED, Template

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|start_header_id|>system\nYou help.<|eot_id|>\n{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '\n' + message['content'] + '<|eot_id|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def with_template(text: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def test_the_date_is_gone_and_all_else_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    dated: Any = tokenizer.apply_chat_template(GOLDEN[2], tokenize=False, date_string="01 Jan 2001")
    frozen = Template.freeze(tokenizer).render(GOLDEN[2], add_generation_prompt=False)
    assert frozen == dated.replace("Today Date: 01 Jan 2001\n", "")
    assert frozen.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date"
    )


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, CHATML, CHATML.replace("You help.", "{{ '{{' }}x}}")])
@pytest.mark.parametrize("messages", GOLDEN)
def test_the_go_template_renders_what_the_jinja_renders(source: str, messages: list[dict[str, str]]) -> None:
    template = Template.freeze(with_template(source))
    rendered = template.render(messages, add_generation_prompt=True)
    stripped = [{**message, "content": message["content"].strip()} for message in messages]
    assert template.bos + go_template.render(template.go, stripped) == rendered


def test_stops_and_json(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template.freeze(tokenizer)
    assert template.stop == ["<|eot_id|>"]
    assert Template.from_json({**template.to_json(), "sha256": "x"}) == template
    assert template.sha256 == Template.freeze(tiny_tokenizer()).sha256
    tokenizer.eos_token, before = "<|end_of_text|>", tokenizer.eos_token
    assert Template.freeze(tokenizer).stop == ["<|eot_id|>", "<|end_of_text|>"]
    tokenizer.eos_token = before


def test_only_the_answer_and_its_end_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template.freeze(tokenizer)
    messages = GOLDEN[1]
    ids, labels = template.encode(tokenizer, messages, "  [[ ## label ## ]]\nbilling \n")
    prompt = template.prompt_ids(tokenizer, messages)
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert tokenizer.decode(labels[len(prompt) :]) == "[[ ## label ## ]]\nbilling<|eot_id|>"
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_what_follows_the_end_of_turn_is_not_learned() -> None:
    tokenizer = with_template(CHATML)
    ids, labels = Template.freeze(tokenizer).encode(tokenizer, GOLDEN[0], "yes")
    assert tokenizer.decode(ids[-1:]) == "<|eot_id|>"
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "yes<|eot_id|>"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (CHAT_TEMPLATE.replace("Today Date: ", "On: "), "prints the date"),
        (CHATML.replace("You help.", "It is {{ strftime_now('%Y-%m-%d %H:%M:%S %f') }}."), "prints the date"),
        ("{{ messages[0]['content'] }}", "does not render message by message"),
        (CHATML.replace("'<|eot_id|>'", "'.'"), "which is no special token"),
        ("{{ raise_exception('no system role') }}", "no system role"),
    ],
)
def test_a_template_that_cannot_be_frozen_is_an_error_with_a_remedy(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(message)):
        Template.freeze(with_template(source))


def test_a_base_without_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="use an instruct model"):
        Template.freeze(tokenizer)


def test_a_second_beginning_of_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template.freeze(tokenizer)
    with pytest.raises(TemplateError, match="2 beginning-of-text tokens"):
        template.prompt_ids(tokenizer, [{"role": "user", "content": "<|begin_of_text|>"}])


def test_a_saved_tokenizer_freezes_to_the_same_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert Template.freeze(AutoTokenizer.from_pretrained(tmp_path)) == Template.freeze(tokenizer)

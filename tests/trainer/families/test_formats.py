"""Every family's chat format frozen: the Go template says the same, and so do the training tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.contract import go_template
from tests.trainer.families import bases
from tests.trainer.families.templates import GEMMA2, GEMMA3
from trainer.conversion.tokenizers import Facts, facts
from trainer.errors import TemplateError
from trainer.template import BOS_WRITTEN, GOLDEN, IGNORED, SYSTEM_FOLDED, THINKING_OFF, Template

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
LONGER = [*TALK, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Bye"}]
PROMPTS = {
    "llama-2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Ho </s><s>[INST] Bye [/INST]",
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\nHi[/INST]",
        "<s>[INST] Hi[/INST] Ho</s>[INST] Be brief.\n\nBye[/INST]",
    ),
    "mistral-nemo": (
        "<s>[INST]Be brief.\n\nHi[/INST]",
        "<s>[INST]Hi[/INST]Ho</s>[INST]Be brief.\n\nBye[/INST]",
    ),
    "qwen-2.5": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "Ho<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen-3": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "Ho<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHo<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n",
    ),
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Ho<|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
    ),
    "phi-4-mini": (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>",
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Ho<|end|><|user|>Bye<|end|><|assistant|>",
    ),
    "gemma-2": (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    ),
}
PROMPTS["gemma-3"] = PROMPTS["gemma-2"]
ANSWERS = {"llama-2": " Yes </s>", "mistral": " Yes</s>", "mistral-nemo": "Yes</s>"} | dict.fromkeys(
    ("qwen-2.5", "qwen-3", "phi-4"), "Yes<|im_end|>"
)
ANSWERS |= dict.fromkeys(("phi-3", "phi-4-mini"), "Yes<|end|>")
ANSWERS |= dict.fromkeys(("gemma-2", "gemma-3"), "Yes<end_of_turn>")
FACTS = {
    "llama-2": Facts(None, adds_bos=True, adds_space=False, strips_behind_special=False),
    "mistral": Facts(None, adds_bos=True, adds_space=True, strips_behind_special=False),
    "mistral-nemo": Facts("tekken", adds_bos=True, adds_space=None, strips_behind_special=False),
    "qwen-2.5": Facts("qwen2", adds_bos=False, adds_space=None, strips_behind_special=False),
    "qwen-3": Facts("qwen2", adds_bos=False, adds_space=None, strips_behind_special=False),
    "phi-3": Facts(None, adds_bos=False, adds_space=True, strips_behind_special=True),
    "phi-4": Facts("dbrx", adds_bos=False, adds_space=None, strips_behind_special=False),
    "phi-4-mini": Facts("gpt-4o", adds_bos=False, adds_space=None, strips_behind_special=False),
    "gemma-2": Facts(None, adds_bos=True, adds_space=False, strips_behind_special=False),
    "gemma-3": Facts(None, adds_bos=True, adds_space=False, strips_behind_special=False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers and configurations, without weights."""
    root = tmp_path_factory.mktemp("formats")
    for name, family in bases.FAMILIES.items():
        family.describe(root / name)
    return {name: root / name for name in bases.FAMILIES}


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_and_answers_are_in_the_familys_format(folders: dict[str, Path], name: str) -> None:
    tokenizer = tokenizer_of(folders[name])
    template = Template.freeze(tokenizer)
    assert template.render(TALK, add_generation_prompt=True) == PROMPTS[name][0]
    assert template.render(LONGER, add_generation_prompt=True) == PROMPTS[name][1]
    assert template.answer(" Yes\n") == ANSWERS[name]
    for messages in GOLDEN:
        stripped = [{**message, "content": message["content"].strip()} for message in messages]
        rendered = template.render(messages, add_generation_prompt=True)
        assert template.bos + go_template.render(template.go, stripped) == rendered
    tokenizer.chat_template = template.jinja
    assert Template.freeze(tokenizer) == template


@pytest.mark.parametrize("name", PROMPTS)
def test_the_answer_alone_is_learned(folders: dict[str, Path], name: str) -> None:
    tokenizer = tokenizer_of(folders[name])
    template = Template.freeze(tokenizer)
    ids, labels = template.encode(tokenizer, LONGER, "Yes")
    prompt = template.prompt_ids(tokenizer, LONGER)
    assert ids[: len(prompt)] == prompt
    assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]
    learned = tokenizer.decode(ids[len(prompt) :], clean_up_tokenization_spaces=False)
    assert learned.strip() == ANSWERS[name].strip()
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == template.stop[0]


@pytest.mark.parametrize("name", FACTS)
def test_what_the_converter_is_told(folders: dict[str, Path], name: str) -> None:
    assert facts(folders[name]) == FACTS[name]


def test_thinking_is_off_whatever_the_caller_sets(folders: dict[str, Path]) -> None:
    template = Template.freeze(tokenizer_of(folders["qwen-3"]))
    assert template.jinja.startswith(THINKING_OFF)
    tokenizer = tokenizer_of(folders["qwen-3"])
    asked = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    assert not tokenizer.apply_chat_template(TALK, **asked).endswith("</think>\n\n")
    tokenizer.chat_template = template.jinja
    assert tokenizer.apply_chat_template(TALK, **asked) == PROMPTS["qwen-3"][0]


def test_a_system_message_that_the_base_refuses_is_folded(folders: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(folders["gemma-2"])
    assert Template.freeze(tokenizer).jinja == SYSTEM_FOLDED + GEMMA2
    tokenizer.chat_template = GEMMA2.replace("'system'", "'user'")
    with pytest.raises(TemplateError, match="there is no system role"):
        Template.freeze(tokenizer)


def test_a_system_message_that_the_base_leaves_out_is_folded(folders: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(folders["gemma-3"])
    silent = "{%- for turn in messages if turn['role'] != 'system' %}"
    tokenizer.chat_template = GEMMA3.replace("{%- for turn in turns %}", silent).replace(
        "opening if", "'' if"
    )
    template = Template.freeze(tokenizer)
    assert template.jinja.startswith(SYSTEM_FOLDED)
    assert template.render(LONGER, add_generation_prompt=True) == PROMPTS["gemma-3"][1]


def test_a_beginning_that_the_tokenizer_adds_is_written_into_the_template(folders: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(folders["gemma-3"])
    tokenizer.chat_template = GEMMA3.removeprefix("{{- bos_token }}\n")
    template = Template.freeze(tokenizer)
    assert template.jinja.startswith(BOS_WRITTEN)
    assert template.render(TALK, add_generation_prompt=True) == PROMPTS["gemma-3"][0]


@pytest.mark.parametrize("name", ["llama-2", "mistral"])
def test_a_beginning_inside_a_message_is_refused(folders: dict[str, Path], name: str) -> None:
    tokenizer = tokenizer_of(folders[name])
    template = Template.freeze(tokenizer)
    struck = [*LONGER[:-1], {"role": "user", "content": "It is <s>not</s> fine"}]
    with pytest.raises(TemplateError, match="take <s> out of the messages"):
        template.prompt_ids(tokenizer, struck)

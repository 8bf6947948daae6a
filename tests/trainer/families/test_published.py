"""Chat templates as they were published freeze too; they are read from llama.cpp's source, which is no part of this repository."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.contract import go_template
from tests.trainer.families import bases
from trainer.errors import TemplateError
from trainer.template import GOLDEN, Template

FAMILY_OF = {
    "meta-llama-Llama-3.1-8B-Instruct": "llama-3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama-3",
    "meta-llama-Llama-3.3-70B-Instruct": "llama-3",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral-nemo",
    "Qwen-Qwen2.5-7B-Instruct": "qwen-2.5",
    "Qwen-Qwen3-0.6B": "qwen-3",
    "microsoft-Phi-3.5-mini-instruct": "phi-3",
    "google-gemma-2-2b-it": "gemma-2",
}
REFUSED = {
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral-nemo", "prints the date"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("llama-3", "does not render message by message"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("qwen-2.5", "refuses .'user'.*'NoneType' object"),
}


@pytest.fixture(scope="module")
def published() -> dict[str, str]:
    """Name → Jinja, from the archive that scripts/install keeps."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "homestill"
    folder = Path(os.environ.get("HOMESTILL_CACHE", cache)) / "sdist"
    archive = next(iter(folder.glob("llama_cpp_python-*.tar.gz")), None)
    if archive is None:
        pytest.skip(f"{folder} holds no source of llama-cpp-python; scripts/install puts it there")
    wanted, found = {*FAMILY_OF, *REFUSED}, {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if path.suffix == ".jinja" and path.parent.name == "templates" and path.stem in wanted:
                content = tar.extractfile(member)
                assert content is not None
                found[path.stem] = content.read().decode()
    assert found.keys() == wanted
    return found


def tokenizer(folder: Path, family: str, jinja: str) -> Any:
    """The family's small tokenizer under another chat template."""
    bases.describe(family, folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = jinja
    return loaded


@pytest.mark.parametrize("name", FAMILY_OF)
def test_a_published_template_freezes_to_the_same_prompts(
    tmp_path: Path, published: dict[str, str], name: str
) -> None:
    loaded = tokenizer(tmp_path, FAMILY_OF[name], published[name])
    template = Template.freeze(loaded)
    for messages in GOLDEN:
        stripped = [{**message, "content": message["content"].strip()} for message in messages]
        rendered = template.render(messages, add_generation_prompt=True)
        assert template.bos + go_template.render(template.go, stripped) == rendered
        if name.startswith("google") and messages[0]["role"] == "system":
            continue  # refused by the template itself; frozen, the system message is folded
        asked: Any = loaded.apply_chat_template(
            stripped, tokenize=False, add_generation_prompt=True, enable_thinking=False, date_string="DAY"
        )
        assert rendered == asked.replace("Today Date: DAY\n", "")


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_template_that_cannot_be_frozen(
    tmp_path: Path, published: dict[str, str], name: str
) -> None:
    family, reason = REFUSED[name]
    with pytest.raises(TemplateError, match=reason):
        Template.freeze(tokenizer(tmp_path, family, published[name]))

"""A tokenizer's way of splitting is named only where llama.cpp has exactly that one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import LLAMA3_SPLIT, tiny_tokenizer
from tests.trainer.families.tokenizers import O200K_SPLIT, QWEN_SPLIT, TEKKEN_SPLIT
from trainer.conversion.tokenizers import facts, split_name


def parsed(split: str, *, ignore_merges: bool, normalizer: str | None = None) -> dict[str, Any]:
    """A tokenizer.json, as far as it is read."""
    step = {"type": "Split", "pattern": {"Regex": split}}
    bytes_ = {"type": "ByteLevel", "use_regex": False}
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [step, bytes_]},
        "normalizer": {"type": normalizer} if normalizer else None,
        "model": {"type": "BPE", "ignore_merges": ignore_merges},
    }


@pytest.mark.parametrize(
    ("split", "ignore_merges", "name"),
    [
        (LLAMA3_SPLIT, True, "llama-bpe"),
        (LLAMA3_SPLIT, False, "dbrx"),
        (QWEN_SPLIT, False, "qwen2"),
        (QWEN_SPLIT, True, None),
        (O200K_SPLIT, False, "gpt-4o"),
        (TEKKEN_SPLIT, True, "tekken"),
        (LLAMA3_SPLIT.replace("{1,3}", "{1,2}"), True, None),
    ],
)
def test_splits(split: str, ignore_merges: bool, name: str | None) -> None:
    assert split_name(parsed(split, ignore_merges=ignore_merges)) == name


def test_a_normalizer_other_than_nfc_is_not_named() -> None:
    assert split_name(parsed(QWEN_SPLIT, ignore_merges=False, normalizer="NFC")) == "qwen2"
    assert split_name(parsed(QWEN_SPLIT, ignore_merges=False, normalizer="Lowercase")) is None


def test_byte_level_with_its_own_regex_is_not_named() -> None:
    tokenizer = parsed(QWEN_SPLIT, ignore_merges=False)
    assert split_name({**tokenizer, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}) is None


def test_the_tokenizer_that_training_loads_is_asked(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    known = facts(tmp_path)
    assert (known.split, known.adds_bos, known.adds_space) == ("llama-bpe", True, None)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    written["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    assert not facts(tmp_path).adds_bos

"""What llama.cpp has to be told of a tokenizer so that it reads text as the training did.

* How text is split before bytes are merged. The converter names that by a hash over the token ids of a
  test text, so it knows published vocabularies only; what counts is the regular expression in
  tokenizer.json, and where it is one that llama.cpp has, its name is known.
* Whether a text begins with the beginning-of-text token, and whether SentencePiece text behind a special
  token begins with a space. llama.cpp takes both from a few files and guesses where they are silent; here
  the tokenizer that training uses is asked.
* Whether white space behind special tokens vanishes, as with Phi 3. llama.cpp has no key for that; it
  goes by the model's name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    return (
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _cased(short: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{short}|{start}{_UPPER}+{_LOWER}*{short}|{digits}|{_REST}"


LLAMA3_SPLIT = _words(r"\p{N}{1,3}")
QWEN2_SPLIT = _words(r"\p{N}")
O200K_SPLIT = _cased(_SHORT + "?", r"\p{N}{1,3}")
TEKKEN_SPLIT = _cased("", r"\p{N}")

NAMES = {
    (LLAMA3_SPLIT, True): "llama-bpe",
    (LLAMA3_SPLIT, False): "dbrx",
    (QWEN2_SPLIT, False): "qwen2",
    (O200K_SPLIT, False): "gpt-4o",
    (TEKKEN_SPLIT, True): "tekken",
}
"""(Regular expression, whether words of the vocabulary are taken whole) → llama.cpp's name of that reading."""

PHI3_NAME = "phi-3"
"""A GGUF whose name holds this has white space behind its special tokens removed by llama.cpp."""
PHI3_TOKENS = frozenset({"<unk>", "<s>", "</s>", "<|endoftext|>"})
"""What a vocabulary must hold that llama.cpp reads in this way; without them it does not load the file."""


@dataclass(frozen=True)
class Facts:
    """What is known of a tokenizer."""

    split: str | None
    """llama.cpp's name for the way it splits text; None where it has none, or for SentencePiece."""
    adds_bos: bool
    adds_space: bool | None
    """Whether text behind a special token begins with a space; None for byte-level BPE."""
    strips_behind_special: bool


def split_name(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way a tokenizer.json splits text before it merges bytes.

    Unicode's normal form C is let pass, which Qwen's tokenizers apply and llama.cpp does not: texts in
    another form are read differently, which parity finds where a task has them.

    Args:
        tokenizer: the parsed file.

    Returns:
        None where llama.cpp has no name that is sure to mean the same.
    """
    before = tokenizer.get("pre_tokenizer") or {}
    splits = [
        step.get("pattern", {}).get("Regex")
        for step in before.get("pretokenizers", [before])
        if step.get("type") == "Split" or step.get("use_regex")
    ]
    normalizer = (tokenizer.get("normalizer") or {}).get("type", "NFC")
    if len(splits) != 1 or normalizer != "NFC":
        return None
    return NAMES.get((splits[0], bool(tokenizer["model"].get("ignore_merges"))))


def facts(model: Path) -> Facts:
    """Ask a model folder's tokenizer, as the training loads it."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    parsed: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = parsed["model"].get("byte_fallback", False)
    bos = tokenizer.bos_token_id
    return Facts(
        split=None if pieces else split_name(parsed),
        adds_bos=bos is not None and tokenizer("x")["input_ids"][0] == bos,
        adds_space=_adds_space(tokenizer) if pieces else None,
        strips_behind_special=tokenizer.get_vocab().keys() >= PHI3_TOKENS
        and any(token.special and token.rstrip for token in tokenizer.added_tokens_decoder.values()),
    )


def _adds_space(tokenizer: Any) -> bool:
    behind = tokenizer(f"{tokenizer.eos_token}x", add_special_tokens=False)["input_ids"][1]
    return bool(tokenizer.convert_ids_to_tokens(behind).startswith("▁"))

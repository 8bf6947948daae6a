"""The process that makes a GGUF: `python -m trainer.conversion.convert LLAMA_CPP MODEL OUT`.

It runs llama.cpp's own convert_hf_to_gguf.py, with one thing added. The converter names a BPE
tokenizer's way of splitting text by a hash over the token ids of a test text, so it knows published
vocabularies only and refuses a freshly trained one. What the runtime needs to know is how text is
split before the merges, and that is the regular expression in tokenizer.json: where it is Llama 3's,
the name is "llama-bpe". Everything else is left to the converter's own list.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from trainer import process

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splits_like_llama3(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json splits text as Llama 3's does before it merges bytes.

    Args:
        tokenizer: the parsed file.
    """
    before = tokenizer.get("pre_tokenizer") or {}
    splits = [
        step.get("pattern", {}).get("Regex")
        for step in before.get("pretokenizers", [before])
        if step.get("type") == "Split" or step.get("use_regex")
    ]
    return splits == [LLAMA3_SPLIT] and not tokenizer.get("normalizer")


def main() -> None:
    process.on_parent_death(lambda: os._exit(1))
    llama_cpp, model, out = map(Path, sys.argv[1:4])
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    sys.path.insert(0, str(llama_cpp))
    if splits_like_llama3(json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))):
        from conversion.base import TextModel  # type: ignore[import-not-found]  # llama.cpp's, found at run time

        TextModel.get_vocab_base_pre = lambda *_: "llama-bpe"
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outtype", "f16", "--outfile", str(out)]
    runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()

"""The process that makes a GGUF: `python -m trainer.conversion.convert LLAMA_CPP MODEL OUT`.

It runs llama.cpp's own convert_hf_to_gguf.py, and adds what that cannot know of a model's tokenizer
(`trainer.conversion.tokenizers` says what and why). Everything else is the converter's.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import process
from trainer.conversion import t5
from trainer.conversion.tokenizers import PHI3_NAME, Facts, facts
from trainer.runs import read_json


def teach(text_model: Any, known: Facts) -> None:
    """Let the converter's class of text models write what is known of the tokenizer."""
    name_of: Callable[[Any, Any], str] = text_model.get_vocab_base_pre
    prepare: Callable[..., None] = text_model.prepare_metadata

    def split_name(model: Any, tokenizer: Any) -> str:
        try:
            return name_of(model, tokenizer)
        except NotImplementedError:  # not a published vocabulary
            if known.split is None:
                raise
            return known.split

    def prepare_metadata(model: Any, vocab_only: bool) -> None:
        prepare(model, vocab_only=vocab_only)
        model.gguf_writer.add_add_bos_token(known.adds_bos)
        if known.adds_space is not None:
            model.gguf_writer.add_add_space_prefix(known.adds_space)

    text_model.get_vocab_base_pre = split_name
    text_model.prepare_metadata = prepare_metadata


def main() -> None:
    process.on_parent_death(lambda: os._exit(1))
    llama_cpp, model, out = map(Path, sys.argv[1:4])
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    sys.path.insert(0, str(llama_cpp))
    known = facts(model)
    from conversion.base import TextModel  # type: ignore[import-not-found]  # llama.cpp's, found at run time

    teach(TextModel, known)
    if read_json(model / "config.json").get("model_type") == "t5":
        from conversion.t5 import T5Model  # type: ignore[import-not-found]

        t5.teach(T5Model)
    name = ["--model-name", PHI3_NAME] if known.strips_behind_special else []
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outtype", "f16", "--outfile", str(out), *name]
    runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()

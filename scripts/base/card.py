"""The README of the base model's folder."""

from collections.abc import Mapping
from pathlib import Path

TEXT = """# The demo's base model

A small model with Llama's architecture, tokenizer rules, special tokens and chat format: {parameters:,}
parameters, {tokens:,} tokens, bf16. It is no general assistant. It reads DSPy's chat prompts, copies names
and ids, and fills in fields; it stands where a published 1B model stands when there is no GPU.

`scripts/make_base` made it from random weights with seed {seed}, on CPU only, from text that the script
generates itself: first rows of random tokens said twice, which teach copying, then {views:,} messages
of ever new made-up tasks (`scripts/base/`). The tickets example was kept out: none of its
labels, its set of fields or its texts was used, which `tests/examples/test_tickets.py` checks. The text is rendered
without the chat template's date line, as training and serving do it.

| measured | |
|---|---|
| new made-up tasks from another seed, whole answers exactly right, greedy | {right:.1%} of {asked} |
{more}
Another machine or thread count rounds differently, so a new run makes a model alike, not the same bytes.
`training.jsonl` holds the loss by step. Licence: that of the project.
"""


def write(folder: Path, figures: Mapping[str, object]) -> None:
    """Writes README.md; `figures` are the values of the text's slots, `more` further lines of the table."""
    (folder / "README.md").write_text(TEXT.format_map({"more": "", **figures}), encoding="utf-8")

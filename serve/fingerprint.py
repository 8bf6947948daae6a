"""Which of the measured prompts a request is: the fixed part of a predictor's conversation.

A certificate covers the prompts that it was measured on. A predictor's prompt is fixed but for the
inputs in its last message, so the messages before the last are hashed, and the last one is held
against the fixed start and end that all training conversations share.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MARKER_LINE = re.compile(r"^[ \t]*\[\[ ## \w+ ## \]\][ \t]*\n", re.MULTILINE)


def fingerprint(messages: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 (hex) of the canonical JSON of every message but the last.

    Contents are stripped of outer white space, as they are before rendering. Keys other than role and
    content count too (a tool call makes it another prompt), those that are null do not.
    """
    fixed = [
        {key: _stripped(value) for key, value in message.items() if value is not None}
        for message in messages[:-1]
    ]
    canonical = json.dumps(fixed, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def fixed_parts(contents: Sequence[str]) -> tuple[str, str]:
    """Fixed start and end that the last messages of one predictor share.

    What the inputs happen to have in common is not fixed: the start ends with its last field marker
    line (else with its last blank line), the end begins at its last blank line.
    """
    stripped = [content.strip() for content in contents]
    if not stripped:
        return "", ""
    prefix = _template_start(_common(stripped))
    rest = [content[len(prefix) :] for content in stripped]
    suffix = _common([content[::-1] for content in rest])[::-1]
    cut = suffix.rfind("\n\n")
    return prefix, suffix[cut:] if cut >= 0 else ""


def query(content: str, prefix: str, suffix: str) -> str | None:
    """The variable part of a last message, or None when it does not have this start and end."""
    text = content.strip()
    if len(text) < len(prefix) + len(suffix) or not (text.startswith(prefix) and text.endswith(suffix)):
        return None
    return text[len(prefix) : len(text) - len(suffix)]


def _common(texts: Sequence[str]) -> str:
    return os.path.commonprefix(texts)  # noqa: RUF071  # character by character is what is meant


def _template_start(common: str) -> str:
    markers = [match.end() for match in MARKER_LINE.finditer(common)]
    return common[: markers[-1]] if markers else common[: common.rfind("\n\n") + 2 if "\n\n" in common else 0]


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value

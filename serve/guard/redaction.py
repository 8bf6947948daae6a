"""Placeholders for what must not leave this machine, and the way back in the answer.

    "mail bob@example.org"  →  "mail <EMAIL_1>"  →  teacher: "I wrote to <EMAIL_1>"  →  "I wrote to bob@example.org"

The same value has the same placeholder in one request, so that the teacher can still follow the text.
"""

from __future__ import annotations

import json as jsons
import re
from collections.abc import Mapping
from typing import Any

from serve.errors import Unredactable
from serve.guard.findings import KINDS, findings

STRUCTURE = frozenset({"model", "role", "type", "id", "tool_call_id", "finish_reason", "object"})
"""Keys whose text is not the client's own."""
TEXT_PARTS = frozenset({"text", "refusal"})
PLACEHOLDER = re.compile(rf"<(?:{'|'.join(KINDS)})_\d+>")
_BEGUN = re.compile(r"<(?:[A-Z]{0,8}|[A-Z]{2,8}_\d{0,6})\Z")
"""The end of a text that may be the beginning of a placeholder."""


class Redacted:
    """A request as it may leave, and how to read the answer."""

    def __init__(self, body: dict[str, Any], values: Mapping[str, str]) -> None:
        self.body = body
        self._values = values

    @property
    def count(self) -> int:
        """How many different values were taken out."""
        return len(self._values)

    def restore(self, text: str, *, json: bool = False) -> str:
        """The text with the client's values where it has placeholders.

        Args:
            json: it is JSON, such as a tool call's arguments, so values are escaped.
        """

        def value(match: re.Match[str]) -> str:
            found = self._values.get(match.group(), match.group())
            return jsons.dumps(found, ensure_ascii=False)[1:-1] if json else found

        return PLACEHOLDER.sub(value, text)

    def stream(self, *, json: bool = False) -> Restoring:
        """The same for a text that comes in pieces."""
        return Restoring(self, json=json)


class Restoring:
    """Restores a text that is cut anywhere, also within a placeholder."""

    def __init__(self, redacted: Redacted, *, json: bool) -> None:
        self._redacted = redacted
        self._json = json
        self._held = ""

    def feed(self, piece: str) -> str:
        """What can be said by now."""
        text = self._held + piece
        begun = _BEGUN.search(text)
        cut = begun.start() if begun else len(text)
        self._held = text[cut:]
        return self._redacted.restore(text[:cut], json=self._json)

    def flush(self) -> str:
        """What was held back, at the text's end."""
        held, self._held = self._held, ""
        return held


def redact(body: Mapping[str, Any], phone_region: str | None = "US") -> Redacted:
    """Take personal data and secrets out of every text of a request. `body` is left as it is.

    Raises:
        Unredactable: a message holds an image, sound or file: nobody can say what is in it.
    """
    vault = _Vault(phone_region, taken=set(PLACEHOLDER.findall(jsons.dumps(body, ensure_ascii=False))))
    return Redacted(
        vault.hidden(body), {placeholder: value for value, placeholder in vault.placeholders.items()}
    )


class _Vault:
    def __init__(self, phone_region: str | None, taken: set[str]) -> None:
        self.placeholders: dict[str, str] = {}
        self._phone_region = phone_region
        self._taken = taken
        self._numbers: dict[str, int] = {}

    def hidden(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list):
            return [self.hidden(each) for each in value]
        if not isinstance(value, dict):
            return value
        return {key: self._member(key, each) for key, each in value.items()}

    def _member(self, key: str, value: Any) -> Any:
        if key == "content" and isinstance(value, list):
            kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in value]
            for kind in kinds:
                if kind not in TEXT_PARTS:
                    raise Unredactable(
                        f"a message holds a part of type {kind}, in which personal data cannot be searched for; "
                        "send text, or let it out with egress: allow"
                    )
        return value if key in STRUCTURE and isinstance(value, str) else self.hidden(value)

    def _text(self, text: str) -> str:
        pieces, end = [], 0
        for start, after, kind in findings(text, self._phone_region):
            pieces += [text[end:start], self._placeholder(text[start:after], kind)]
            end = after
        return "".join([*pieces, text[end:]])

    def _placeholder(self, value: str, kind: str) -> str:
        while value not in self.placeholders:
            self._numbers[kind] = self._numbers.get(kind, 0) + 1
            placeholder = f"<{kind}_{self._numbers[kind]}>"
            if placeholder not in self._taken:
                self.placeholders[value] = placeholder
        return self.placeholders[value]

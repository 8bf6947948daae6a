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

MODEL = frozenset({"model"})
MESSAGE = frozenset({"role", "tool_call_id"})
TOOL_CALL = frozenset({"id", "type"})
"""Members that are no text of the client's own, by where they stand; elsewhere the same names may hold anything."""
TEXT_PARTS = frozenset({"text", "refusal"})
PICTURES = "images"
"""Where Ollama's messages hold what OpenAI's hold in a part."""

_NAME = rf"(?:{'|'.join(KINDS)})_\d{{1,6}}"
_MENTIONED = re.compile(_NAME)
# servers written in Go (Ollama among them) write < and > as escapes in a tool call's arguments
_PLACEHOLDER = re.compile(rf"(?:<|\\u003[cC])({_NAME})(?:>|\\u003[eE])")
_ESCAPING = r"\\(?:u(?:0(?:0(?:3)?)?)?)?"
_BEGUN = re.compile(rf"(?:<|\\u003[cC])[A-Z]{{0,8}}(?:(?<=[A-Z])_\d{{0,6}}(?:{_ESCAPING})?)?\Z|{_ESCAPING}\Z")
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
            found = self._values.get(match.group(1))
            if found is None:
                return match.group()
            return jsons.dumps(found, ensure_ascii=False)[1:-1] if json else found

        return _PLACEHOLDER.sub(value, text)

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
        """What was held back, at the text's end: no whole placeholder."""
        held, self._held = self._held, ""
        return held


def redact(body: Mapping[str, Any], phone_region: str = "US") -> Redacted:
    """Take personal data and secrets out of every text of a request. `body` is left as it is.

    Args:
        phone_region: ISO country code by which telephone numbers without +country are read.

    Raises:
        Unredactable: a message holds an image, sound or file, so nobody can say what is in it; or the request is
            nested too deeply to be searched.
    """
    try:
        vault = _Vault(phone_region, taken=set(_MENTIONED.findall(jsons.dumps(body, ensure_ascii=False))))
        return Redacted(vault.request(body), {name: value for value, name in vault.names.items()})
    except RecursionError as error:
        raise Unredactable(
            "the request is nested too deeply for personal data to be searched for; "
            "send it flatter, or let it out with egress: allow"
        ) from error


class _Vault:
    """The values of one request. `names`: placeholders without their brackets, by value."""

    def __init__(self, phone_region: str | None, taken: set[str]) -> None:
        self.names: dict[str, str] = {}
        self._phone_region = phone_region
        self._taken = taken
        self._numbers: dict[str, int] = {}

    def request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._members(body, MODEL, {"messages": self._messages, "prediction": self._message})

    def _messages(self, messages: Any) -> Any:
        return (
            [self._message(each) for each in messages] if isinstance(messages, list) else self._all(messages)
        )

    def _message(self, message: Any) -> Any:
        _check_parts(message)
        return self._object(
            message, MESSAGE, {"tool_calls": self._tool_calls, "function_call": self._function}
        )

    def _tool_calls(self, calls: Any) -> Any:
        if not isinstance(calls, list):
            return self._all(calls)
        return [self._object(each, TOOL_CALL, {"function": self._function}) for each in calls]

    def _function(self, function: Any) -> Any:
        return self._object(function, frozenset(), {"arguments": self._arguments})

    def _arguments(self, arguments: Any) -> Any:
        """JSON as text: values are searched for as they are meant, numbers too, and it stays JSON."""
        try:
            meant = jsons.loads(arguments)
        except (TypeError, ValueError):
            return self._all(arguments)
        hidden = self._all(meant, numbers=True)
        # of two members of one name only the last is meant, but both would leave
        return self._text(arguments) if hidden == meant else jsons.dumps(hidden, ensure_ascii=False)

    def _object(self, value: Any, kept: frozenset[str], by_name: Mapping[str, Any]) -> Any:
        """An object of the API's own, or whatever else the client sent in its place."""
        return self._members(value, kept, by_name) if isinstance(value, Mapping) else self._all(value)

    def _members(
        self, value: Mapping[str, Any], kept: frozenset[str], by_name: Mapping[str, Any]
    ) -> dict[str, Any]:
        """`kept` members stay, and some are read in a way of their own."""
        return {
            self._text(key): each
            if key in kept and isinstance(each, str)
            else by_name.get(key, self._all)(each)
            for key, each in value.items()
        }

    def _all(self, value: Any, numbers: bool = False) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list):
            return [self._all(each, numbers) for each in value]
        if isinstance(value, dict):
            return {self._text(key): self._all(each, numbers) for key, each in value.items()}
        if numbers and isinstance(value, int) and self._text(str(value)) != str(value):
            return self._text(str(value))
        return value

    def _text(self, text: str) -> str:
        pieces, end = [], 0
        for start, after, kind in findings(text, self._phone_region):
            pieces += [text[end:start], f"<{self._name(text[start:after], kind)}>"]
            end = after
        return "".join([*pieces, text[end:]]) if pieces else text

    def _name(self, value: str, kind: str) -> str:
        while value not in self.names:
            self._numbers[kind] = self._numbers.get(kind, 0) + 1
            name = f"{kind}_{self._numbers[kind]}"
            if name not in self._taken:
                self.names[value] = name
        return self.names[value]


def _check_parts(message: Any) -> None:
    """
    Raises:
        Unredactable: a part is not text.
    """
    if not isinstance(message, Mapping):
        return
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    kinds = [str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in parts]
    kinds += [PICTURES] if message.get(PICTURES) else []
    for kind in kinds:
        if kind not in TEXT_PARTS:
            raise Unredactable(
                f"a message holds a part of type {kind}, in which personal data cannot be searched for; "
                "send text, or let it out with egress: allow"
            )

"""What a chat template puts around every message, read off its renderings; and the same as a Go template.

Contents are sentinels while it is read, so whatever else stands in the text is the template's. Three
kinds are known, by where the system message is written: in a turn of its own (Llama 3, ChatML, Phi), in
front of the first user message (Gemma, Llama 2), or in front of the last one (Mistral from version 3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.errors import TemplateError

Message = Mapping[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""Text of messages, with the text that asks for an answer or without it."""

SENTINELS = {"system": "SENTINELSYSTEM", "user": "SENTINELUSER", "assistant": "SENTINELASSISTANT"}
ANY_SENTINEL = re.compile("|".join(SENTINELS.values()))


@dataclass(frozen=True)
class Turns:
    """The texts around every message."""

    bos: str
    preamble: str
    """Stands first in a conversation without a system message."""
    around: dict[str, tuple[str, str]]
    """Role → the text before and after its content."""
    generation: str
    system: Literal["turn", "first", "last"]
    """The system message has a turn of its own, or opens the first or the last user turn."""
    lead: str
    """What an answer begins with that the prompt does not end with."""
    close: str
    """What stands behind the last answer of a conversation."""

    def go(self) -> str:
        """As a Go template of Ollama: no trim markers, for every white space counts."""
        (opening, after), (start, end) = self.around["system"], self.around["user"]
        before, after_it = self.around["assistant"]
        starts = {
            "turn": _go_text(start),
            "first": '{{ if not (and (eq $i 1) (eq (index $.Messages 0).Role "system")) }}'
            f"{_go_text(start)}{{{{ end }}}}",
            "last": f"{_go_text(start)}{{{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}}}"
            f"{_go_text(opening)}{{{{ $.System }}}}{_go_text(after)}{{{{ end }}}}",
        }
        system = "" if self.system == "last" else f"{_go_text(opening)}{{{{ .Content }}}}{_go_text(after)}"
        turns = (
            f'{{{{ if eq .Role "system" }}}}{system}'
            f'{{{{ else if eq .Role "user" }}}}{starts[self.system]}{{{{ .Content }}}}{_go_text(end)}'
            f'{{{{ else if eq .Role "assistant" }}}}{_go_text(before)}{{{{ .Content }}}}{_go_text(after_it)}'
            "{{ end }}"
        )
        index = "" if self.system == "turn" else "$i, $_ := "
        preamble = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_go_text(self.preamble)}{{{{ end }}}}'
        return (
            (preamble if self.preamble else "")
            + f"{{{{ range {index}.Messages }}}}{turns}{{{{ end }}}}"
            + _go_text(self.generation)
        )

    def render(self, messages: Sequence[Message]) -> str:
        """What the Go template renders, behind the beginning-of-text token."""
        instructed = messages[0]["role"] == "system"
        opening, after = self.around["system"]
        text = self.bos + ("" if instructed else self.preamble)
        for at, message in enumerate(messages):
            role, content = message["role"], message["content"].strip()
            if role == "system" and self.system == "last":
                continue
            start, end = self.around[role]
            if role == "user" and instructed:
                if self.system == "first" and at == 1:
                    start = ""
                if self.system == "last" and at == len(messages) - 1:
                    start += opening + messages[0]["content"].strip() + after
            text += start + content + end
        return text + self.generation


def probe(render: Render, bos: str) -> Turns:
    """Read a template's turns off its renderings of sentinels.

    Args:
        bos: the tokenizer's beginning-of-text token, or "".

    Raises:
        TemplateError: it does not render message by message.
    """
    opening, user_to_assistant, assistant_to_user, user_to_answer = _between(
        render, ["user", "assistant", "user"], True
    )
    bos = bos if opening.startswith(bos) else ""
    opening = opening.removeprefix(bos)
    end = _between(render, ["user"], False)[1]
    if not (user_to_assistant.startswith(end) and user_to_answer.startswith(end)):
        end = _common_start(user_to_assistant, user_to_answer)
    last_start, close = _between(render, ["user", "assistant"], False)[1:]
    start = assistant_to_user.removeprefix(close)
    if not (assistant_to_user.startswith(close) and opening.endswith(start)):
        start = _common_start(opening[::-1], assistant_to_user[::-1])[::-1]
    kind, around = _system(render, bos=bos, start=start, assistant_to_user=assistant_to_user)
    if not last_start.startswith(user_to_answer):
        raise not_message_by_message(
            f"it asks for an answer with {user_to_answer!r} and begins an answer with {last_start!r}"
        )
    return Turns(
        bos=bos,
        preamble=opening.removesuffix(start),
        around={
            "system": around,
            "user": (start, end),
            "assistant": (user_to_assistant.removeprefix(end), assistant_to_user.removesuffix(start)),
        },
        generation=user_to_answer.removeprefix(end),
        system=kind,
        lead=last_start.removeprefix(user_to_answer),
        close=close,
    )


def not_message_by_message(what: str) -> TemplateError:
    """The error for a template that cannot be told apart into turns."""
    return TemplateError(
        f"the chat template does not render message by message ({what}); "
        "use an instruct model of the families in docs/families.md"
    )


def _system(
    render: Render, *, bos: str, start: str, assistant_to_user: str
) -> tuple[Literal["turn", "first", "last"], tuple[str, str]]:
    """Where the system message is written, and the texts before and after it."""
    roles = ["system", "user", "assistant", "user"]
    text = render([{"role": role, "content": SENTINELS[role]} for role in roles], True)
    found = [match[0] for match in ANY_SENTINEL.finditer(text)]
    if found == [SENTINELS[role] for role in ["user", "assistant", "system", "user"]]:
        before, after = ANY_SENTINEL.split(text)[2:4]
        if not before.startswith(assistant_to_user):
            raise not_message_by_message(f"system+user+assistant+user is rendered as {text!r}")
        return "last", (before.removeprefix(assistant_to_user), after)
    before, after = _between(render, ["system", "user"], True)[:2]
    before = before.removeprefix(bos)
    if after.endswith(start):
        return "turn", (before, after.removesuffix(start))
    return "first", (before, after)


def _between(render: Render, roles: list[str], generation: bool) -> list[str]:
    """The texts before, between and after the contents of messages of these roles."""
    text = render([{"role": role, "content": SENTINELS[role]} for role in roles], generation)
    if [match[0] for match in ANY_SENTINEL.finditer(text)] != [SENTINELS[role] for role in roles]:
        raise not_message_by_message(f"{'+'.join(roles)} is rendered as {text!r}")
    return ANY_SENTINEL.split(text)


def _common_start(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    shorter = min(len(one), len(other))
    return one[: next((at for at, (a, b) in enumerate(pairs) if a != b), shorter)]


def _go_text(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')

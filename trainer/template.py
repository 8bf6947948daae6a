"""One chat format for training and serving: the base's template with its date removed, frozen.

The Jinja goes into the GGUF and renders the training text. Ollama takes a Go template instead, which
is built from what the Jinja was seen to put around every role, and which must then render the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError as JinjaError

from trainer.errors import TemplateError
from trainer.runs import sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]

DATE = re.compile(
    r"(?:Today|Today's|Current) [Dd]ate: (?P<quote>[\"'])\s*\+\s*(?:date_string|strftime_now\([^)]*\))"
    r"\s*\+\s*(?P=quote)\.?(?:\\n)?"
)
"""The date line of Llama 3.1 and 3.2 and its relatives, up to the end of the line."""

IGNORED = -100
"""Label of a token that is not learned."""

GOLDEN: list[list[dict[str, str]]] = [
    [{"role": role, "content": content} for role, content in turns]
    for turns in (
        [("user", "Where is it?")],
        [("system", "Be brief."), ("user", ' [[ ## text ## ]]\n{{ "braces" }} \u00e9 \U0001f999\n\n')],
        [("system", "Be\n\nbrief."), ("user", "a\nb"), ("assistant", '\n{"c": 1}'), ("user", "d")],
        [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
    )
]
"""Conversations on which the Go template must render what the Jinja renders."""


@dataclass(frozen=True)
class Template:
    """A chat format that never changes. Contents are stripped of outer white space before rendering."""

    jinja: str
    go: str
    """For Ollama; without the beginning-of-text token, which the runtime adds itself."""
    stop: list[str]
    tokens: dict[str, str] = field(default_factory=dict)
    """The special tokens that the Jinja names, such as bos_token."""

    @classmethod
    def freeze(cls, tokenizer: PreTrainedTokenizerBase) -> Template:
        """Freeze the tokenizer's chat template.

        Raises:
            TemplateError: there is none, it prints a date, or it does not render role by role.
        """
        source = tokenizer.chat_template
        if not isinstance(source, str):
            raise TemplateError(
                f"{tokenizer.name_or_path} has {'no' if source is None else 'several'} chat templates; "
                "one is needed: use an instruct model as student.base"
            )
        tokens = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
        bare = cls(jinja=DATE.sub("", source), go="", stop=[], tokens=tokens)
        bare._refuse_dates()
        turns = _Turns.probe(bare)
        template = cls(bare.jinja, turns.go(), _stops(turns, tokenizer), tokens)
        for messages in GOLDEN:
            expected = template.render(messages, add_generation_prompt=True)
            if turns.render(messages) != expected:
                raise _not_role_by_role(f"it renders {expected!r}")
        return template

    @property
    def sha256(self) -> str:
        return sha256_json(self.to_json())

    @property
    def bos(self) -> str:
        """What every rendering begins with and the Go template leaves to the runtime; may be empty."""
        token = self.tokens.get("bos_token", "")
        return token if token and self.render(GOLDEN[0], add_generation_prompt=True).startswith(token) else ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of a conversation, with the beginning-of-text token where the template writes it."""
        return self._render(messages, add_generation_prompt)

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt, exactly one beginning-of-text token where the model has one."""
        return self._ids(tokenizer, self.render(messages, add_generation_prompt=True))

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], completion: str
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of a training example: learned are the answer and its end-of-turn token.

        Raises:
            TemplateError: the prompt's text is not how the whole conversation's text begins.
        """
        prompt = self.render(messages, add_generation_prompt=True)
        answer = {"role": "assistant", "content": completion}
        whole = self.render([*messages, answer], add_generation_prompt=False)
        end = whole.rfind(self.stop[0]) + len(self.stop[0])
        if not whole.startswith(prompt) or end <= len(prompt):
            raise TemplateError(
                f"the chat template renders a prompt as {prompt[-80:]!r} and the answered prompt as {whole[-80:]!r}; "
                "use a base whose template begins an answer with the text that its generation prompt adds"
            )
        ids = self._ids(tokenizer, prompt)
        both = self._ids(tokenizer, whole[:end])
        if both[: len(ids)] != ids:  # the answer's first token would merge into the prompt; served, it cannot
            both = ids + tokenizer(whole[len(prompt) : end], add_special_tokens=False)["input_ids"]
        return both, [IGNORED] * len(ids) + both[len(ids) :]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Template:
        """The template that `to_json` wrote; other keys are ignored."""
        return cls(value["jinja"], value["go"], list(value["stop"]), dict(value["tokens"]))

    def _render(self, messages: Sequence[Message], generation: bool, **variables: Any) -> str:
        # transformers' own renderer, so that the text is what every other user of the template gets
        from transformers.utils.chat_template_utils import render_jinja_template

        stripped = [{"role": message["role"], "content": message["content"].strip()} for message in messages]
        variables |= {**self.tokens, "chat_template": self.jinja, "add_generation_prompt": generation}
        try:
            rendered, _ = cast(Any, render_jinja_template)([stripped], **variables)  # its annotation says str
        except JinjaError as error:
            raise TemplateError(
                f"the chat template refuses {[message['role'] for message in stripped]}: {error}; "
                "use a base that takes system, user and assistant messages"
            ) from error
        return str(rendered[0])

    def _ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = tokenizer.bos_token_id
        if bos is None or bos not in tokenizer("")["input_ids"] + ids:
            return ids  # a family without a beginning-of-text token
        if bos not in ids:
            ids = [bos, *ids]
        if ids[0] != bos or ids.count(bos) != 1:
            raise TemplateError(
                f"{ids.count(bos)} beginning-of-text tokens in {text[:80]!r}; exactly one must open the text: "
                f"take {tokenizer.bos_token} out of the messages"
            )
        return ids

    def _refuse_dates(self) -> None:
        for messages in GOLDEN:
            one, other = (
                self._render(messages, True, date_string=day, strftime_now=lambda _, day=day: day)
                for day in ("01 Jan 2001", "31 Dec 2032")
            )
            if not one == other == self.render(messages, add_generation_prompt=True):
                raise TemplateError(
                    f"the chat template prints the date ({_difference(one, other)}), so prompts would change from "
                    "day to day; take the date out of the base's chat_template"
                )


@dataclass(frozen=True)
class _Turns:
    """What a template puts before and after the content of every role."""

    bos: str
    preamble: str
    """Stands first in a conversation without a system message."""
    around: dict[str, tuple[str, str]]
    generation: str

    @classmethod
    def probe(cls, template: Template) -> _Turns:
        """Read the texts between sentinel contents."""
        names = {"system": "SENTINELSYSTEM", "user": "SENTINELUSER", "assistant": "SENTINELASSISTANT"}

        def between(*roles: str, generation: bool = False) -> list[str]:
            messages = [{"role": role, "content": names[role]} for role in roles]
            text = template.render(messages, add_generation_prompt=generation)
            pieces = re.split("|".join(names[role] for role in dict.fromkeys(roles)), text)
            if len(pieces) != len(roles) + 1:
                raise _not_role_by_role(f"{'+'.join(roles)} is rendered as {text!r}")
            return pieces

        opening, user_end = between("user")
        system_start, system_to_user, user_to_assistant, assistant_end = between(
            "system", "user", "assistant"
        )
        assistant_to_user = between("user", "assistant", "user")[2]
        generation = _without_start(between("user", generation=True)[1], user_end)
        user_start = _without_start(assistant_to_user, assistant_end)
        bos = template.tokens.get("bos_token", "")
        bos = bos if opening.startswith(bos) else ""
        return cls(
            bos=bos,
            preamble=_without_end(_without_start(opening, bos), user_start),
            around={
                "system": (_without_start(system_start, bos), _without_end(system_to_user, user_start)),
                "user": (user_start, user_end),
                "assistant": (_without_start(user_to_assistant, user_end), assistant_end),
            },
            generation=generation,
        )

    def go(self) -> str:
        """As a Go template of Ollama: no trim markers, for every white space counts."""
        branches = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{_go_text(start)}{{{{ .Content }}}}{_go_text(end)}'
            for role, (start, end) in self.around.items()
        )
        preamble = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_go_text(self.preamble)}{{{{ end }}}}'
        turns = f"{{{{ range .Messages }}}}{{{{ {branches}{{{{ end }}}}{{{{ end }}}}"
        return (preamble if self.preamble else "") + turns + _go_text(self.generation)

    def render(self, messages: Sequence[Message]) -> str:
        """What the Go template renders, behind the beginning-of-text token."""
        preamble = self.preamble if messages[0]["role"] != "system" else ""
        turns = (self.around[message["role"]] for message in messages)
        bodies = (
            start + message["content"].strip() + end
            for message, (start, end) in zip(messages, turns, strict=True)
        )
        return self.bos + preamble + "".join(bodies) + self.generation


def _stops(turns: _Turns, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The token that ends a turn, then the tokenizer's end token where it is another."""
    special = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    end = turns.around["assistant"][1]
    found = next((token for token in special if end.lstrip().startswith(token)), None)
    if found is None:
        raise _not_role_by_role(f"an answer is ended by {end!r}, which is no special token")
    return list(dict.fromkeys([found, *([tokenizer.eos_token] if tokenizer.eos_token else [])]))


def _go_text(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise _not_role_by_role(f"{text!r} does not begin with {start!r}")
    return text.removeprefix(start)


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise _not_role_by_role(f"{text!r} does not end with {end!r}")
    return text.removesuffix(end)


def _not_role_by_role(what: str) -> TemplateError:
    return TemplateError(
        f"the chat template does not render message by message ({what}); "
        "use a base of the Llama-3, ChatML or Zephyr kind"
    )


def _difference(one: str, other: str) -> str:
    """A few characters around the first place where two texts differ."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    return repr(one[max(0, at - 20) : at + 12])

"""One chat format for training and serving: the base's template, frozen.

Frozen means: no date, thinking switched off, the beginning-of-text token written, and a system message
taken (in front of the first user message, where the base's own template refuses one). The Jinja goes
into the GGUF and renders the training text. Ollama takes a Go template instead, which `trainer.turns`
builds from what the Jinja was seen to put around every message, and which must then render the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError as JinjaError

from trainer.errors import TemplateError
from trainer.runs import sha256_json
from trainer.turns import Message, not_message_by_message, probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = re.compile(
    r"(?:Today|Today's|Current) [Dd]ate: (?P<quote>[\"'])\s*\+\s*(?:date_string|strftime_now\([^)]*\))"
    r"\s*\+\s*(?P=quote)\.?(?:\\n)?"
)
"""The date line of Llama 3.1 and 3.2 and its relatives, up to the end of the line."""

THINKING_OFF = "{%- set enable_thinking = false %}\n"
"""Qwen 3 and its like think unless this is set; set inside the template it holds wherever that is rendered."""

BOS_WRITTEN = "{%- if true %}{{- bos_token }}{%- endif %}\n"
"""For a template that leaves the beginning-of-text token to the tokenizer: every runtime then finds it in the text."""

SYSTEM_FOLDED = """\
{%- if messages|length > 1 and messages[0]['role'] == 'system' %}
{%- set folded = {'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']} %}
{%- set messages = [folded] + messages[2:] %}
{%- endif %}
"""
"""For a template that refuses a system message: it is put in front of the first user message."""

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
    lead: str = ""
    """Text between the end of a prompt and its answer; Llama 2 and Mistral put a space there."""
    close: str = ""
    """Text that ends an answer, up to and with the stop token; empty: the stop token alone."""

    @classmethod
    def freeze(cls, tokenizer: PreTrainedTokenizerBase) -> Template:
        """Freeze the tokenizer's chat template.

        Raises:
            TemplateError: there is none, it prints a date, or it does not render message by message.
        """
        source = tokenizer.chat_template
        if not isinstance(source, str):
            raise TemplateError(
                f"{tokenizer.name_or_path} has {'no' if source is None else 'several'} chat templates; "
                "one is needed: use an instruct model as student.base"
            )
        tokens = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
        bare = cls(jinja=DATE.sub("", source), go="", stop=[], tokens=tokens)
        bare = bare._completed(_adds_bos(tokenizer))
        bare._refuse_dates()
        turns = probe(bare.render, tokens.get("bos_token", ""))
        stop = _stops(turns.close, tokenizer)
        close = turns.close[: turns.close.index(stop[0]) + len(stop[0])]
        template = replace(bare, go=turns.go(), stop=stop, lead=turns.lead, close=close)
        for messages in GOLDEN:
            expected = template.render(messages, add_generation_prompt=True)
            if turns.render(messages) != expected:
                raise not_message_by_message(f"it renders {expected!r}")
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
        return self._ids(tokenizer, self.render(messages, add_generation_prompt=True), messages)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], completion: str
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of a training example: learned are the answer and its end-of-turn token."""
        prompt = self.render(messages, add_generation_prompt=True)
        answer = self.answer(completion)
        ids = self._ids(tokenizer, prompt, messages)
        both = self._ids(tokenizer, prompt + answer, messages)
        if both[: len(ids)] != ids:  # the answer's first token would merge into the prompt; served, it cannot
            both = ids + self._apart(tokenizer, answer)
        return both, [IGNORED] * len(ids) + both[len(ids) :]

    def answer(self, completion: str) -> str:
        """The text that is learned: what stands between the prompt and the end of the answer's turn."""
        return self.lead + completion.strip() + (self.close or self.stop[0])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Template:
        """The template that `to_json` wrote; other keys are ignored."""
        return cls(
            value["jinja"],
            value["go"],
            list(value["stop"]),
            dict(value["tokens"]),
            lead=value.get("lead", ""),
            close=value.get("close", ""),
        )

    def _completed(self, adds_bos: bool) -> Template:
        """Thinking off, the beginning-of-text token written, and a system message taken."""
        template = self
        if "enable_thinking" in self.jinja and THINKING_OFF not in self.jinja:
            template = replace(template, jinja=THINKING_OFF + template.jinja)
        if adds_bos and not template.bos:
            template = replace(template, jinja=BOS_WRITTEN + template.jinja)
        if template._takes_system():
            return template
        folding = replace(template, jinja=SYSTEM_FOLDED + template.jinja)
        return folding if folding._takes_system() else template

    def _takes_system(self) -> bool:
        try:
            return GOLDEN[2][0]["content"] in self.render(GOLDEN[2], add_generation_prompt=True)
        except TemplateError:
            return (
                False  # it raises; where folding does not help, the template does so again when it is probed
            )

    def _render(self, messages: Sequence[Message], generation: bool, **variables: Any) -> str:
        # transformers' own renderer, so that the text is what every other user of the template gets
        from transformers.utils.chat_template_utils import render_jinja_template

        stripped = [{"role": message["role"], "content": message["content"].strip()} for message in messages]
        variables |= {**self.tokens, "chat_template": self.jinja, "add_generation_prompt": generation}
        try:
            rendered, _ = cast(Any, render_jinja_template)([stripped], **variables)  # its annotation says str
        except (JinjaError, TypeError, ValueError, LookupError) as error:  # Jinja hands on what Python raises
            raise TemplateError(
                f"the chat template refuses {[message['role'] for message in stripped]}: {error}; "
                "use a base that takes system, user and assistant messages"
            ) from error
        return str(rendered[0])

    def _ids(self, tokenizer: PreTrainedTokenizerBase, text: str, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = tokenizer.bos_token_id
        if bos is None or (bos not in ids and not _adds_bos(tokenizer)):
            return ids  # a family without a beginning-of-text token
        if bos not in ids:
            ids = [bos, *ids]
        if ids[0] != bos or (ids.count(bos) != 1 and ids.count(bos) != self._starts(messages)):
            raise TemplateError(
                f"{ids.count(bos)} beginning-of-text tokens in {text[:80]!r}; exactly one must open the text: "
                f"take {tokenizer.bos_token} out of the messages"
            )
        return ids

    def _starts(self, messages: Sequence[Message]) -> int:
        """Beginning-of-text tokens that the template itself writes; Llama 2 opens every exchange with one."""
        blank = [{"role": message["role"], "content": "-"} for message in messages]
        return self.render(blank, add_generation_prompt=True).count(self.tokens.get("bos_token") or "\0")

    def _apart(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
        """The answer's ids behind a special token, where SentencePiece puts no space of its own before them."""
        behind: list[int] = tokenizer(self.stop[0] + answer, add_special_tokens=False)["input_ids"]
        return behind[1:]

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


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every text with its beginning-of-text token."""
    bos = tokenizer.bos_token_id
    return bos is not None and bos in tokenizer("")["input_ids"]


def _stops(close: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The token that ends a turn, then the tokenizer's end token where it is another."""
    special = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    found = next((token for token in special if close.lstrip().startswith(token)), None)
    if found is None:
        raise not_message_by_message(f"an answer is ended by {close!r}, which is no special token")
    return list(dict.fromkeys([found, *([tokenizer.eos_token] if tokenizer.eos_token else [])]))


def _difference(one: str, other: str) -> str:
    """A few characters around the first place where two texts differ."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    return repr(one[max(0, at - 20) : at + 12])

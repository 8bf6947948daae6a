"""Parity: what the student saw in training, token by token, is what it is served with.

Three comparisons, each with evidence: training tokens against the GGUF's own tokenizer, prompts as the
server renders them against the training text, and answers of the 16-bit weights against those of the
server, judged by the task's metric.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.runtime.embedded import Endpoint
from trainer.errors import RegisterError
from trainer.runtimes.local import Chat, Rendered, Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.template import Template

ALLOWED_DROP = 0.01
"""Of the metric, between the 16-bit weights and what is served."""
AROUND = 24
SHOWN = 3
"""Differing answers that parity.json quotes."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that the student is asked to continue."""

    example: str
    predictor: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Answered:
    """A system's answers to the prompts, in order; None where it gave up in the middle."""

    texts: Sequence[str | None]


@dataclass
class Parity:
    """The manifest's `parity` and its evidence."""

    prompt_tokens_equal: bool = False
    answers_equal: float | None = None
    """Share of prompts that the server answers exactly as the 16-bit weights do."""
    metric_delta: float | None = None
    """Served score minus the score of the 16-bit weights; None where single answers cannot be judged."""
    fault: str | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens_equal": self.prompt_tokens_equal,
            "answers_equal": self.answers_equal,
            "metric_delta": self.metric_delta,
            "fault": self.fault,
            "evidence": self.evidence,
        }


class Vocabulary:
    """The tokenizer and the chat template inside a GGUF; to be closed."""

    def __init__(self, gguf: Path) -> None:
        import llama_cpp

        try:
            with redirect_stderr(
                io.StringIO()
            ):  # it warns that a file without weights knows no context length
                self._llama = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
        except (ValueError, RuntimeError) as error:
            raise RegisterError(f"{gguf} cannot be loaded ({error}); export the model again") from error
        self.jinja: str | None = self._llama.metadata.get("tokenizer.chat_template")
        self.bos: int = self._llama.token_bos()

    def close(self) -> None:
        """Give llama.cpp's memory back."""
        self._llama.close()

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Token ids, special tokens recognised; `add_special` adds what a server adds to a rendered prompt."""
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=add_special, special=True)
        return ids


@dataclass(frozen=True)
class Tokens:
    """Compares token ids; every comparison raises RegisterError at the first difference."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    vocabulary: Vocabulary
    context: int

    def training(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Training text, prompt and answer, as the GGUF's tokenizer reads it.

        Args:
            rows: of train.jsonl, with `messages` and `completion`.

        Returns:
            Token ids compared.
        """
        compared = 0
        for row in rows:
            ids, labels = self.template.encode(self.tokenizer, row["messages"], row["completion"])
            split = next(place for place, label in enumerate(labels) if label >= 0)
            prompt = self.template.render(row["messages"], add_generation_prompt=True)
            answer = self.template.answer(row["completion"])
            self._equal("the GGUF's tokenizer", ids[:split], self._ids(prompt))
            whole = self._ids(prompt + answer)
            if whole[:split] != ids[:split]:  # prompt and answer would merge: they were tokenized apart
                behind = self.vocabulary.tokenize(self.template.stop[0] + answer, add_special=False)
                whole = ids[:split] + behind[1:]
            self._equal("the GGUF's tokenizer", ids, whole)
            compared += len(ids)
        return compared

    def ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt's token ids, which must fit and hold one beginning-of-text token."""
        ids = self.template.prompt_ids(self.tokenizer, messages)
        if len(ids) >= self.context:
            raise RegisterError(
                f"a prompt of the task has {len(ids)} tokens, the runtime holds {self.context}; "
                f"raise student.context above {len(ids)} (task.yaml)"
            )
        return ids

    def served(self, messages: Sequence[Mapping[str, str]], rendered: Rendered) -> None:
        """A prompt as the server makes it, as far as the server shows it."""
        expected = self.ids(messages)
        if rendered.tokens is not None:
            self._equal("the server", expected, rendered.tokens)
        elif rendered.text is not None:
            self._equal("the server", expected, self.vocabulary.tokenize(rendered.text, add_special=True))
        elif rendered.count != len(expected):
            raise RegisterError(
                f"the server makes {rendered.count} tokens of a prompt that training made {len(expected)} of; "
                "it renders another chat template: serve the GGUF with the one inside it"
            )

    def embedded_template(self) -> None:
        """The Jinja inside the GGUF is the frozen one."""
        found = self.vocabulary.jinja or ""
        if found.strip() != self.template.jinja.strip():
            raise RegisterError(
                f"the GGUF's chat template differs from the trained one: {difference(self.template.jinja, found)}; "
                "export the model again"
            )

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """Text of token ids, nothing tidied up."""
        text = self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return str(text)

    def _ids(self, text: str) -> list[int]:
        """The vocabulary's ids of a rendered text whose beginning-of-text token stands in it, or is added."""
        return self.vocabulary.tokenize(text, add_special=not self.template.bos)

    def _equal(self, who: str, expected: list[int], found: list[int]) -> None:
        starts = (expected.count(self.vocabulary.bos), found.count(self.vocabulary.bos))
        if starts[0] != starts[1]:
            raise RegisterError(
                f"{who} puts {starts[1]} beginning-of-text tokens into a prompt, training had {starts[0]}; "
                "export the model again"
            )
        if expected != found:
            texts = (self.decode(expected, special=True), self.decode(found, special=True))
            remedy = "the template or tokenizer was changed, export the model again"
            if texts[0] != texts[1] and texts[0] == unicodedata.normalize("NFC", texts[1]):
                remedy = "bring the task's data to Unicode's form C, as this base's tokenizer does and llama.cpp does not"
            raise RegisterError(
                f"{who} makes other tokens of a prompt than training: {token_difference(expected, found, self.decode)}"
                f"{'' if texts[0] == texts[1] else ', ' + difference(*texts)}; {remedy}"
            )


def difference(expected: str, found: str) -> str:
    """The text around the first place where two texts differ."""
    pairs = zip(expected, found, strict=False)
    shorter = min(len(expected), len(found))
    at = next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)
    here = slice(max(0, at - AROUND), at + AROUND)
    return f"at character {at} trained {expected[here]!r}, served {found[here]!r}"


def token_difference(expected: list[int], found: list[int], decode: Callable[[list[int]], str]) -> str:
    """The ids at the first place where two token lists differ, and the text before them."""
    shorter = min(len(expected), len(found))
    pairs = zip(expected, found, strict=False)
    at = next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)
    before = decode(expected[max(0, at - 8) : at])
    return (
        f"token {at}, after {before!r}, is {expected[at : at + 3]} in training and {found[at : at + 3]} here"
    )


def ask_all(chat: Chat, endpoint: Endpoint, prompts: Sequence[Prompt], max_tokens: int) -> Answered:
    """Put every prompt to a server, one after the other."""
    replies = [chat.ask(endpoint, prompt.messages, max_tokens) for prompt in prompts]
    return Answered([reply.text if reply.complete else None for reply in replies])


def equal_share(one: Answered, other: Answered) -> float:
    """Share of prompts with the same answer, outer white space aside."""
    pairs = list(zip(one.texts, other.texts, strict=True))
    same = sum(a is not None and b is not None and a.strip() == b.strip() for a, b in pairs)
    return same / len(pairs)


def compare_answers(
    parity: Parity,
    prompts: Sequence[Prompt],
    trained: Answered,
    served: Answered,
    judge: Callable[[Prompt, str], float] | None,
) -> None:
    """Fill in equal answers and the metric's change.

    Args:
        judge: score (0..1) of an answer; None where one answer alone cannot be judged.

    Raises:
        RegisterError: the score drops by more than ALLOWED_DROP, and by more than one example.
    """
    parity.answers_equal = equal_share(trained, served)
    differing = [
        {"example": prompt.example, "trained": a, "served": b}
        for prompt, a, b in zip(prompts, trained.texts, served.texts, strict=True)
        if (a or "").strip() != (b or "").strip()
    ]
    parity.evidence["answers"] = {
        "n": len(prompts),
        "broken_off": sum(text is None for text in served.texts),
        "differing": differing[:SHOWN],
    }
    if judge is None:
        return
    scores = [
        [
            judge(prompt, text) if text is not None else 0.0
            for prompt, text in zip(prompts, system.texts, strict=True)
        ]
        for system in (trained, served)
    ]
    means = [sum(column) / len(prompts) for column in scores]
    parity.metric_delta = round(means[1] - means[0], 6)
    parity.evidence["answers"] |= {"trained_score": means[0], "served_score": means[1]}
    if too_much_lost(parity.metric_delta, len(prompts)):
        worse = next(at for at, (before, now) in enumerate(zip(*scores, strict=True)) if now < before)
        raise RegisterError(
            f"the served model scores {means[1]:.3f} where the trained weights score {means[0]:.3f} on {len(prompts)} "
            f"prompts; a drop of at most {ALLOWED_DROP} is allowed: use a finer student.quantize (q8_0 or f16). "
            f"First worse answer, example {prompts[worse].example}: "
            f"{difference(str(trained.texts[worse]), str(served.texts[worse]))}"
        )


def too_much_lost(delta: float, prompts: float) -> bool:
    """Whether a change of the metric's mean over so many prompts speaks against what is served: it is a drop of more
    than ALLOWED_DROP, and of more than one example."""
    return -delta > max(ALLOWED_DROP, 1 / prompts + 1e-6)  # the change is kept with six digits


def rendered_as_trained(
    tokens: Tokens, runtime: Runtime, endpoint: Endpoint, prompts: Sequence[Prompt]
) -> None:
    """Every prompt, rendered by the server, has the tokens of training; and so has the GGUF's own template."""
    for prompt in prompts:
        tokens.served(prompt.messages, runtime.render(endpoint, prompt.messages))
    if runtime.kind != "ollama":  # Ollama renders the Go template, the others what is inside the GGUF
        tokens.embedded_template()

"""The fixed part of a predictor's prompt, and stored answers as serving would see them by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.confidence import LocalAnswer
from serve.fingerprint import fingerprint, fixed_parts, query
from trainer.traces import Answer

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class FixedPrompt:
    """What `serve.fingerprint` knows a conversation by."""

    fingerprint: str
    prefix: str
    suffix: str

    @classmethod
    def of(cls, conversations: Sequence[Messages]) -> FixedPrompt:
        """The prompt that most of a predictor's conversations have; of none, one that nothing fits."""
        prints = [fingerprint(messages) for messages in conversations]
        common = Counter(prints).most_common(1)[0][0] if prints else ""
        known = zip(conversations, prints, strict=True)
        return cls(
            common, *fixed_parts([messages[-1]["content"] for messages, own in known if own == common])
        )

    def query(self, messages: Messages) -> str | None:
        """The variable part of a conversation; None where it is another prompt."""
        if fingerprint(messages) != self.fingerprint:
            return None
        return query(messages[-1]["content"], self.prefix, self.suffix)


def call_of(answer: Answer, predictor: str) -> dict[str, Any] | None:
    """The first call of a predictor."""
    return next((call for call in answer.calls if call["predictor"] == predictor), None)


def local_answer(answer: Answer, predictor: str, prompt: FixedPrompt) -> LocalAnswer | None:
    """A stored answer as serving would see it; None where serving would not give it."""
    call = call_of(answer, predictor)
    text = prompt.query(call["messages"]) if call else None
    if call is None or text is None:
        return None
    return LocalAnswer(
        call["completion"], call["logprobs"], call["finish_reason"], call["prompt_tokens"], text
    )

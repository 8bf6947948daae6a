"""Self-ask: the local model is asked whether it is confident of its own answer; reports and routing use the same words.

The simplest runner-up to a calibrated confidence: DSPy programs know it as `question, answer -> is_confident: bool`.
"""

from __future__ import annotations

RULE = (
    "You are given a question and an answer to it. Say whether you are confident that the answer is right. "
    "Reply with True or False and nothing else."
)
MAX_TOKENS = 8


def prompt(question: str, answer: str) -> str:
    """The message that asks; one alone, since not every model knows system messages."""
    return f"{RULE}\n\nquestion: {question}\n\nanswer: {answer}"


def score(reply: str) -> float:
    """1 for a reply that begins with true or yes, else 0: no clear yes is no confidence."""
    return float(reply.strip().lower().startswith(("true", "yes")))

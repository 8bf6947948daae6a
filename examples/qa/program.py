"""The technical question-answering example: one short answer, scored from 0 to 1."""

import re
from collections import Counter
from typing import Any

import dspy

LONG_WINDED = 40
FILLERS = frozenset({"a", "an", "and", "in", "is", "it", "of", "on", "or", "that", "the", "to"})


class Question(dspy.Signature):  # type: ignore[misc]
    """Answer a technical question in one short phrase."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField(desc="one phrase")


class Assistant(dspy.Module):  # type: ignore[misc]
    """One call a question."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.Predict(Question)

    def forward(self, question: str) -> dspy.Prediction:
        """Answers one question."""
        return self.answer(question=question)


def words(text: str) -> Counter[str]:
    """The words that carry meaning, with how often they occur; only fillers: all words."""
    found = re.findall(r"\w+", text.casefold())
    return Counter([word for word in found if word not in FILLERS] or found)


def overlap(wanted: str, given: str) -> float:
    """F1 of the words of two texts, 0..1: the harmonic mean of how much is there and how much is right."""
    one, other = words(wanted), words(given)
    shared = (one & other).total()
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def graded(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    """How much of the right answer is in the given one, 0..1, decided without asking a model.

    `dspy.evaluate.SemanticF1` takes its place where a judge may be asked; this one runs offline and
    always alike. With a trace, when an answer is about to become training data, a long-winded answer
    counts nothing, whatever it contains.
    """
    answer = str(prediction.answer)
    if trace is not None and len(answer.split()) > LONG_WINDED:
        return 0.0
    return overlap(str(example.answer), answer)

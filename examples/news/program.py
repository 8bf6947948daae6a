"""The news example: category, names and a summary of a short report, with the reasoning before them."""

from typing import Any, Literal

import dspy


class Report(dspy.Signature):  # type: ignore[misc]
    """Read a short news report."""

    text: str = dspy.InputField()
    category: Literal["politics", "business", "technology", "science", "sports", "culture"] = (
        dspy.OutputField()
    )
    entities: list[str] = dspy.OutputField(desc="people, places and organisations named")
    summary: str = dspy.OutputField(desc="one sentence")


class Reader(dspy.Module):  # type: ignore[misc]
    """One call a report; the model reasons first."""

    def __init__(self) -> None:
        super().__init__()
        self.read = dspy.ChainOfThought(Report)

    def forward(self, text: str) -> dspy.Prediction:
        """Reads one report."""
        return self.read(text=text)


def _names(values: Any) -> set[str]:
    """Names, whatever their case and spacing."""
    return {" ".join(str(value).casefold().split()) for value in values or ()}


def _agreement(wanted: set[str], given: set[str]) -> float:
    """F1 of two sets, 0..1; two empty ones agree."""
    return 2 * len(wanted & given) / (len(wanted) + len(given)) if wanted or given else 1.0


def correct(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    """The category is right and the names agree by half.

    With a trace, when an answer is about to become training data, the names must be exactly right, and
    the summary one sentence of at most 25 words that is no copy of the report.
    """
    if prediction.category != example.category:
        return False
    agreement = _agreement(_names(example.entities), _names(prediction.entities))
    if trace is None:
        return agreement >= 0.5
    words = str(prediction.summary).split()
    return (
        agreement == 1.0 and 3 <= len(words) <= 25 and str(prediction.summary).strip() != example.text.strip()
    )

"""The tickets example: sorts support tickets."""

from typing import Any, Literal

import dspy


class Ticket(dspy.Signature):  # type: ignore[misc]
    """Sort a support ticket."""

    text: str = dspy.InputField()
    category: Literal["billing", "login", "delivery", "outage", "feature", "returns", "other"] = (
        dspy.OutputField()
    )
    priority: Literal["low", "normal", "urgent"] = dspy.OutputField()
    entities: list[str] = dspy.OutputField(desc="numbers")
    summary: str = dspy.OutputField(desc="few words")


class Triage(dspy.Module):  # type: ignore[misc]
    """One call of the model per ticket."""

    def __init__(self) -> None:
        super().__init__()
        self.triage = dspy.Predict(Ticket)

    def forward(self, text: str) -> dspy.Prediction:
        """Sorts one ticket."""
        return self.triage(text=text)


def _names(values: Any) -> set[str]:
    """Entities, whatever their case and spacing."""
    return {" ".join(str(value).casefold().split()) for value in values or ()}


def correct(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    """Category and priority are right, and at least half of all entities named are right.

    With a trace, when an answer is about to become training data, the entities must be exactly
    right and the summary must not be empty.
    """
    if prediction.category != example.category or prediction.priority != example.priority:
        return False
    wanted, given = _names(example.entities), _names(prediction.entities)
    if trace is not None:
        return wanted == given and bool(str(prediction.summary).strip())
    return 2 * len(wanted & given) >= len(wanted | given)

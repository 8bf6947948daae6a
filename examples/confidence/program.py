"""The confidence example: a classifier that also says whether it is sure, and the hybrid built on that word."""

from typing import Any, Literal

import dspy


class Request(dspy.Signature):  # type: ignore[misc]
    """Sort what a hotel guest writes, and say whether the message leaves no doubt."""

    text: str = dspy.InputField()
    intent: Literal["booking", "checkout", "housekeeping", "dining", "repair", "directions"] = (
        dspy.OutputField()
    )
    is_confident: bool = dspy.OutputField()


class Desk(dspy.Module):  # type: ignore[misc]
    """One call a message."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(Request)

    def forward(self, text: str) -> dspy.Prediction:
        """Sorts one message."""
        return self.sort(text=text)


class SelfAsked(dspy.Module):  # type: ignore[misc]
    """The baseline: the local answer where the local model calls itself sure, else the API's.

    Nothing ties a model's word to how often it is right: that is what `certify` measures instead.
    """

    def __init__(self, local: dspy.Module, api: dspy.Module) -> None:
        super().__init__()
        self.local = local
        self.api = api

    def forward(self, text: str) -> dspy.Prediction:
        """Sorts one message; `route` says who answered."""
        answer = self.local(text=text)
        route = "local" if answer.is_confident else "api"
        return dspy.Prediction(**(answer if route == "local" else self.api(text=text)), route=route)


def correct(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    """The intent is right. With a trace, so must be whether the message leaves no doubt."""
    right = bool(prediction.intent == example.intent)
    return right and (trace is None or prediction.is_confident == example.is_confident)

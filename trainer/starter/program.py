"""The program that is distilled, and the metric that judges it. Replace both with your own."""

from typing import Literal

import dspy


class Review(dspy.Signature):
    """Say how the customer feels about the product."""

    text: str = dspy.InputField()
    sentiment: Literal["positive", "negative", "mixed"] = dspy.OutputField()
    reason: str = dspy.OutputField(desc="what the customer liked or disliked, in a few words")


class Judge(dspy.Module):
    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(Review)

    def forward(self, text):
        return self.judge(text=text)


def correct(example, prediction, trace=None):
    return prediction.sentiment == example.sentiment

"""What a capture will cost, said before the first call is made."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import dspy

from trainer.data import Example
from trainer.program import Program, adapter
from trainer.teacher.prices import DEFAULT_MAX_TOKENS, cost, price_of
from trainer.traces import Answer

CHARS_PER_TOKEN = 4.0
SAMPLE = 100
ANSWER_TOKENS_PER_FIELD = 40


@dataclass(frozen=True)
class Quote:
    """Calls and US dollars that are still to be spent."""

    examples: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float
    at_most_usd: float
    """If every answer were as long as the teacher may answer, at one call per predictor."""
    optimizes: bool = False
    """The prompt optimizer comes on top, within the budget."""

    def sentence(self) -> str:
        return (
            f"{self.examples} examples, {self.calls} calls, about {self.prompt_tokens + self.completion_tokens:,} "
            f"tokens: about ${self.usd:.2f}, at most ${self.at_most_usd:.2f}"
            + (", and the prompt optimizer's calls, within the budget" if self.optimizes else "")
        )


def quote(
    program: Program, open_examples: list[Example], answered: list[Answer], *, optimizes: bool = False
) -> Quote:
    """Estimate from what was already answered, else from the prompts as they would be rendered."""
    settings = program.task.settings.teacher
    calls = len(open_examples) * len(program.predictors)
    if answered:
        prompt = statistics.mean(answer.prompt_tokens for answer in answered) * len(open_examples)
        completion = statistics.mean(answer.completion_tokens for answer in answered) * len(open_examples)
    else:
        prompt = _prompt_tokens(program, open_examples[:SAMPLE]) * len(open_examples)
        completion = (
            len(open_examples)
            * ANSWER_TOKENS_PER_FIELD
            * sum(len(predictor.fields) for predictor in program.predictors.values())
        )
    price = price_of(settings)
    most = calls * (settings.max_tokens or DEFAULT_MAX_TOKENS)
    return Quote(
        examples=len(open_examples),
        calls=calls,
        prompt_tokens=round(prompt),
        completion_tokens=round(completion),
        usd=cost(price, prompt, completion),
        at_most_usd=cost(price, prompt * 2, most),
        optimizes=optimizes,
    )


def prompts(program: Program, example: Example) -> list[list[dict[str, str]]]:
    """The messages of every predictor for an example; what another predictor gives counts as a short text."""
    found = []
    for _, predict in program.module.named_predictors():
        inputs = {
            name: example.values.get(name, "an intermediate text of some length")
            for name in predict.signature.input_fields
        }
        demos = [dspy.Example(demo) for demo in predict.demos]
        found.append(adapter().format(predict.signature, demos, inputs))
    return found


def _prompt_tokens(program: Program, sample: list[Example]) -> float:
    """Mean prompt tokens of one example, over all predictors."""
    if not sample:
        return 0.0
    total = sum(
        len(str(message["content"]))
        for example in sample
        for messages in prompts(program, example)
        for message in messages
    )
    return total / len(sample) / CHARS_PER_TOKEN

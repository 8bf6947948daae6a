"""What a call costs: prices per model, worst case reserved until the call is stored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.errors import BudgetError, HomestillError, TeacherError
from trainer.settings import Price, TeacherSettings

DEFAULT_MAX_TOKENS = 4096


@dataclass(frozen=True)
class Usage:
    """Tokens and US dollars of one call."""

    prompt_tokens: int
    completion_tokens: int
    cost_usd: float


def price_of(teacher: TeacherSettings) -> Price:
    """US dollars per million tokens: from task.yaml, else from the price list that DSPy ships.

    Raises:
        TeacherError: the price is unknown; it is never taken for 0.
    """
    if teacher.price_per_1m:
        return teacher.price_per_1m
    from dspy.clients.model_metadata import model_info

    provider, _, model = teacher.model.rpartition("/")
    info = {} if teacher.api_base else model_info(provider or "openai", model)
    if "input_cost_per_token" not in info or "output_cost_per_token" not in info:
        where = f" at {teacher.api_base}" if teacher.api_base else ""
        raise TeacherError(
            f"the price of {teacher.model}{where} is not known; "
            "set teacher.price_per_1m: {input: USD, output: USD} in task.yaml"
        )
    return Price(input=info["input_cost_per_token"] * 1e6, output=info["output_cost_per_token"] * 1e6)


def cost(price: Price, prompt_tokens: float, completion_tokens: float) -> float:
    """US dollars for so many tokens."""
    return (price.input * prompt_tokens + price.output * completion_tokens) / 1e6


@dataclass(frozen=True)
class Bill:
    """One reserved call; `settled` is what it really cost."""

    price: Price
    worst: Usage

    def settled(self, prompt_tokens: int | None, completion_tokens: int | None) -> Usage:
        """Tokens as the provider counted them; what it did not count stays at the worst case."""
        prompt = self.worst.prompt_tokens if prompt_tokens is None else prompt_tokens
        completion = self.worst.completion_tokens if completion_tokens is None else completion_tokens
        return Usage(prompt, completion, cost(self.price, prompt, completion))


class Ledger:
    """A hard budget shared by all threads: a call that could pass it is refused before it is made.

    What is spent is asked anew for every call, so ledgers of one task, in other processes too, count together;
    only what is on its way is each ledger's own.

    Args:
        spent: US dollars that the task's stored calls have cost.
    """

    def __init__(self, price: Price, budget_usd: float, spent: Callable[[], float]) -> None:
        self._price = price
        self._budget = budget_usd
        self._spent = spent
        self._held = 0.0
        self._lock = threading.Lock()
        self.refused: dict[str, Exception] = {}
        """The calls that could not be bought, whoever swallowed their errors."""
        self.closed: HomestillError | None = None
        """Why nothing more is bought: a call that was paid for could not be stored, nor would the next one be."""

    @property
    def spent_usd(self) -> float:
        """Stored and reserved together."""
        return self._spent() + self._held

    @contextmanager
    def reserved(self, messages: list[dict[str, str]], max_tokens: int | None) -> Iterator[Bill]:
        """Hold the most that a call can cost: a token per byte of the prompt, and the longest answer.

        What the call did cost is to be stored before the reservation ends: a call counts twice for a moment,
        never not at all.

        Raises:
            BudgetError: it could pass the budget.
            HomestillError: an earlier call could not be stored.
        """
        if self.closed:
            raise self.closed
        prompt = sum(len(message["content"].encode()) + 8 for message in messages)
        completion = max_tokens or DEFAULT_MAX_TOKENS
        worst = Usage(prompt, completion, cost(self._price, prompt, completion))
        with self._lock:
            if (spent := self.spent_usd) + worst.cost_usd > self._budget:
                raise BudgetError(
                    f"teacher.budget_usd is {self._budget:g}, {spent:.4f} are spent or reserved and the next "
                    f"call can cost {worst.cost_usd:.4f}; raise the budget and run again, nothing is paid twice"
                )
            self._held += worst.cost_usd
        try:
            yield Bill(self._price, worst)
        finally:
            with self._lock:
                self._held -= worst.cost_usd

"""Prices and the ledger."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from trainer.errors import BudgetError, TeacherError
from trainer.settings import Price, TeacherSettings
from trainer.teacher.prices import Ledger, cost, price_of

MESSAGES = [{"role": "user", "content": "x" * 92}]  # 100 tokens at most


def test_price_comes_from_the_task_or_from_the_known_list() -> None:
    given = Price(input=1, output=2)
    assert price_of(TeacherSettings(model="any/thing", price_per_1m=given)) == given
    known = price_of(TeacherSettings(model="openai/gpt-4o"))
    assert known.input > 0
    assert known.output > known.input


def test_a_private_gateway_has_no_known_price_even_under_a_known_name() -> None:
    with pytest.raises(TeacherError, match=r"price_per_1m.*task.yaml"):
        price_of(TeacherSettings(model="openai/gpt-4o", api_base="http://127.0.0.1:1/v1"))


def test_cost_is_per_million_tokens() -> None:
    assert cost(Price(input=2.5, output=10), 1_000_000, 100_000) == pytest.approx(3.5)


def test_a_failed_call_gives_its_reservation_back() -> None:
    ledger = Ledger(Price(input=1e4, output=0), budget_usd=1.5, spent=lambda: 0.0)
    with pytest.raises(RuntimeError), ledger.reserved(MESSAGES, 1):
        raise RuntimeError
    assert ledger.spent_usd == 0


def test_concurrent_calls_never_pass_the_budget() -> None:
    stored: list[float] = []  # each call costs $1
    ledger = Ledger(Price(input=1e4, output=0), budget_usd=10, spent=lambda: sum(stored))

    def call(_: int) -> bool:
        try:
            with ledger.reserved(MESSAGES, 1) as bill:
                stored.append(bill.settled(100, 0).cost_usd)
        except BudgetError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        made = sum(pool.map(call, range(50)))
    assert 9 <= made <= 10  # a call that is being stored counts twice for a moment
    assert ledger.spent_usd == pytest.approx(made)

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.config import Config, Price, TaskRules
from serve.errors import BudgetExceeded, BudgetUnknown, SettingsError
from serve.guard.budget import LONGEST_ANSWER, NANO, Budget, Reservation, capped, worst_case
from serve.guard.keys import ANONYMOUS, Caller

PRICE = Price(input=2.0, output=10.0)
MORNING = 1_800_000_000.0
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000}
WORST = worst_case(BODY, PRICE) / NANO


class Clock:
    now = MORNING

    def __call__(self) -> float:
        return self.now


def admit(
    budget: Budget,
    *,
    task: str = "t",
    cap: float | None = None,
    caller: Caller = ANONYMOUS,
    price: Price | None = PRICE,
) -> Reservation:
    return budget.admit(BODY, price, task=task, rules=TaskRules(daily_usd=cap), caller=caller)


def test_the_worst_case_is_put_aside_and_the_rest_given_back(tmp_path: Path) -> None:
    budget = Budget(tmp_path / "budget.db", Config(daily_usd=1))
    reservation = admit(budget)
    assert budget.spent_usd() == pytest.approx(WORST)
    reservation.settle(0.003)
    reservation.settle(0.5)  # once is enough
    assert (budget.spent_usd(), budget.spent_usd("task t"), budget.spent_usd("key anonymous")) == (0.003,) * 3


@pytest.mark.parametrize(
    ("scope", "config", "task_cap", "caller"),
    [
        ("all", Config(daily_usd=WORST * 2.5), None, ANONYMOUS),
        ("task t", Config(), WORST * 2.5, ANONYMOUS),
        ("key alice", Config(), None, Caller("alice", daily_usd=WORST * 2.5)),
    ],
)
def test_a_call_that_might_pass_a_cap_is_not_made(
    tmp_path: Path, scope: str, config: Config, task_cap: float | None, caller: Caller
) -> None:
    clock = Clock()
    budget = Budget(tmp_path / "budget.db", config, clock)
    first, _ = admit(budget, cap=task_cap, caller=caller), admit(budget, cap=task_cap, caller=caller)
    with pytest.raises(BudgetExceeded, match=f"cap of {scope}") as caught:
        admit(budget, cap=task_cap, caller=caller)
    assert caught.value.retry_after_s == 86_400 - MORNING % 86_400
    first.settle(0.0)
    admit(budget, cap=task_cap, caller=caller)
    clock.now += 86_400  # another day, another cap
    admit(budget, cap=task_cap, caller=caller)


def test_what_nobody_knows_the_cost_of_stays_spent_at_its_worst(tmp_path: Path) -> None:
    budget = Budget(tmp_path / "budget.db", Config(daily_usd=1))
    admit(budget).settle(None)
    assert budget.spent_usd() == pytest.approx(WORST)


def test_an_attempt_that_may_have_to_be_paid_for_is_paid_for_beside_the_next(tmp_path: Path) -> None:
    budget = Budget(tmp_path / "budget.db", Config(daily_usd=WORST * 2.5))
    reservation = admit(budget)
    reservation.again()
    assert budget.spent_usd() == pytest.approx(WORST * 2)
    with pytest.raises(BudgetExceeded):
        reservation.again()
    reservation.settle(0.0)
    assert budget.spent_usd() == pytest.approx(WORST * 2)
    free = Budget(tmp_path / "b.db", Config())
    uncapped = admit(free)
    uncapped.again()
    uncapped.settle(0.5)
    assert free.spent_usd() == 0.5


def test_under_a_cap_an_unknown_price_is_an_error_and_never_nothing(tmp_path: Path) -> None:
    with pytest.raises(BudgetUnknown, match=r'price of "m" is not known.*serve\.yaml'):
        admit(Budget(tmp_path / "a.db", Config(daily_usd=1)), price=None)
    assert admit(Budget(tmp_path / "b.db", Config()), price=None).body == BODY


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
                ]
            },
            "image_url",
        ),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "audio"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"web_search_options": {"search_context_size": "high"}}, "web_search_options"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"service_tier": "priority"}, "service_tier priority"),
        ({"plugins": [{"id": "web"}]}, "plugins"),
        ({"tools": [{"type": "web_search"}]}, "a tool of type web_search"),
    ],
)
def test_under_a_cap_what_tokens_do_not_bound_is_refused(
    tmp_path: Path, wish: dict[str, Any], named: str
) -> None:
    capped_, free = (Budget(tmp_path / f"{usd}.db", Config(daily_usd=usd)) for usd in (1, None))
    with pytest.raises(BudgetUnknown, match=f"{named} costs at most is not known"):
        capped_.admit({**BODY, **wish}, PRICE, task="t", rules=TaskRules(), caller=ANONYMOUS)
    free.admit({**BODY, **wish}, PRICE, task="t", rules=TaskRules(), caller=ANONYMOUS)


def test_of_two_limits_for_the_answer_the_larger_one_counts() -> None:
    both = {**BODY, "max_completion_tokens": 5, "max_tokens": 1000}
    assert worst_case(both, PRICE) >= WORST * NANO


def test_what_is_spent_without_a_cap_is_counted_and_outlives_the_process(tmp_path: Path) -> None:
    clock = Clock()
    budget = Budget(tmp_path / "budget.db", Config(), clock)
    for _ in range(10):
        admit(budget).settle(0.25)
        admit(budget, price=None).settle(None)
        clock.now += 0.5
    assert budget.spent_usd() == 2.5
    budget.close()
    with pytest.raises(BudgetExceeded, match=r"\$2\.5 are spent"):
        admit(Budget(tmp_path / "budget.db", Config(daily_usd=2.5), clock))


def test_a_file_that_cannot_be_written_stops_capped_calls_and_costs_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    budget = Budget(tmp_path / "budget.db", Config(daily_usd=1))
    open_call = admit(budget)
    other = sqlite3.connect(tmp_path / "budget.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # as a full disk would, from budget's view
    with pytest.raises(BudgetUnknown, match=r"cannot be put down .*make budget\.db writable"):
        admit(budget)
    with caplog.at_level(logging.ERROR, "serve"):
        open_call.settle(0.0)
    assert "stays spent at its worst case" in caplog.text
    other.execute("ROLLBACK")
    assert budget.spent_usd() == pytest.approx(WORST)
    admit(budget).settle(0.0)


def test_a_file_that_is_no_budget_is_named(tmp_path: Path) -> None:
    (tmp_path / "budget.db").write_text("something else, and long enough to be no empty database " * 50)
    with pytest.raises(SettingsError, match=r"budget\.db cannot be used .*move it away"):
        Budget(tmp_path / "budget.db", Config())


def test_an_answer_without_a_limit_gets_one(tmp_path: Path) -> None:
    body = {"model": "m", "messages": BODY["messages"]}
    budget = Budget(tmp_path / "budget.db", Config(daily_usd=1))
    sent = budget.admit(body, PRICE, task="t", rules=TaskRules(), caller=ANONYMOUS).body
    assert sent["max_completion_tokens"] == LONGEST_ANSWER
    assert (
        Budget(tmp_path / "b.db", Config())
        .admit(body, PRICE, task="t", rules=TaskRules(), caller=ANONYMOUS)
        .body
        == body
    )


@given(st.text(max_size=200), st.integers(1, 5000), st.integers(1, 5))
def test_no_tokenizer_makes_it_dearer_than_its_worst_case(text: str, longest: int, n: int) -> None:
    """A token holds at least one byte."""
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": longest, "n": n}
    most = PRICE.input * len(text.encode()) + PRICE.output * longest * n
    assert worst_case(capped(body), PRICE) / NANO >= most / 1e6


def test_no_order_of_calls_passes_a_cap(tmp_path: Path) -> None:
    random, cap = Random(1), WORST * 5
    budget, paid = Budget(tmp_path / "budget.db", Config(daily_usd=cap)), 0.0
    waiting: list[Reservation] = []
    refused = 0
    for _ in range(300):
        if waiting and random.random() < 0.5:
            cost = random.choice([random.uniform(0, WORST), WORST, None])
            waiting.pop(random.randrange(len(waiting))).settle(cost)
            paid += WORST if cost is None else cost
        try:
            waiting.append(admit(budget))
        except BudgetExceeded:
            refused += 1
        assert paid <= cap
        assert budget.spent_usd() <= cap
    assert refused


def test_two_processes_share_one_cap(tmp_path: Path) -> None:
    one, other = (Budget(tmp_path / "budget.db", Config(daily_usd=WORST * 1.5)) for _ in range(2))
    admit(one)
    with pytest.raises(BudgetExceeded):
        admit(other)


def test_a_kill_loses_no_reservation(tmp_path: Path) -> None:
    """The child says how many calls it has begun; the next process knows of every one, at its worst case."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from serve.config import Config
from serve.guard.budget import Budget
from tests.serve.guard.test_budget import admit
budget = Budget(Path({str(tmp_path)!r}) / "budget.db", Config(daily_usd=1e6))
for number in range(1, 10**9):
    admit(budget)
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout
        begun = [int(child.stdout.readline()) for _ in range(20)][-1]
        os.kill(child.pid, signal.SIGKILL)
        begun = max([begun, *(int(line) for line in child.stdout if line.endswith(b"\n"))])
    spent = Budget(tmp_path / "budget.db", Config(daily_usd=1e6)).spent_usd()
    assert begun * WORST <= spent + 1e-9 <= (begun + 1) * WORST + 2e-9

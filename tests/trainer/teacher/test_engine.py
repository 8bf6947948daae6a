"""The engines between a program and a model: calls are recorded, bought once and replayed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy import lm15
from dspy._vendor.lm15.transports import ConnectError
from dspy.lm15 import Message, Request, Response, Usage

from trainer.errors import BudgetError, DiskError, TeacherError
from trainer.lm import session
from trainer.settings import Price
from trainer.teacher.engine import Teacher
from trainer.teacher.prices import Ledger
from trainer.traces import Store, Trace


class Counted:
    """An engine in place of the provider."""

    def __init__(self, *failures: BaseException) -> None:
        self.requests: list[Request] = []
        self.usage = Usage(input_tokens=1_000_000, output_tokens=0)
        self.says = "answer {}"
        self.failures = list(failures)
        """Raised one after the other before it answers."""

    def complete(self, request: Request) -> Response:
        self.requests.append(request)
        if self.failures:
            raise self.failures.pop(0)
        said = Message.assistant(self.says.format(len(self.requests)))
        return Response(id=None, model=request.model, message=said, finish_reason="stop", usage=self.usage)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path / 'traces.db'}")
    yield opened
    opened.close()


def teacher(
    store: Store,
    provider: Counted,
    budget: float = 100,
    stopping: threading.Event | None = None,
    retries: int = 0,
) -> dspy.LM:
    identity = {"task": "t", "program": "p", "teacher": "m/x", "stand_in": False, "purpose": "capture"}
    ledger = Ledger(Price(input=1, output=1), budget, lambda: store.spent("t"))
    engine = Teacher(
        lambda: dspy.LM("m/x", engine=provider, cache=False, num_retries=0),
        store,
        ledger,
        identity,
        stopping=stopping,
    )
    return dspy.LM("m/x", engine=engine, cache=False, num_retries=retries, max_tokens=10)


def ask(lm: dspy.LM, example: str, *questions: str) -> list[dict[str, Any]]:
    with session(example, {}) as opened:
        for question in questions:
            lm(question)
    return opened.calls


def test_a_call_is_bought_once_and_replayed_by_another_process(store: Store) -> None:
    provider = Counted()
    first = ask(teacher(store, provider), "a", "hello")
    again = ask(teacher(store, provider), "a", "hello")
    assert first == again
    assert len(provider.requests) == 1
    assert store.spent("t") == pytest.approx(1.0)


def test_the_same_question_twice_in_one_example_is_two_calls(store: Store) -> None:
    provider = Counted()
    calls = ask(teacher(store, provider), "a", "hello", "hello")
    assert [call["completion"] for call in calls] == ["answer 1", "answer 2"]
    assert ask(teacher(store, provider), "a", "hello", "hello") == calls
    assert len(provider.requests) == 2


def test_another_example_or_another_question_is_another_call(store: Store) -> None:
    provider = Counted()
    ask(teacher(store, provider), "a", "hello", "bye")
    ask(teacher(store, provider), "b", "hello")
    assert len(provider.requests) == 3


def test_budget_counts_what_other_processes_spent(store: Store) -> None:
    provider = Counted()
    ask(teacher(store, provider, budget=1.5), "a", "hello")
    provider.usage = Usage(input_tokens=600_000, output_tokens=0)
    ask(teacher(store, provider, budget=1.5), "b", "hello")
    with pytest.raises(Exception, match="budget_usd") as caught:
        ask(teacher(store, provider, budget=1.5), "c", "hello")
    assert isinstance(caught.value.__cause__, BudgetError)
    assert len(provider.requests) == 2


def test_ledgers_that_were_opened_before_anything_was_bought_share_the_budget(store: Store) -> None:
    provider = Counted()
    models = [teacher(store, provider, budget=1.5) for _ in range(3)]
    ask(models[0], "a", "hello")
    with pytest.raises(Exception, match=r"1\.5000 are spent or reserved") as caught:
        for example in ("b", "c"):
            provider.usage = Usage(input_tokens=500_000, output_tokens=0)
            ask(models[1 + (example == "c")], example, "hello")
    assert isinstance(caught.value.__cause__, BudgetError)
    assert store.spent("t") <= 1.5


WORST = (len("hello") + 8 + 10) / 1e6
LATE = lm15.TimeoutError("no answer in time")
LATE.retry_after = 0.0


def unreachable() -> lm15.TransportError:
    error = lm15.TransportError("connection refused")
    error.__cause__ = ConnectError("connection refused")
    return error


@pytest.mark.parametrize(
    ("failure", "usd"),
    [
        (LATE, WORST),
        (lm15.TransportError("broke off"), WORST),
        (ValueError("not the answer's shape"), WORST),
        (KeyboardInterrupt(), WORST),
        (unreachable(), 0),
        (lm15.AuthError("no"), 0),
        (lm15.RateLimitError("slower"), 0),
        (lm15.ServerError("not now"), 0),
        (lm15.NotConfiguredError("no key"), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failed_call_counts_as_spent_unless_the_provider_refused_or_never_had_it(
    store: Store, failure: BaseException, usd: float
) -> None:
    lm = teacher(store, Counted(failure))
    with pytest.raises(BaseException):  # noqa: B017  whichever it is
        ask(lm, "a", "hello")
    assert store.spent("t") == pytest.approx(usd)
    assert ask(lm, "a", "hello")[0]["completion"] == "answer 2"
    assert store.spent("t") == pytest.approx(1 + usd)


def test_every_attempt_is_reckoned_with_and_a_success_takes_the_refusal_back(store: Store) -> None:
    provider = Counted(LATE, LATE)
    with session("a", {}) as opened:
        teacher(store, provider, retries=2)("hello")
    assert not opened.refused
    assert len(provider.requests) == 3
    assert store.spent("t") == pytest.approx(1 + 2 * WORST)
    with pytest.raises(Exception, match="budget_usd") as caught, session("b", {}) as opened:
        teacher(store, Counted(LATE), budget=1 + 3.5 * WORST, retries=2)("hello")
    assert isinstance(caught.value.__cause__, BudgetError)
    assert opened.refused


def test_once_stopping_nothing_is_bought_but_what_is_stored_is_replayed(store: Store) -> None:
    provider, stopping = Counted(), threading.Event()
    lm = teacher(store, provider, stopping=stopping)
    ask(lm, "a", "hello")
    stopping.set()
    assert len(ask(lm, "a", "hello")) == 1
    with pytest.raises(Exception, match="being stopped") as caught:
        ask(lm, "b", "hello")
    assert isinstance(caught.value.__cause__, TeacherError)


def test_half_a_character_is_paid_for_once_too(store: Store) -> None:
    provider = Counted()
    provider.says = "cut \ud83d"
    (first,) = ask(teacher(store, provider), "e1", "q")
    (again,) = ask(teacher(store, provider), "e1", "q")
    assert first["completion"] == again["completion"] == "cut ?"
    assert len(provider.requests) == 1


def test_uncounted_tokens_are_billed_at_the_worst_case(store: Store) -> None:
    provider = Counted()
    provider.usage = Usage()
    (call,) = ask(teacher(store, provider), "a", "hello")
    trace_cost = store.spent("t")
    assert trace_cost == pytest.approx((len("hello") + 8 + 10) / 1e6)
    assert call["cost_usd"] == trace_cost


def test_once_a_call_could_not_be_stored_none_is_bought(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Trace) -> None:
        raise DiskError("the disk is full")

    provider = Counted()
    lm = teacher(store, provider, retries=3)
    monkeypatch.setattr(store, "add_trace", full)
    for example in ("a", "b"):
        with session(example, {}) as opened, pytest.raises(Exception, match="the disk is full"):
            lm("hello")
        assert [type(error) for error in opened.refused.values()] == [DiskError]
    assert len(provider.requests) == 1

from __future__ import annotations

import pytest

from serve.confidence import Field
from trainer.statistics.audit import Pair, baseline, worded_alike

FIELDS = [Field("reasoning"), Field("label", ("a", "b")), Field("city")]


def said(label: str, reasoning: str = "", city: str = "Rome") -> str:
    parts = {"reasoning": reasoning, "label": label, "city": city}
    return "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in parts.items())


def pairs(agreeing: int, differing: int) -> list[Pair]:
    same = [(said("a", "because"), said("a", f"since {number}")) for number in range(agreeing)]
    return same + [(said("a"), said("b"))] * differing


def test_free_text_is_not_compared_and_the_rest_is() -> None:
    assert [field.name for field in worded_alike(pairs(8, 2), FIELDS)] == ["label", "city"]


def test_where_nothing_is_alike_everything_is_compared() -> None:
    assert worded_alike([(said("a", "x", "Rome"), said("b", "y", "Bonn"))], FIELDS) == FIELDS
    assert worded_alike([], FIELDS) == FIELDS


def test_the_rate_is_counted_on_rows_that_chose_nothing() -> None:
    found = baseline(pairs(8, 2), pairs(99, 1), FIELDS)
    assert (found["fields"], found["kept"], found["disagreed"]) == (["label", "city"], 100, 1)
    assert found["upper"] == pytest.approx(0.05446, abs=1e-4)  # Clopper–Pearson 97.5 % of 1 in 100


def test_an_answer_that_cannot_be_read_differs() -> None:
    found = baseline(pairs(1, 0), [(said("a"), "I cannot help with that")], FIELDS)
    assert (found["disagreed"], found["upper"]) == (1, 1.0)


def test_where_nothing_is_kept_nothing_is_known() -> None:
    assert baseline([], [], FIELDS)["upper"] == 1.0

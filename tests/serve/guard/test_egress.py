from __future__ import annotations

import itertools
from typing import get_args

import pytest

from serve.config import Egress
from serve.errors import ApiError
from serve.guard.egress import from_header, strictest


def test_the_strictest_rule_holds_in_whatever_order() -> None:
    order = get_args(Egress)
    for rules in itertools.product(order, repeat=3):
        assert order.index(strictest(*rules)) == max(map(order.index, rules))
    assert strictest() == "allow"


@pytest.mark.parametrize(
    ("value", "rule"), [(None, "allow"), ("", "allow"), (" Never ", "never"), ("redact", "redact")]
)
def test_a_header_asks_for_a_rule(value: str | None, rule: str) -> None:
    assert from_header(value) == rule


@pytest.mark.parametrize("value", ["no", "allow, never", "neverr", "\x00"])
def test_what_is_no_rule_lets_nothing_out(value: str) -> None:
    with pytest.raises(ApiError) as caught:
        from_header(value)
    assert caught.value.status == 400

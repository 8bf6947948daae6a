from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.upstreams.breaker import Breaker, Resting, State


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock, failures: int = 3) -> Breaker:
    breaker = Breaker(failures, rest_s=10.0, clock=clock)
    for _ in range(failures):
        breaker.failed(breaker.admit(), "it hung up")
    return breaker


def state(breaker: Breaker) -> State:
    """Asked through a function, so that mypy does not think it stays as it was."""
    return breaker.state


def test_failures_in_a_row_open_it() -> None:
    breaker = Breaker(3, 10.0, Clock())
    for outcome in "ffsff":
        ticket = breaker.admit()
        breaker.failed(ticket, "no") if outcome == "f" else breaker.succeeded(ticket)
    assert state(breaker) == "closed"
    breaker.failed(breaker.admit(), "it hung up")
    assert state(breaker) == "open"
    with pytest.raises(Resting, match="it hung up") as raised:
        breaker.admit()
    assert raised.value.wait_s == 10.0


def test_one_probe_and_no_more() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 9.9
    with pytest.raises(Resting):
        breaker.admit()
    clock.now += 0.1
    assert state(breaker) == "half_open"
    probe = breaker.admit()
    assert not breaker.allows_retry(probe)
    with pytest.raises(Resting):
        breaker.admit()
    breaker.failed(probe, "still no")
    assert state(breaker) == "open"
    with pytest.raises(Resting, match="still no"):
        breaker.admit()
    clock.now += 10
    breaker.succeeded(breaker.admit())
    assert state(breaker) == "closed"
    assert breaker.allows_retry(breaker.admit())


def test_a_probe_that_was_ended_from_our_side_makes_room_for_another() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    breaker.gave_up(breaker.admit())
    breaker.succeeded(breaker.admit())
    assert state(breaker) == "closed"


def test_a_probe_that_has_begun_to_answer_closes_it() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    probe = breaker.admit()
    breaker.alive(probe)
    assert state(breaker) == "closed"
    breaker.gave_up(probe)
    assert state(breaker) == "closed"


def test_outcomes_from_before_the_change_are_ignored() -> None:
    clock = Clock()
    breaker = Breaker(1, 10.0, clock)
    old = [breaker.admit() for _ in range(4)]
    breaker.failed(old[0], "first")
    clock.now += 5
    breaker.failed(old[1], "second")  # does not begin the rest anew
    breaker.succeeded(old[2])  # nor end it
    assert state(breaker) == "open"
    clock.now += 5
    probe = breaker.admit()
    breaker.gave_up(old[3])
    with pytest.raises(Resting):
        breaker.admit()
    breaker.succeeded(probe)
    assert state(breaker) == "closed"


@given(st.lists(st.tuples(st.sampled_from("asfgwl"), st.integers(0, 5)), max_size=60))
def test_it_never_wedges_and_never_lets_two_probes_in(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    breaker = Breaker(2, 10.0, clock)
    under_way: list[tuple[int, bool]] = []
    for step, which in steps:
        if step == "w":
            clock.now += 4
        elif step == "a":
            was = state(breaker)
            try:
                under_way.append((breaker.admit(), was == "half_open"))
            except Resting:
                assert was != "closed"
        elif under_way:
            ticket, _ = under_way.pop(which % len(under_way))
            {"s": breaker.succeeded, "g": breaker.gave_up, "l": breaker.alive}.get(
                step, lambda each: breaker.failed(each, "no")
            )(ticket)
        assert sum(probe for ticket, probe in under_way if ticket == breaker._ticket) <= 1
    for ticket, _ in under_way:
        breaker.gave_up(ticket)
    clock.now += 10
    breaker.succeeded(breaker.admit())
    assert state(breaker) == "closed"

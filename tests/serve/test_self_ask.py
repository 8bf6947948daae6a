"""Self-ask takes a clear yes only."""

from __future__ import annotations

import pytest

from serve import self_ask


@pytest.mark.parametrize(
    ("reply", "score"),
    [("True", 1.0), (" yes.", 1.0), ("False", 0.0), ("I think it is true", 0.0), ("", 0.0)],
)
def test_only_a_clear_yes_counts(reply: str, score: float) -> None:
    assert self_ask.score(reply) == score


def test_it_shows_question_and_answer() -> None:
    asked = self_ask.prompt("2 + 2?", "4")

    assert asked.startswith(self_ask.RULE)
    assert "question: 2 + 2?" in asked
    assert "answer: 4" in asked

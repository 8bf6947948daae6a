"""The teacher's part where one predictor of a program is local: what it may cost, and what was bought."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trainer.traces import Answer


def usual_cost(answers: Iterable[Answer], predictor: str) -> float:
    """US dollars that the calls of the other predictors have cost in the teacher's own runs."""
    calls = (call for answer in answers for call in answer.calls if call["predictor"] != predictor)
    return sum(float(call["cost_usd"]) for call in calls)


def bought(teacher: Mapping[str, Answer], mixed: Iterable[Answer], predictor: str) -> float:
    """US dollars paid for calls of the other predictors that the teacher's own runs did not hold.

    Args:
        teacher: its own runs, by example.
        mixed: runs with the predictor on a local model; what two of them asked alike was bought once.
    """
    seen = {_key(answer, call) for answer in teacher.values() for call in answer.calls}
    paid = 0.0
    for answer in mixed:
        for call in answer.calls:
            key = _key(answer, call)
            if call["predictor"] != predictor and key not in seen:
                seen.add(key)
                paid += float(call["cost_usd"])
    return paid


def _key(answer: Answer, call: Mapping[str, object]) -> tuple[str, str, str]:
    return answer.example, str(call["predictor"]), str(call["messages"])

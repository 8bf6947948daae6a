"""The verdict never flatters: shares are rounded down, a refusal is named, missing savings are said."""

from __future__ import annotations

from typing import Any

import pytest

from serve.manifest import Manifest
from trainer.reporting.verdict import criteria, exact, percent, sentence

SCORE = {"mean": 0.9, "low": 0.87, "high": 0.93, "n": 400}


def manifest(**changes: Any) -> Manifest:
    value: dict[str, Any] = {
        "task": "words",
        "version": "20261120T221500Z-00000000",
        "base": {"name": "tiny", "sha256": "0" * 64},
        "method": "lora",
        "data": {"train": 600, "calibrate": 400, "test": 400, "sha256": "0" * 64},
        "teacher": {"model": "openai/gpt-4o", "stand_in": False},
        "model": {"file": "model.gguf", "sha256": "0" * 64, "quantization": "q8_0"},
        "parity": {"prompt_tokens_equal": True},
        "scores": {"teacher": SCORE, "base": SCORE, "student": SCORE, "hybrid": SCORE},
        "router": {
            "threshold": 0.8,
            "certified": True,
            "keep": 0.995,
            "confidence": 0.95,
            "local_share": 0.869,
        },
        "latency_ms": {"teacher": {"p50": 300, "p95": 900}, "local": {"p50": 40, "p95": 70}},
        "cost_per_1k_usd": {"teacher": 2.5, "hybrid": 0.5},
        "software": {},
        "seed": 0,
        "files": {},
    }
    return Manifest.model_validate(value | changes)


def state_of(found: Manifest, name: str, spent: float = 1.0) -> tuple[str, str]:
    return next((each.state, each.text) for each in criteria(found, spent) if each.name == name)


@pytest.mark.parametrize(
    ("share", "text"), [(0.996, "99 %"), (1.0, "100 %"), (0.29, "29 %"), (0.004, "under 1 %"), (0.0, "0 %")]
)
def test_measured_shares_are_rounded_down(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(("share", "text"), [(0.995, "99.5 %"), (0.95, "95 %"), (0.29, "29 %")])
def test_set_shares_are_exact(share: float, text: str) -> None:
    assert exact(share) == text


def test_a_refusal_counts_examples_and_a_certificate_of_before_its_rows() -> None:
    router = {"threshold": None, "certified": False, "keep": 0.98, "confidence": 0.95, "local_share": 0.0}
    refused = manifest(router=router)
    now, before = {"rows_missing": 60, "examples_missing": 100}, {"rows_missing": 60}
    assert "about 100 more examples in the calibrate split" in sentence(refused, now)
    assert "about 60 more calibration rows" in sentence(refused, before)
    assert "no threshold could be certified" in sentence(refused, {})


def test_a_model_for_one_predictor_promises_no_more_than_that() -> None:
    one = manifest(predictor="sort")
    assert sentence(one, {}).startswith("86 % of the calls of sort are answered locally")
    assert state_of(one, "Privacy") == (
        "no",
        "the program's other predictors tell the teacher of every request",
    )
    assert state_of(one, "Independence")[0] == "no"


def test_a_certificate_in_a_sentence() -> None:
    assert sentence(manifest(), {}) == (
        "86 % of requests are answered locally, with at least 99.5 % of the teacher's score at 95 % confidence."
    )


def test_savings_and_when_the_traces_are_paid_back() -> None:
    state, text = state_of(manifest(), "Cost", spent=10.0)
    assert state == "yes"
    assert "saves $2.00 of API cost per 1,000 requests ($200 a month" in text
    assert "$10.00 are back after 5,000 requests" in text


def test_no_savings_are_said() -> None:
    state, text = state_of(manifest(cost_per_1k_usd={"teacher": 0.0, "hybrid": 0.0}), "Cost")
    assert (state, "no API cost is saved" in text) == ("no", True)


def test_a_slower_local_model_is_called_slower() -> None:
    latency = {"teacher": {"p50": 30, "p95": 90}, "local": {"p50": 40, "p95": 70}}
    state, text = state_of(manifest(latency_ms=latency), "Latency")
    assert (state, "slower" in text) == ("no", True)


def test_few_examples_count_against_it() -> None:
    data = {"train": 49, "calibrate": 400, "test": 400, "sha256": "0" * 64}
    assert state_of(manifest(data=data), "Data")[0] == "no"


UNCERTIFIED = {"threshold": None, "certified": False, "keep": 0.95, "confidence": 0.95, "local_share": 0.0}


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        (0.8, ("partly", "alone, the student keeps 88 % of the teacher's score")),
        (0.7, ("no", "alone, the student keeps 77 % of the teacher's score")),
    ],
)
def test_without_a_certificate_quality_goes_by_the_student(student: float, expected: tuple[str, str]) -> None:
    scores = {"teacher": SCORE, "base": SCORE, "student": SCORE | {"mean": student}, "hybrid": SCORE}
    state, text = state_of(manifest(router=UNCERTIFIED, scores=scores), "Quality")
    assert (state, text.partition(" (")[0]) == expected


@pytest.mark.parametrize(
    ("hybrid", "state", "kept"), [(0.91, "yes", "101 %"), (0.77, "yes", "85 %"), (0.45, "partly", "50 %")]
)
def test_with_a_certificate_quality_goes_by_what_is_served(hybrid: float, state: str, kept: str) -> None:
    scores = dict.fromkeys(("teacher", "base"), SCORE)
    scores |= {"student": SCORE | {"mean": 0.3}, "hybrid": SCORE | {"mean": hybrid}}
    assert state_of(manifest(scores=scores), "Quality") == (
        state,
        f"behind the router {kept} of the teacher's score is kept (from 85 % on is usually acceptable); "
        "at least 99.5 % is certified",
    )


@pytest.mark.parametrize(("share", "state"), [(1.0, "yes"), (0.999, "partly"), (0.0, "no")])
def test_only_all_requests_are_a_yes(share: float, state: str) -> None:
    router = UNCERTIFIED | {"certified": share > 0, "local_share": share}
    found = manifest(router=router)
    assert [state_of(found, name)[0] for name in ("Privacy", "Independence")] == [state, state]
    assert f"{percent(share)} of the test's requests never leave" in state_of(found, "Privacy")[1]

"""The ceiling holds for every prefix of every answer, and is low enough to be of use."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.confidence import ConfidenceModel, Field, LocalAnswer, confidence, features
from serve.evidence import LOOK_EVERY, Evidence

CATEGORY = Field("category", ("billing", "bill dispute", "outage"))
SUMMARY = Field("summary")
FIELDS = [CATEGORY, SUMMARY]
MAX_TOKENS, CONTEXT, PROMPT = 60, 512, 300
NEAREST = (1.0, 1.0)
"""What a release without neighbours has."""
NAMES = tuple(features(LocalAnswer("", [], "stop", PROMPT, ""), FIELDS, None))


def answer_text(category: str, summary: str) -> str:
    return f"[[ ## category ## ]]\n{category}\n\n[[ ## summary ## ]]\n{summary}\n\n[[ ## completed ## ]]"


def entry(piece: str, probability: float, other: float) -> dict[str, Any]:
    rest = (1 - probability) * other
    top = [{"token": piece, "logprob": math.log(probability)}, {"token": "outage", "logprob": math.log(rest)}]
    return {"token": piece, "logprob": math.log(probability), "top_logprobs": top}


probabilities = st.floats(0.02, 0.9999)
models = st.builds(
    lambda weights, bias, calibration: ConfidenceModel(
        NAMES, (0.3,) * len(NAMES), (1.7,) * len(NAMES), tuple(weights), bias, calibration
    ),
    st.lists(st.floats(-2, 2), min_size=len(NAMES), max_size=len(NAMES)),
    st.floats(-4, 4),
    st.one_of(
        st.builds(lambda a, b: {"kind": "sigmoid", "a": a, "b": b}, st.floats(-2, 2), st.floats(-1, 1)),
        st.just({"kind": "isotonic", "x": [-3.0, 0.0, 2.0], "y": [0.05, 0.4, 0.97]}),
    ),
)
texts = st.one_of(
    st.builds(
        answer_text,
        st.sampled_from(
            ["billing", "bill dispute", "outage", '"outage"', "bills", "", " billing ", "[[ ## x"]
        ),
        st.sampled_from(
            ["Too much was charged.", "One\nTwo\n\n[[ not a marker", "[[ ## ", "", "Größe 😀 \n ok"]
        ),
    ),
    st.text(alphabet="[]# \nabil", max_size=40),
)


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]]]:
    text = draw(texts)
    cuts = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=MAX_TOKENS - 2))})
    pieces = [text[start:end] for start, end in pairwise(cuts)]
    return text, [entry(piece, draw(probabilities), draw(st.floats(0.05, 0.95))) for piece in pieces]


def evidence(model: ConfidenceModel, threshold: float = 0.5) -> Evidence:
    return Evidence(FIELDS, model, NEAREST, threshold, max_tokens=MAX_TOKENS, context=CONTEXT)


@settings(max_examples=400)
@given(answers(), models)
def test_no_continuation_passes_the_ceiling(
    answer: tuple[str, list[dict[str, Any]]], model: ConfidenceModel
) -> None:
    text, entries = answer
    final = confidence(LocalAnswer(text, entries, "stop", PROMPT, ""), FIELDS, None, model)
    following = evidence(model)
    assert following.ceiling() >= final - 1e-9
    written = ""
    for each in entries:
        written += each["token"]
        following.add([each], written)
        assert following.ceiling() >= final - 1e-9, written


def fed(model: ConfidenceModel, threshold: float, pieces: list[tuple[str, float]]) -> list[bool]:
    following, written, said = evidence(model, threshold), "", []
    for piece, probability in pieces:
        written += piece
        following.add([entry(piece, probability, 0.5)], written)
        said.append(following.ruled_out)
    return said


LOWEST_TOKEN = ConfidenceModel(("min",), (0.0,), (1.0,), (1.0,), 0.0, {"kind": "sigmoid", "a": 1.0, "b": 0.0})
PIECES = [
    ("[[ ## category ## ]]\n", 1 - 1e-9),
    ("bill", 0.99),
    ("ing", 0.3),
    ("\n\n", 0.99),
    ("[[ ## summary ## ]]\n", 0.99),
]
PIECES += [("Too", 0.99), (" much", 0.99), ("\n\n[[ ## completed ## ]]", 0.99)]


def test_an_unsure_label_ends_it_at_its_line() -> None:
    assert fed(LOWEST_TOKEN, 0.8, PIECES) == [False, False, False, True, True, True, True, True]
    assert not any(fed(LOWEST_TOKEN, 0.2, PIECES))


def test_a_value_that_is_no_label_ends_it_whatever_the_threshold() -> None:
    pieces = [("[[ ## category ## ]]\n", 0.99), ("weather", 0.99), ("\n\n", 0.99)]
    assert fed(LOWEST_TOKEN, 1e-6, pieces) == [False, False, True]


def test_a_prompt_far_from_all_training_is_hopeless_before_the_first_token() -> None:
    model = ConfidenceModel(
        ("nearest",), (0.0,), (1.0,), (-9.0,), 4.0, {"kind": "sigmoid", "a": 1.0, "b": 0.0}
    )
    assert evidence(model, 0.5).ruled_out
    near = Evidence(FIELDS, model, (0.1, 0.2), 0.5, max_tokens=MAX_TOKENS, context=CONTEXT)
    assert not near.ruled_out


def test_a_long_line_is_looked_at_now_and_then() -> None:
    pieces = [
        ("[[ ## category ## ]]\noutage\n\n[[ ## summary ## ]]\n", 0.99),
        *[(" a", 0.3)] * (LOOK_EVERY + 1),
    ]
    assert fed(LOWEST_TOKEN, 0.8, pieces).index(True) == LOOK_EVERY

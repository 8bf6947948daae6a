"""Features, parsing, neighbours and the model: what routing computes from an answer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.confidence import (
    HIGHEST,
    LOGIT_LIMIT,
    LOWEST,
    ConfidenceModel,
    Field,
    LocalAnswer,
    Neighbours,
    confidence,
    features,
    parse,
)
from serve.neighbours import DIMENSIONS, MOST, vector

CATEGORY = Field("category", ("billing", "bill_dispute", "outage"))
SUMMARY = Field("summary")
FIELDS = [CATEGORY, SUMMARY]
TEXT = "[[ ## category ## ]]\nbilling\n\n[[ ## summary ## ]]\nToo much was charged.\n\n[[ ## completed ## ]]"
PIECES = ["[[ ##", " category", " ## ]]\n", "bill", "ing", "\n\n", "[[ ##", " summary", " ## ]]\n"]
PIECES += ["Too", " much", " was", " charged", ".\n\n", "[[ ##", " completed", " ## ]]"]
MODEL = ConfidenceModel(("min",), (0.0,), (1.0,), (1.0,), 0.5, {"kind": "sigmoid", "a": 1.0, "b": 0.0})


def token(text: str, probability: float = 0.999, others: Mapping[str, float] | None = None) -> dict[str, Any]:
    """A token with its alternatives, as OpenAI's interface gives it."""
    masses = {text: probability} | dict(others or {"?": (1 - probability) / 2})
    top = [{"token": other, "logprob": math.log(mass)} for other, mass in masses.items()]
    return {"token": text, "logprob": math.log(probability), "top_logprobs": top}


def answer(
    text: str = TEXT,
    changes: Mapping[int, dict[str, Any]] | None = None,
    *,
    tokens: list[dict[str, Any]] | None = None,
    finish: str = "stop",
) -> LocalAnswer:
    """The usual answer with some of its tokens changed."""
    given = [token(piece) for piece in PIECES] if tokens is None else tokens
    for place, changed in (changes or {}).items():
        given[place] = changed
    return LocalAnswer(text, given, finish, 120, "I was charged twice")


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_parse_reads_what_dspy_writes() -> None:
    assert parse(TEXT, FIELDS) == {"category": "billing", "summary": "Too much was charged."}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[[ ## category ## ]]\n'billing'", "billing"),
        ("  [[ ## category ## ]] outage", "outage"),
        ("Sure!\n[[ ## category ## ]]\noutage\n[[ ## category ## ]]\nbilling", "outage"),
        ("[[ ## category ## ]]\r\noutage\r\n\r\n[[ ## completed ## ]]", "outage"),
    ],
    ids=["quoted", "same line", "first counts", "carriage returns"],
)
def test_parse_is_as_lenient_as_dspy(text: str, value: str) -> None:
    assert parse(text, [CATEGORY]) == {"category": value}


@pytest.mark.parametrize(
    "text",
    ["", "billing", "[[ ## category ## ]]\nBilling", "[[ ## category ## ]]\n", "[[ ## summary ## ]]\nx"],
    ids=["empty", "no marker", "not a label", "empty value", "another field"],
)
def test_parse_refuses_what_is_no_answer(text: str) -> None:
    assert parse(text, [CATEGORY]) is None


def test_parse_agrees_with_dspy_adapter() -> None:
    dspy = pytest.importorskip("dspy", reason="compares with DSPy's own adapter")
    signature = dspy.Signature("text -> summary, other")
    for text in (
        "[[ ## summary ## ]]\na\n\nb\n[[ ## other ## ]]\n[[ ## inside\n[[ ## completed ## ]]",
        "[[ ## other ## ]] x\n[[ ## summary ## ]]\n  y \n\n",
        "x [[ ## summary ## ]]\n\u2028[[ ## summary ## ]]\nz\n[[ ## other ## ]]\n",
    ):
        expected = dspy.ChatAdapter(use_json_adapter_fallback=False).parse(signature, text)
        assert parse(text, [Field("summary"), Field("other")]) == expected


def test_features_look_at_the_value_tokens_only() -> None:
    doubtful_marker = features(answer(changes={7: token(" summary", 0.3)}), FIELDS, None)
    assert doubtful_marker == features(answer(), FIELDS, None)
    doubtful_value = features(answer(changes={11: token(" was", 0.3)}), FIELDS, None)
    assert doubtful_value["summary.min"] == pytest.approx(logit(0.3))
    assert doubtful_value["category.min"] == pytest.approx(logit(0.999))
    assert doubtful_value["min"] == doubtful_value["summary.min"]


def test_statistics_of_a_field() -> None:
    first = token("Too", 0.5, {"The": 0.25, "A": 0.05})
    found = features(answer(changes={9: first}), FIELDS, None)
    others = 4 * math.log(0.999)
    assert found["summary.mean"] == pytest.approx(logit(math.exp((math.log(0.5) + others) / 5)))
    assert found["summary.q10"] == found["summary.min"] == pytest.approx(logit(0.5))
    assert found["summary.margin"] == pytest.approx(math.log(2))
    masses = [0.5, 0.25, 0.05, 0.2]
    assert found["summary.entropy"] == pytest.approx(-sum(mass * math.log(mass) for mass in masses))
    assert found["summary.missing"] == 0


def test_label_probability_is_over_allowed_labels_and_follows_shared_beginnings() -> None:
    first = token("bill", 0.6, {"out": 0.2, "money": 0.2})  # money begins no label
    second = token("ing", 0.5, {"_dispute": 0.25, "board": 0.25})  # billboard is none either
    found = features(answer(changes={3: first, 4: second}), FIELDS, None)
    assert found["category.label"] == pytest.approx(logit(0.75 * (0.5 / 0.75)))
    assert "summary.label" not in found


def test_label_is_settled_once_one_label_is_left() -> None:
    text = "[[ ## category ## ]]\noutage"
    tokens = [
        token("[[ ## category ## ]]\n"),
        token("out", 0.8, {"bill": 0.1}),
        token("age", 0.2, {"er": 0.7}),
    ]
    found = features(answer(text, tokens=tokens), [CATEGORY], None)
    assert found["category.label"] == pytest.approx(logit(0.8 / 0.9))


def test_names_depend_on_the_fields_alone() -> None:
    usual = list(features(answer(), FIELDS, None))
    for other in (
        answer("", tokens=[]),
        answer("nonsense", tokens=[token("nonsense")], finish="length"),
        answer(tokens=[]),
        LocalAnswer(TEXT, [{"token": "x", "logprob": None, "top_logprobs": None}], "stop", 0, ""),
    ):
        found = features(other, FIELDS, None)
        assert list(found) == usual
        assert all(math.isfinite(value) for value in found.values())


def test_missing_evidence_is_the_worst_evidence() -> None:
    nothing, worst = features(answer(tokens=[]), FIELDS, None), -LOGIT_LIMIT
    assert nothing["category.missing"] == nothing["unaligned"] == 1
    assert (nothing["min"], nothing["category.label"], nothing["category.margin"]) == (worst, worst, 0)
    assert (nothing["nearest"], nothing["nearest_mean"]) == (1, 1)
    bare = [{"token": piece, "logprob": -0.1} for piece in PIECES]
    without_alternatives = features(answer(tokens=bare), FIELDS, None)
    assert without_alternatives["category.missing"] == 1
    assert without_alternatives["category.min"] == pytest.approx(logit(math.exp(-0.1)))


def test_flags() -> None:
    assert features(answer(finish="length"), FIELDS, None)["truncated"] == 1
    assert features(answer("[[ ## category ## ]]\nrefund"), FIELDS, None)["unparsable"] == 1
    usual = features(answer(), FIELDS, None)
    assert (usual["truncated"], usual["unparsable"], usual["unaligned"]) == (0, 0, 0)
    assert usual["input_tokens"] == math.log1p(120) and usual["output_tokens"] == math.log1p(len(PIECES))


@pytest.mark.parametrize("lost", ["", "\ufffd"], ids=["dropped", "replaced"])
def test_split_characters_are_placed(lost: str) -> None:
    """Runtimes decode each piece of an emoji on its own; the doubtful piece still belongs to its value."""
    text = "[[ ## summary ## ]]\nok \U0001f999 fine\n\n[[ ## completed ## ]]"
    pieces = ["[[ ## summary ## ]]\n", "ok", " ", lost, lost, " fine", "\n\n[[ ## completed ## ]]"]
    tokens = [token(piece) for piece in pieces]
    tokens[4] = token(lost, 0.4)
    found = features(answer(text, tokens=tokens), [SUMMARY], None)
    assert found["unaligned"] == 0
    assert found["summary.min"] == pytest.approx(logit(0.4))


def test_cut_ends_and_control_tokens_align() -> None:
    tokens = [token("\n"), *[token(piece) for piece in PIECES], token("<|eot_id|>", 0.2)]
    found = features(answer(tokens=tokens), FIELDS, None)
    assert found["unaligned"] == 0
    assert found["summary.min"] == pytest.approx(logit(0.999))


@pytest.mark.parametrize("tokens", [PIECES[:8], PIECES[12:], ["completely", " other", " text"]])
def test_tokens_that_do_not_fit_the_text_count_for_every_field(tokens: list[str]) -> None:
    given = [token(piece) for piece in tokens]
    given[1] = token(tokens[1], 0.4)
    found = features(answer(tokens=given), FIELDS, None)
    assert found["unaligned"] == 1
    assert found["category.min"] == found["summary.min"] == pytest.approx(logit(0.4))


@given(st.text(max_size=80), st.lists(st.text(max_size=8), max_size=12))
def test_features_never_fail(text: str, pieces: list[str]) -> None:
    found = features(answer(text, tokens=[token(piece) for piece in pieces]), FIELDS, None)
    assert all(math.isfinite(value) for value in found.values())


def test_confidence_keeps_no_unparsable_or_truncated_answer() -> None:
    assert confidence(answer(), FIELDS, None, MODEL) > 0.99
    assert confidence(answer(finish="length"), FIELDS, None, MODEL) == 0.0
    assert confidence(answer("no marker"), FIELDS, None, MODEL) == 0.0
    assert LOWEST > 0


def test_model_survives_json() -> None:
    isotonic = ConfidenceModel(
        ("a", "b"),
        (1.0, 2.0),
        (0.5, 1.0),
        (0.3, -0.2),
        0.1,
        {"kind": "isotonic", "x": [0, 1], "y": [0.2, 0.8]},
    )
    for model in (MODEL, isotonic):
        assert ConfidenceModel.from_json(json.loads(json.dumps(model.to_json()))) == model
    assert isotonic.score({"a": 2.0, "b": 1.0}) == pytest.approx(0.1 + 0.3 * 2 + 0.2)
    assert isotonic.probability({"a": 2.0, "b": 1.0}) == pytest.approx(0.2 + 0.6 * 0.9)


@given(st.floats(-1e6, 1e6))
def test_probability_is_within_its_bounds(value: float) -> None:
    isotonic = ConfidenceModel(
        ("min",), (0.0,), (1.0,), (1.0,), 0.0, {"kind": "isotonic", "x": [-1.0, 1.0], "y": [0.0, 1.0]}
    )
    for model in (MODEL, isotonic):
        assert LOWEST <= model.probability({"min": value}) <= HIGHEST


def test_model_explains_its_faults() -> None:
    with pytest.raises(ValueError, match=r"no feature 'min'.*certify again"):
        MODEL.probability({"max": 1.0})
    with pytest.raises(ValueError, match=r"arrays of lengths \[1, 0, 1, 1\]"):
        ConfidenceModel.from_json(MODEL.to_json() | {"mean": []})
    with pytest.raises(ValueError, match="it is sigmoid or isotonic"):
        ConfidenceModel.from_json(MODEL.to_json() | {"calibration": {"kind": "beta"}})


def test_neighbours_know_their_own_and_no_strangers() -> None:
    known = Neighbours.build(["my invoice is wrong", "the internet is down", "reset my password please"])
    assert known.distance("my invoice is wrong")[0] == pytest.approx(0, abs=1e-6)
    near, far = known.distance("my invoice was wrong"), known.distance("Qu'est-ce que c'est?")
    assert near[0] < 0.5 < far[0] and near[1] < far[1] <= 1
    assert known.nearest("the internet is slow", 2)[1][0] == 1


def test_neighbours_survive_disk(tmp_path: Path) -> None:
    known = Neighbours.build([f"ticket number {number} about topic {number % 7}" for number in range(50)])
    known.save(tmp_path / "neighbours.npz")
    with np.load(tmp_path / "neighbours.npz", allow_pickle=False) as arrays:
        assert arrays["vectors"].dtype == np.float16
    loaded = Neighbours.load(tmp_path / "neighbours.npz")
    for text in ("ticket number 3", "something else"):
        assert loaded.distance(text) == pytest.approx(known.distance(text), abs=2e-3)


def test_neighbours_without_rows_are_far_and_wrong_shapes_refused() -> None:
    assert Neighbours.build([]).distance("anything") == (1.0, 1.0)
    with pytest.raises(ValueError, match="certify again"):
        Neighbours(np.zeros((3, 5), dtype=np.float32))


def test_neighbours_are_capped() -> None:
    assert MOST / 2 < len(Neighbours.build([str(number) for number in range(2 * MOST + 1)])) <= MOST


def test_vectors_are_the_same_on_every_machine() -> None:
    found = vector("Stable hash")
    assert found.shape == (DIMENSIONS,) and np.linalg.norm(found) == pytest.approx(1)
    assert np.flatnonzero(found)[:8].tolist() == [91, 107, 111, 121, 190, 193, 215, 222]
    assert not vector("").any()


def test_distance_and_confidence_are_cheap() -> None:
    """Best of several, so that a busy machine does not fail it: under 1 ms, the model under 0.1 ms."""
    known = Neighbours.build([f"ticket {number} of customer {number * 7919}" for number in range(MOST)])
    query, given = "a ticket of a customer " * 20, features(answer(), FIELDS, None)
    model = ConfidenceModel.from_json(
        MODEL.to_json()
        | {
            "features": list(given),
            "mean": [0.0] * len(given),
            "scale": [1.0] * len(given),
            "weights": [0.1] * len(given),
        }
    )
    assert best_of(lambda: known.distance(query)) < 1e-3
    assert best_of(lambda: model.probability(given)) < 1e-4
    assert best_of(lambda: features(answer(), FIELDS, None)) < 1e-3


def best_of(work: Any, times: int = 30) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)

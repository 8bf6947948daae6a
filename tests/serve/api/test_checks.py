from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.checks import RULES, checked
from serve.errors import ApiError

PLAIN: dict[str, Any] = {"model": "tickets", "messages": [{"role": "user", "content": "hi"}]}


def refused(data: bytes | dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        checked(data if isinstance(data, bytes) else orjson.dumps(data))
    assert caught.value.status == 400
    return caught.value


def test_a_plain_request_and_fields_nobody_knows_pass_untouched() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/x"}}}}
    body = PLAIN | {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
        "reasoning_effort": "low",
        "x": {"y": [1, None]},
        "stop": None,
    }
    assert checked(orjson.dumps(body)) == body


def test_every_fault_is_told_at_once() -> None:
    error = refused({"model": "", "messages": [{"role": "user", "content": 5}], "n": 0, "temperature": True})
    assert error.body["error"]["param"] == "model"
    for part in ('model is ""', "messages[0].content is 5", "n is 0; use 1 to 128", "temperature is true"):
        assert part in str(error)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"model":"t","messages":[{"role":"user","content":"x"}],"temperature":1e400}',
        b'{"model":"t","messages":[{"role":"user","content":"\\ud800"}],"x":1e400}',
        b'{"model":"t","messages":[{"role":"user","content":"\\ud800"}],"x":1' + b"0" * 400 + b"}",
        b'{"model":"t","messages":[{"role":"user","content":"x"}],"temperature":1' + b"0" * 400 + b"}",
        b"[" * 5000,
        b'{"a":' * 600 + b"1" + b"}" * 600,
        json.dumps(PLAIN | {"x": json.loads("[" * 150 + "]" * 150)}).encode(),
    ],
)
def test_what_is_no_sane_json_is_refused(data: bytes) -> None:
    refused(data)


def test_a_lone_surrogate_is_json() -> None:
    data = b'{"model": "t", "messages": [{"role": "user", "content": "\\ud800"}]}'
    assert checked(data)["messages"][0]["content"] == "\ud800"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", [{"role": "robot", "content": ""}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"text": "no type"}]}]),
        ("messages", [{"role": "assistant", "tool_calls": "x"}]),
        ("stream", "yes"),
        ("stream_options", []),
        ("max_tokens", 0),
        ("max_completion_tokens", 1.5),
        ("n", True),
        ("top_p", -0.1),
        ("presence_penalty", 3),
        ("top_logprobs", 21),
        ("top_logprobs", 2),
        ("stop", ["a"] * 5),
        ("tools", [{"type": "function", "function": {}}]),
        ("tool_choice", "maybe"),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("response_format", {"type": "json_schema", "json_schema": 5}),
        ("logit_bias", {"1": "x"}),
        ("logit_bias", {"1": True}),
        ("seed", True),
        ("user", 5),
        ("max_tokens", 9.0),
        ("seed", "1"),
    ],
)
def test_each_field_has_its_rule(field: str, value: Any) -> None:
    assert refused(PLAIN | {field: value}).body["error"]["param"] == field


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=600)
@given(st.dictionaries(st.sampled_from(sorted(RULES)), JSON))
def test_whatever_comes_is_taken_or_refused_and_nothing_else(more: dict[str, Any]) -> None:
    data = orjson.dumps(PLAIN | more)
    try:
        assert checked(data) == PLAIN | more
    except ApiError as error:
        assert error.status == 400

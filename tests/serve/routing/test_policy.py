from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.fingerprint import fingerprint
from serve.manifest import PredictorPrompt
from serve.routing.policy import asked, conversation, demands, match, tool_loop

SYSTEM = {"role": "system", "content": "Sort."}
PROMPT = PredictorPrompt(
    name="p",
    fingerprint=fingerprint([SYSTEM, {"role": "user", "content": ""}]),
    prefix="in: ",
    suffix="\n\nout",
    fields=[],
)


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"stream": True, "max_tokens": 5, "temperature": 0, "user": "u"}, []),
        ({"tools": None, "n": 1, "logprobs": False, "stop": [], "response_format": {"type": "text"}}, []),
        ({"tools": [{}], "tool_choice": "auto"}, ["tool_choice", "tools"]),
        ({"n": 2}, ["n"]),
        ({"stop": ["x"], "logprobs": True, "top_logprobs": 3}, []),
        ({"logit_bias": {"1": 2}}, ["logit_bias"]),
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
        ({"not_known_yet": False}, ["not_known_yet"]),
    ],
)
def test_demands(fields: dict[str, Any], found: list[str]) -> None:
    assert demands({"model": "m", "messages": [], **fields}) == found


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (user(" a \n"), "a"),
        (user([{"type": "text", "text": " a"}]), "a"),
        (user("a", name=None), "a"),
        (user("a", name="Ann"), None),
        (user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), None),
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), None),
        (user([{"type": "text", "text": 1}]), None),
        (user(None, tool_calls=[{}]), None),
        (user(None), None),
    ],
)
def test_conversation(message: dict[str, Any], text: str | None) -> None:
    found = conversation({"messages": [SYSTEM, message]})
    assert found == (None if text is None else [SYSTEM, {"role": "user", "content": text}])


@pytest.mark.parametrize(
    ("messages", "query"),
    [
        ([SYSTEM, user("in: x\n\nout")], "x"),
        ([SYSTEM, user("in: \n\nout")], ""),
        ([SYSTEM, user("in: x")], None),
        ([SYSTEM, user("x\n\nout")], None),
        ([{"role": "system", "content": "Sort!"}, user("in: x\n\nout")], None),
        ([user("in: x\n\nout")], None),
        ([SYSTEM, {"role": "assistant", "content": "in: x\n\nout"}], None),
    ],
)
def test_match(messages: list[dict[str, str]], query: str | None) -> None:
    question = match(messages, [PROMPT])
    assert (question.query if question else None) == query


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["n", "stop", "tools", "response_format", "x"]), JSON),
    st.lists(st.dictionaries(st.sampled_from(["content", "name", "tool_calls"]), JSON), min_size=1),
)
def test_whatever_a_client_sends_gets_a_verdict(
    fields: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    request = {"model": "m", "messages": [{"role": "user", **message} for message in messages], **fields}
    demands(request)
    found = conversation(request)
    if found is not None:
        assert all(isinstance(message["content"], str) for message in found)
        match(found, [PROMPT])


def called(identity: str) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": identity}]}


RESULT = {"role": "tool", "tool_call_id": "x", "content": "1"}


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([user("a")], None),
        ([user("a"), called("call_1"), RESULT], "teacher"),
        ([user("a"), called("call_local_1"), RESULT], "local"),
        ([user("a"), called("call_local_1"), RESULT, called("call_2"), RESULT], "teacher"),
        ([user("a"), called("call_1"), RESULT, {"role": "assistant", "content": "b"}, user("c")], None),
    ],
)
def test_a_tool_loop_belongs_to_whoever_made_its_last_call(
    messages: list[dict[str, Any]], found: str | None
) -> None:
    assert tool_loop({"messages": messages}) == found


def test_what_a_request_is_about_is_its_last_question() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "image_url"}, {"type": "text", "text": "c"}]
    assert asked({"messages": [user("a"), user(parts), {"role": "assistant", "content": "d"}]}) == "b\n\nc"
    assert asked({"messages": [{"role": "system", "content": "s"}]}) == ""

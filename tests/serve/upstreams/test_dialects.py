from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.upstreams.dialects import ANY_SERVER, COMMON, EMBEDDED, OLLAMA, Dialect, merged, with_own_ids

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TEXT = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]


def body(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"model": "tickets", "messages": list(messages) or [{"role": "user", "content": "Hi"}], **more}


@pytest.mark.parametrize(
    ("more", "ollama", "embedded", "url"),
    [
        ({}, [], [], []),
        ({"temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": "x", "max_tokens": 3}, [], [], []),
        ({"max_completion_tokens": 3, "logprobs": True, "top_logprobs": 5, "n": 3}, [], [], []),
        ({"stream": True, "stream_options": {"include_usage": True}}, [], [], []),
        ({"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}, [], [], []),
        ({"logit_bias": {"5": 1}}, ["logit_bias"], ["logit_bias"], []),
        (
            {"logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "modalities": ["text"]},
            [],
            [],
            [],
        ),
        ({"logit_bias": None, "tools": None, "audio": None}, [], [], []),
        ({"presence_penalty": 1}, [], ["presence_penalty"], []),
        ({"tools": TOOLS}, [], ["tools"], []),
        ({"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True}, [], ["tools"], []),
        ({"tools": TOOLS, "tool_choice": "none"}, [], [], []),
        ({"tools": TOOLS, "tool_choice": "required"}, ["tool_choice"], ["tool_choice", "tools"], []),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            ["tool_choice"],
            ["tool_choice", "tools"],
            [],
        ),
        (
            {"tools": TOOLS, "parallel_tool_calls": False},
            ["parallel_tool_calls"],
            ["parallel_tool_calls", "tools"],
            [],
        ),
        ({"functions": [{"name": "f"}], "function_call": "auto"}, *[["function_call", "functions"]] * 2, []),
        ({"response_format": {"type": "text"}}, [], [], []),
        ({"response_format": {"type": "json_object"}}, [], [], []),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, [], [], []),
        ({"response_format": {"type": "grammar"}}, *[["response_format"]] * 3),
        ({"modalities": ["text", "audio"], "audio": {"voice": "x"}}, *[["audio", "modalities"]] * 3),
        ({"web_search_options": {}}, *[["web_search_options"]] * 3),
        ({"top_k": 5, "options": {"num_ctx": 9}}, *[["options", "top_k"]] * 2, []),
    ],
)
def test_what_each_cannot_do(
    more: dict[str, Any], ollama: list[str], embedded: list[str], url: list[str]
) -> None:
    asked = body(**more)
    assert [dialect.unsupported(asked) for dialect in (OLLAMA, EMBEDDED, ANY_SERVER)] == [
        ollama,
        embedded,
        url,
    ]


@pytest.mark.parametrize(
    ("message", "ollama", "embedded"),
    [
        ({"role": "user", "content": TEXT}, [], []),
        ({"role": "user", "content": [*TEXT, *IMAGE]}, ["messages"], ["messages"]),
        ({"role": "tool", "content": "4", "tool_call_id": "c"}, [], ["messages"]),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}, [], ["messages"]),
        ({"role": "function", "name": "f", "content": "4"}, ["messages"], ["messages"]),
    ],
)
def test_what_messages_each_can_read(message: Any, ollama: list[str], embedded: list[str]) -> None:
    asked = body(message)
    found = [dialect.unsupported(asked) for dialect in (OLLAMA, EMBEDDED, ANY_SERVER)]
    assert found == [ollama, embedded, []]


@pytest.mark.parametrize("dialect", [OLLAMA, EMBEDDED, ANY_SERVER], ids=lambda dialect: dialect.name)
def test_translation(dialect: Dialect) -> None:
    asked = body(
        {"role": "developer", "content": "Sort."},
        {"role": "user", "content": TEXT},
        n=2,
        max_completion_tokens=7,
        temperature=None,
        logit_bias={},
        tools=TOOLS,
        tool_choice="none",
        response_format={"type": "json_object"},
    )
    assert dialect.translated(asked, 0.0) == {
        "model": "tickets",
        "messages": [{"role": "system", "content": "Sort."}, {"role": "user", "content": "Hello"}],
        "max_tokens": 7,
        "temperature": 0.0,
        "top_p": 1.0,
        "response_format": {"type": "json_object"},
    }
    assert asked["messages"][1]["content"] == TEXT  # the client's own request stays as it is


def test_sampling_that_is_asked_for_is_kept() -> None:
    told = OLLAMA.translated(body(temperature=0.7, top_p=0.1, tools=TOOLS, tool_choice="auto"), 0.0)
    assert (told["temperature"], told["top_p"], told["tools"]) == (0.7, 0.1, TOOLS)
    assert "tool_choice" not in told


def test_only_a_server_of_somebody_elses_is_sent_what_is_not_known() -> None:
    asked = body(top_k=5, user="me")
    assert {"top_k", "user"} <= ANY_SERVER.translated(asked, 0.0).keys()
    assert OLLAMA.translated(asked, 0.0).keys() <= COMMON


FIELDS = st.sampled_from(
    [*sorted(COMMON), "tools", "tool_choice", "logit_bias", "user", "top_k", "functions"]
)


@given(st.dictionaries(FIELDS, st.sampled_from([None, 0, 1, "none", "auto", "x", [], {}, TOOLS])))
def test_nothing_is_left_out_silently(more: dict[str, Any]) -> None:
    """What is asked for is refused, or told, or in the list of what changes nothing."""
    asked = {**more, "model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    if OLLAMA.unsupported(asked):
        return
    told = OLLAMA.translated(asked, 0.0)
    left_out = {name for name, value in asked.items() if value is not None} - told.keys()
    neutral = {"n", "user", "max_completion_tokens", "tools", "tool_choice", "logit_bias", "functions"}
    assert left_out <= neutral
    assert "tools" not in left_out or asked["tools"] == [] or asked.get("tool_choice") == "none"


def test_merged() -> None:
    def answer(*texts: str) -> dict[str, Any]:
        choices = [{"index": index, "message": {"content": text}} for index, text in enumerate(texts)]
        usage = {"prompt_tokens": 5, "completion_tokens": len(texts), "total_tokens": 5 + len(texts)}
        return {"id": texts[0], "choices": choices, "usage": usage}

    whole = merged([answer("a", "b"), answer("c")])
    assert [(each["index"], each["message"]["content"]) for each in whole["choices"]] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
    ]
    assert whole["usage"] == {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    assert merged([answer("a"), answer("b") | {"usage": None}])["usage"] is None
    assert merged([answer("a")]) == answer("a")


def test_ids_of_tool_calls() -> None:
    calls = [{"id": "call_1"}, {"id": "call_1"}, {"id": ""}, {}]
    answer = with_own_ids(
        {"choices": [{"message": {"tool_calls": calls}}, {"message": {"tool_calls": None}}]}
    )
    ids = [call["id"] for call in answer["choices"][0]["message"]["tool_calls"]]
    assert ids[0] == "call_1"
    assert len(set(ids)) == 4

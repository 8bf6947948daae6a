from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import Unredactable
from serve.guard.redaction import redact

PLANTED = {
    "EMAIL": ["bob@example.org", "a.b+c@mail.example.co.uk", "jürgen@müller.de"],
    "PHONE": ["+49 30 901820", "+1 650-253-0000", "(650) 253-0000"],
    "CARD": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"],
    "IBAN": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "IP": ["192.168.1.17", "2001:db8::8a2e:370:7334", "::1"],
    "ID": ["536-90-4399", "AB 12 34 56 C", "RSSMRA85T10A562S", "12345678Z", "111222333", "36 574 261 809"],
    "SECRET": [
        "sk-proj-abcdefghijklmnopqrstuvwx",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "AKIAIOSFODNN7EXAMPLE",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijklmnop",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----",
    ],
}
ALL = [(kind, value) for kind, values in PLANTED.items() for value in values]


def asked(text: Any, **more: Any) -> dict[str, Any]:
    return {"model": "tickets", "messages": [{"role": "user", "content": text}], **more}


def content(body: dict[str, Any]) -> Any:
    return body["messages"][0]["content"]


@pytest.mark.parametrize(("kind", "value"), ALL)
def test_what_must_not_leave_is_replaced_and_put_back(kind: str, value: str) -> None:
    found = redact(asked(f"Please look at {value}, it is mine."))
    assert content(found.body) == f"Please look at <{kind}_1>, it is mine."
    assert found.restore(f"I looked at <{kind}_1>.") == f"I looked at {value}."


@pytest.mark.parametrize(
    "text",
    [
        "order 1234567890123456",
        "at 12:30:45 on 2026-11-21",
        "version 1.2.3, section 4.5.6.7.8",
        "the ratio 3:4::6:8x",
        "cost 1,234,567.89 USD",
        "call me maybe",
        "user@localhost",
        "",
    ],
)
def test_what_only_looks_alike_stays(text: str) -> None:
    found = redact(asked(text))
    assert (content(found.body), found.count) == (text, 0)


def test_the_same_value_has_the_same_placeholder_and_no_text_is_taken_for_one() -> None:
    found = redact(asked("a@example.org b@example.org a@example.org <EMAIL_1>"))
    assert content(found.body) == "<EMAIL_2> <EMAIL_3> <EMAIL_2> <EMAIL_1>"
    assert found.restore(content(found.body)) == "a@example.org b@example.org a@example.org <EMAIL_1>"


def test_every_text_of_the_request_is_searched() -> None:
    mail = "bob@example.org"
    body = {
        "model": "tickets",
        "user": mail,
        "metadata": {"who": mail},
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "description": mail, "parameters": {"enum": [mail]}},
            }
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": mail}]},
            {
                "role": "assistant",
                "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": json.dumps({"to": mail})}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": mail},
        ],
        "prediction": {"type": "content", "content": mail},
        "x": [[{"deep": mail}]],
    }
    before = json.dumps(body)
    found = redact(body)
    assert mail not in json.dumps(found.body)
    assert json.dumps(body) == before
    assert json.loads(found.body["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {
        "to": "<EMAIL_1>"
    }


def test_values_are_escaped_where_they_go_into_json() -> None:
    key = PLANTED["SECRET"][-1]
    found = redact(asked(key))
    assert json.loads(found.restore('{"key": "<SECRET_1>"}', json=True)) == {"key": key}


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "something_new"])
def test_what_cannot_be_searched_does_not_leave(kind: str) -> None:
    with pytest.raises(Unredactable, match=f"part of type {kind}"):
        redact(asked([{"type": "text", "text": "hi"}, {"type": kind, kind: {}}]))


words = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from([value for _, value in ALL])), max_size=8
).map(" | ".join)


@settings(max_examples=150, deadline=None)
@given(words, st.lists(st.integers(0, 400), max_size=12))
def test_back_is_the_inverse_of_there_whole_and_in_pieces(text: str, cuts: list[int]) -> None:
    found = redact(asked(text))
    out = content(found.body)
    assert found.restore(out) == text
    places = sorted({0, len(out), *(cut % (len(out) + 1) for cut in cuts)})
    restoring = found.stream()
    pieces = [restoring.feed(out[start:end]) for start, end in pairwise(places)]
    assert "".join(pieces) + restoring.flush() == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(ALL), min_size=1, max_size=6), st.sampled_from([", ", " and ", "\n", "; "]))
def test_no_planted_value_gets_out(planted: list[tuple[str, str]], between: str) -> None:
    found = redact(asked(between.join(value for _, value in planted)))
    for _, value in planted:
        assert value not in content(found.body)

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
    "EMAIL": ["bob@example.org", "a.b+c@mail.example.co.uk", "jürgen@müller.de", "bob%40example.org"],
    "PHONE": [
        "+49 30 901820",
        "+1 650-253-0000",
        "(650) 253-0000",
        "(212) - 736 - 5000",
        "+1 212 - 736 - 5000",
        "0044 20 7946 0958",
    ],
    "CARD": [
        "4111 1111 1111 1111",
        "5500-0000-0000-0004",
        "378282246310005",
        "3782 822463 10005",
        "4111.1111.1111.1111",
        "4111\u00a01111\u00a01111\u00a01111",
    ],
    "IBAN": [
        "DE89 3704 0044 0532 0130 00",
        "GB82WEST12345698765432",
        "MT84 MALT 0110 0001 2345 MTLC AST0 01S",
    ],
    "IP": ["192.168.1.17", "2001:db8::8a2e:370:7334", "::1"],
    "ID": [
        "536-90-4399",  # US
        "AB 12 34 56 C",  # UK
        "RSSMRA85T10A562S",  # IT
        "12345678Z",  # ES
        "X-2482300-W",  # ES, foreigners
        "111222333",  # NL
        "36 574 261 809",  # DE
        "2 95 10 99 126 111 93",  # FR
        "756.9217.0769.85",  # CH
        "390.533.447-05",  # BR
        "311280-888Y",  # FI
        "880320-0016",  # SE
        "44051401359",  # PL
        "85.07.30-033.28",  # BE
        "130-692-544",  # CA
    ],
    "SECRET": [
        "sk-proj-abcdefghijklmnopqrstuvwx",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "AKIAIOSFODNN7EXAMPLE",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijklmnop",
        "Bearer abcdefghijklmnopqrst",
        "Basic dXNlcjpwYXNzd29yZDEyMw==",
        "GOCSPX-abcdefghijklmnopqrstuvwxyz12",
        "whsec_abcdefghijklmnopqrstuvwxyz012345",
        f"dop_v1_{'0123456789abcdef' * 4}",
        "hooks.slack.com/services/T01234567/B01234567/abcdefghijklmnopqrstuvwx",
        "-----BEGIN PGP PRIVATE KEY BLOCK-----\nlQOY\n-----END PGP PRIVATE KEY BLOCK-----",
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
        "f :: Int; x[::-1] + y[::2]",
        "41234 51234 61234 1234 99999",
        "2026-11-21T12:30:45.123456789 and 2026-11-20 12:30",
        "EAN 1234567890128",
        "cost 1,234,567.89 USD",
        "call me maybe",
        "basic responsibilities and Basic internationalization",
        "2010 - 2015 - 2020 or 250 - 500 - 1000 - 2000",
        "on 21 - 11 - 2026",
        "4111.1111 2222.3333 5555.1234",
        "0045 2030 2130",
        "50%40 off.now",
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


def test_pictures_beside_the_text_do_not_leave() -> None:
    with pytest.raises(Unredactable, match="images"):
        redact({"messages": [{"role": "user", "content": "what is it?", "images": ["iVBORw0"]}]})


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "something_new"])
def test_what_cannot_be_searched_does_not_leave(kind: str) -> None:
    with pytest.raises(Unredactable, match=f"part of type {kind}"):
        redact(asked([{"type": "text", "text": "hi"}, {"type": kind, kind: {}}]))


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("4111 1111 1111 1111 12/29 123", "<CARD_1> 12/29 123"),
        ("4111 1111 1111 1111 123", "<CARD_1> 123"),
        ("12 4111 1111 1111 1111", "12 <CARD_1>"),
        ("DE89 3704 0044 0532 0130 00 and more words", "<IBAN_1> and more words"),
        ("100 130 692 544", "100 <ID_1>"),
        ("a+sk-abcdefghijklmnopqrst@example.org", "a+<SECRET_1>@example.org"),
        ("sk-abcdefghijklmnopqrst@example.org", "<SECRET_1>@example.org"),
        ("postgres://admin:hunter2@db/base", "postgres://<SECRET_1>@db/base"),
    ],
)
def test_neighbours_hide_nothing(text: str, out: str) -> None:
    assert content(redact(asked(text)).body) == out


def test_a_phone_number_with_spaced_dashes_is_read_as_in_its_country() -> None:
    text = "Call 0171 \u2013 123 \u2013 4567 today."
    assert content(redact(asked(text), "DE").body) == "Call <PHONE_1> today."
    assert content(redact(asked(text), "US").body) == text


@pytest.mark.parametrize("end", ["\n", "\t", '"', "<", "\\"])
@pytest.mark.parametrize(
    ("kind", "value"), [each for each in ALL if each[0] in ("EMAIL", "ID", "SECRET", "CARD")]
)
def test_json_in_a_text_is_searched_and_stays_json(kind: str, value: str, end: str) -> None:
    for text in (json.dumps({"note": f"a{end} {value}"}), json.dumps({"note": f"{end}{value}{end}"})):
        # Go's encoders
        out = content(redact(asked(text.replace("<", "\\u003c"))).body)
        for piece in value.splitlines():
            assert json.dumps(piece)[1:-1] not in out
        json.loads(out)


@pytest.mark.parametrize("value", ["bob@example.org", "jürgen@müller.de", PLANTED["SECRET"][-1]])
def test_arguments_are_read_as_what_they_mean(value: str) -> None:
    arguments = json.dumps({"to": [value], value: 4111111111111111, "n": 3})
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    found = redact(asked("hi") | {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]})
    out = found.body["messages"][0]["tool_calls"][0]
    assert (out["id"], out["type"]) == ("call_1", "function")
    meant = json.loads(out["function"]["arguments"])
    (name,) = meant["to"]
    assert meant == {"to": [name], name: "<CARD_1>", "n": 3}
    back = json.loads(found.restore(out["function"]["arguments"], json=True))
    assert back == {"to": [value], value: "4111111111111111", "n": 3}


def test_a_member_that_is_written_twice_leaves_neither_value() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": "bob@example.org", "a": "x"}'}}
    found = redact({"messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert "bob" not in json.dumps(found.body)


def test_names_of_the_api_are_kept_where_they_are_the_apis_own() -> None:
    mail = "bob@example.org"
    body = {
        "model": mail,
        "metadata": {"id": mail, "model": mail, "type": mail, "role": mail, mail: 1},
        "messages": [{"role": "tool", "tool_call_id": mail, "content": "", "name": mail}],
    }
    out = redact(body).body
    assert out["model"] == out["messages"][0]["tool_call_id"] == mail
    assert out["messages"][0]["name"] == "<EMAIL_1>"
    assert mail not in json.dumps(out["metadata"])


def test_a_placeholder_whose_brackets_were_escaped_is_put_back() -> None:
    found = redact(asked("bob@example.org"))
    escaped = '{"to": "\\u003cEMAIL_1\\u003E"}'
    assert found.restore(escaped, json=True) == '{"to": "bob@example.org"}'
    for cut in range(len(escaped)):
        stream = found.stream(json=True)
        pieces = [stream.feed(escaped[:cut]), stream.feed(escaped[cut:]), stream.flush()]
        assert "".join(pieces) == '{"to": "bob@example.org"}'


def test_what_is_nested_too_deeply_to_be_searched_does_not_leave() -> None:
    deep: Any = "bob@example.org"
    for _ in range(990):
        deep = [deep]
    with pytest.raises(Unredactable, match="nested too deeply"):
        redact(asked("hi", x=deep))


@pytest.mark.parametrize(
    "message", [None, "bob@example.org", ["bob@example.org"], {"content": {"x": "bob@example.org"}}]
)
def test_what_is_no_message_is_searched_as_well(message: Any) -> None:
    for messages in (message, [message]):
        assert "bob" not in json.dumps(redact({"messages": messages}).body)


words = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from([value for _, value in ALL])), max_size=8
).map(" | ".join)


@settings(max_examples=150)
@given(words, st.lists(st.integers(0, 400), max_size=12))
def test_back_is_the_inverse_of_there_whole_and_in_pieces(text: str, cuts: list[int]) -> None:
    found = redact(asked(text))
    out = content(found.body)
    assert found.restore(out) == text
    places = sorted({0, len(out), *(cut % (len(out) + 1) for cut in cuts)})
    restoring = found.stream()
    pieces = [restoring.feed(out[start:end]) for start, end in pairwise(places)]
    assert "".join(pieces) + restoring.flush() == text


@pytest.mark.parametrize(
    "behind", [", X-2482300-W", " x12345678901", ";ext=7", ", 4111 1111 1111 1111", "#1234567890123"]
)
def test_a_phone_number_is_found_whatever_stands_behind_it(behind: str) -> None:
    assert "901820" not in content(redact(asked(f"+49 30 901820{behind}")).body)


@settings(max_examples=600)
@given(st.lists(st.sampled_from(ALL), min_size=1, max_size=6), st.sampled_from([", ", " and ", "\n", "; "]))
def test_no_planted_value_gets_out(planted: list[tuple[str, str]], between: str) -> None:
    found = redact(asked(between.join(value for _, value in planted)))
    for _, value in planted:
        assert value not in content(found.body)


pieces_of_answers = st.lists(
    st.sampled_from(
        [
            "<",
            ">",
            "EMAIL_1",
            "EMAIL_",
            "_1",
            "\\u003c",
            "\\u003E",
            "\\",
            "u00",
            "3c",
            "<EMAIL_1>",
            "<EMAIL_2>",
            "a",
        ]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=300)
@given(pieces_of_answers, st.booleans(), st.lists(st.integers(0, 100), max_size=8))
def test_a_stream_is_restored_as_the_whole_is_wherever_it_is_cut(
    text: str, json: bool, cuts: list[int]
) -> None:
    found = redact(asked("bob@example.org"))
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    restoring = found.stream(json=json)
    out = "".join(restoring.feed(text[start:end]) for start, end in pairwise(places)) + restoring.flush()
    assert out == found.restore(text, json=json)

"""What the teacher is shown under `redact`, and what the client gets back, over a real endpoint."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

from serve.config import Config, Egress, Price, TaskOverrides, TaskRules
from serve.guard.redaction import Redacted, redact
from serve.routing import call
from serve.settings import Settings
from tests.serve.endpoint_support import (
    Model,
    chunk,
    completion,
    events,
    hang_up_after,
    hybrid,
    journaled,
    local_model,
    question,
    streamed,
)
from tests.serve.release_support import write_release

MAIL = "bob@example.org"
BODY: dict[str, Any] = {"model": "gpt", "messages": [{"role": "user", "content": f"Write to {MAIL}."}]}
CALL = {"id": "c", "type": "function", "function": {"name": "mail", "arguments": '{"to": "<EMAIL_1>"}'}}


def settings(home: Path, egress: Egress, **more: Any) -> Settings:
    return Settings(home, config=Config(defaults=TaskRules(egress=egress, audit=0), **more))


def teacher() -> Model:
    """Says the placeholder back, in text and in a tool call; in pieces that cut it anywhere."""

    def behave(_: Model, body: dict[str, Any]) -> Any:
        if not body.get("stream"):
            answer = completion("gpt", "I wrote to <EMAIL_1>.")
            answer["choices"][0]["message"]["tool_calls"] = [CALL]
            return JSONResponse(answer)
        deltas: list[dict[str, Any]] = [
            {"content": piece} for piece in ("I wrote to <", "EMA", "IL_1", "> and <EM")
        ]
        arguments: list[dict[str, Any]] = [
            {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
            for piece in ('{"to": "<EMAIL', '_1>"}')
        ]
        return streamed(
            [chunk("gpt", delta) for delta in (*deltas, *arguments)] + [chunk("gpt", {}, "tool_calls")]
        )

    return Model(behave)


@pytest.mark.parametrize("stream", [False, True])
def test_placeholders_go_out_and_the_clients_words_come_back(tmp_path: Path, stream: bool) -> None:
    model = teacher()
    with hybrid(tmp_path, None, model, settings(tmp_path, "redact")) as served:
        response = served.ask({**BODY, "stream": stream})
    assert MAIL not in json.dumps(model.asked)
    if stream:
        deltas = [piece["choices"][0]["delta"] for piece in events(response)[:-1]]
        text = "".join(delta.get("content") or "" for delta in deltas)
        calls = [part for delta in deltas for part in delta.get("tool_calls") or []]
        arguments = "".join(part["function"]["arguments"] for part in calls)
        assert text == f"I wrote to {MAIL} and <EM"
    else:
        message = response.json()["choices"][0]["message"]
        arguments = message["tool_calls"][0]["function"]["arguments"]
        assert message["content"] == f"I wrote to {MAIL}."
    assert json.loads(arguments) == {"to": MAIL}
    (entry,) = journaled(served)
    assert MAIL not in str(entry)
    assert entry.egress == "redact"


def test_a_stream_that_says_an_empty_reason_until_its_end_is_restored(tmp_path: Path) -> None:
    pieces = [chunk("gpt", {"content": piece}) for piece in ("to <EMA", "IL_1>", "!")]
    for piece in pieces:
        piece["choices"][0]["finish_reason"] = ""
    last = chunk("gpt", {}, "stop")
    last["choices"][0]["delta"] = None
    model = Model(lambda *_: streamed([*pieces, last]))
    with hybrid(tmp_path, None, model, settings(tmp_path, "redact")) as served:
        response = served.ask({**BODY, "stream": True})
    found = [piece["choices"][0]["delta"].get("content") or "" for piece in events(response)[:-1]]
    assert "".join(found) == f"to {MAIL}!"


def test_a_task_by_its_name_in_ollamas_lists_keeps_its_rules(tmp_path: Path) -> None:
    model, rules = teacher(), Config(tasks={"tickets": TaskOverrides(egress="never")})
    with hybrid(tmp_path, None, model, Settings(tmp_path, config=rules)) as served:
        assert served.ask({**BODY, "model": "tickets:latest"}).status_code == 403
        assert model.asked == []
        assert served.ask({**BODY, "model": "other:latest"}).status_code == 200


KEY = "-----BEGIN PRIVATE KEY-----\nMIIEow\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["json_object", "json_schema", "text"])
def test_a_json_answer_is_json_with_the_clients_words_in_it(tmp_path: Path, form: str, stream: bool) -> None:
    pieces = ('{"key": "<SEC', 'RET_1>"}')

    def behave(_: Model, body: dict[str, Any]) -> Any:
        if body.get("stream"):
            ending = chunk("gpt", {}, "stop")
            return streamed([*(chunk("gpt", {"content": piece}) for piece in pieces), ending])
        return JSONResponse(completion("gpt", "".join(pieces)))

    schema = {"name": "key", "schema": {"type": "object"}}
    response_format = {"type": form} | ({"json_schema": schema} if form == "json_schema" else {})
    body = {
        "model": "gpt",
        "messages": [{"role": "user", "content": KEY}],
        "response_format": response_format,
    }
    with hybrid(tmp_path, None, Model(behave), settings(tmp_path, "redact")) as served:
        response = served.ask({**body, "stream": stream})
    if stream:
        deltas = [piece["choices"][0]["delta"] for piece in events(response)[:-1]]
        text = "".join(delta.get("content") or "" for delta in deltas)
    else:
        text = response.json()["choices"][0]["message"]["content"]
    assert json.loads(text, strict=form != "text") == {"key": KEY}
    assert (KEY in text) is (form == "text")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", ["teacher", "local", "nobody"])
def test_what_is_journaled_is_searched_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, stream: bool
) -> None:
    write_release(tmp_path / "releases")
    loops: list[Any] = []

    def searched(*args: Any) -> Redacted:
        loops.append(asyncio._get_running_loop())
        return redact(*args)

    monkeypatch.setattr(call, "redact", searched)
    body = {"model": "tickets", **question(f"Write to {MAIL}")} if asked == "local" else BODY
    with hybrid(
        tmp_path, local_model(), None if asked == "nobody" else teacher(), settings(tmp_path, "redact")
    ) as served:
        assert served.ask({**body, "stream": stream}).is_success is (asked != "nobody")
    (entry,) = journaled(served)
    assert entry.messages
    assert MAIL not in str(entry)
    assert loops
    assert not any(loops)


def test_an_answer_is_journaled_though_its_client_leaves_while_it_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = threading.Event()

    def searched(body: dict[str, Any], region: str) -> Redacted:
        if len(body["messages"]) > 1 and not began.is_set():  # what is journaled: question and answer
            began.set()
            time.sleep(0.5)  # in which the hang-up is noticed
        return redact(body, region)

    monkeypatch.setattr(call, "redact", searched)
    with hybrid(tmp_path, None, teacher(), settings(tmp_path, "redact")) as served:
        hang_up_after(served.url, BODY, began)
        served.until_entries(1)
    (entry,) = journaled(served)
    assert (entry.status, entry.egress) == (200, "redact")
    assert "<EMAIL_1>" in str(entry.answer)


@pytest.mark.parametrize("where", ["rule", "header"])
def test_never_asks_nobody_and_keeps_nothing(tmp_path: Path, where: str) -> None:
    write_release(tmp_path / "releases")
    model = teacher()
    with hybrid(
        tmp_path, local_model(), model, settings(tmp_path, "never" if where == "rule" else "allow")
    ) as served:
        response = served.ask(
            {**BODY, "model": "tickets"}, **{"x-homestill-egress": "never"} if where == "header" else {}
        )
        nobody = served.ask(BODY, **{"x-homestill-egress": "never"})
        unclear = served.ask(BODY, **{"x-homestill-egress": "maybe"})
    assert (response.headers["x-homestill-route"], response.headers["x-homestill-guarantee"]) == (
        "local",
        "none",
    )
    assert (nobody.status_code, unclear.status_code, model.asked) == (403, 400, [])
    assert all((entry.messages, entry.answer) == ([], None) for entry in journaled(served))


@pytest.mark.parametrize(("region", "hidden"), [("DE", True), ("US", False)])
def test_telephone_numbers_are_read_as_in_the_tasks_country(
    tmp_path: Path, region: str, hidden: bool
) -> None:
    model = teacher()
    rules = Config(defaults=TaskRules(egress="redact", phone_region=region))
    with hybrid(tmp_path, None, model, Settings(tmp_path, config=rules)) as served:
        served.ask({**BODY, "messages": [{"role": "user", "content": "Call 030 901820 today."}]})
    assert ("030 901820" not in json.dumps(model.asked)) is hidden


def test_what_cannot_be_searched_does_not_leave(tmp_path: Path) -> None:
    model = teacher()
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    with hybrid(tmp_path, None, model, settings(tmp_path, "redact")) as served:
        response = served.ask({**BODY, "messages": [{"role": "user", "content": image}]})
    assert (response.status_code, model.asked) == (403, [])
    assert "image_url" in response.json()["error"]["message"]


def test_a_cap_is_told_as_one_and_the_local_answer_stands_in(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    model = teacher()
    rules = settings(tmp_path, "allow", daily_usd=0.0001, prices={"gpt": Price(input=1, output=1)})
    with hybrid(tmp_path, local_model(), model, rules) as served:
        degraded = served.ask({**BODY, "model": "tickets"})
        refused = served.ask(BODY)
    assert (degraded.headers["x-homestill-reason"], degraded.headers["x-homestill-degraded"]) == (
        "budget",
        "true",
    )
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "insufficient_quota")
    assert int(refused.headers["retry-after"]) > 0
    assert model.asked == []

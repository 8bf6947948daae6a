"""The endpoint as a client sees it: who answers, what it is told, and what is journaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse, Response

from serve.settings import Settings
from serve.upstreams.dialects import OLLAMA
from tests.serve.endpoint_support import (
    SURE,
    TEACHER_PIECES,
    UNSURE,
    Model,
    Stall,
    chunk,
    completion,
    events,
    hang_up_after,
    held_stream,
    hybrid,
    journaled,
    local_model,
    local_text,
    question,
    status,
    streamed,
    teacher_model,
    told,
)
from tests.serve.release_support import SYSTEM, THRESHOLD, write_release

TEACHER_TEXT = "".join(TEACHER_PIECES)
TOOLS = [{"type": "function", "function": {"name": "f"}}]
OTHER: dict[str, Any] = {"model": "tickets", "messages": [{"role": "user", "content": "Sing"}]}
"""For the task, but not in the words that its certificate covers."""
COST = (100 * 2.0 + 10 * 10.0) / 1e6


def text_of(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


def test_confident_local_answer_is_kept_and_the_decision_told_twice(tmp_path: Path) -> None:
    version = write_release(tmp_path / "releases")
    local, teacher = local_model(SURE), teacher_model()
    with hybrid(tmp_path, local, teacher) as served:
        response = served.ask(question())
        entry = served.entries()[0]
    assert response.status_code == 200
    assert text_of(response) == local_text()
    headers, body = told(response), response.json()["homestill"]
    assert headers.keys() == {name.replace("_", "-") for name in body}
    assert headers["route"] == body["route"] == "local"
    assert headers["reason"] == body["reason"] == "confident"
    assert headers["guarantee"] == body["guarantee"] == "0.95@0.9"
    assert headers["release"] == body["release"] == version
    assert float(headers["threshold"]) == body["threshold"] == THRESHOLD
    assert float(headers["confidence"]) == body["confidence"] > THRESHOLD
    assert (headers["degraded"], headers["cost-usd"]) == ("false", "0.0")
    assert 0 < float(headers["overhead-ms"]) < 1000
    assert response.json()["model"] == f"tickets:{version[-8:]}"
    assert response.json()["choices"][0]["logprobs"] is None
    assert teacher.asked == []
    assert (entry.route, entry.reason, entry.status, entry.predictor) == (
        "local",
        "confident",
        200,
        "predict",
    )
    assert entry.id == response.headers["x-request-id"]
    assert entry.answer == {"role": "assistant", "content": local_text()}
    assert entry.messages == question()["messages"]
    assert (entry.prompt_tokens, entry.completion_tokens, entry.cost_usd) == (7, 2, 0.0)


def test_the_local_model_is_asked_as_it_was_certified(tmp_path: Path) -> None:
    version = write_release(tmp_path / "releases")
    local = local_model()
    body = question(max_tokens=9, temperature=0.7)
    body["messages"][-1]["content"] += " \n"
    with hybrid(tmp_path, local, teacher_model()) as served:
        assert told(served.ask(body))["route"] == "local"
    asked = local.asked[0]
    assert asked["messages"][-1]["content"] == question()["messages"][-1]["content"]
    sampling = {key: asked[key] for key in ("temperature", "max_tokens", "logprobs", "top_logprobs", "model")}
    assert sampling == {
        "temperature": 0.0,
        "max_tokens": 9,
        "logprobs": True,
        "top_logprobs": 5,
        "model": f"tickets:{version[-8:]}",
    }


def test_unsure_local_answer_gives_way_to_the_teacher(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    teacher = teacher_model()
    with hybrid(tmp_path, local_model(UNSURE), teacher) as served:
        response = served.ask(question(seed=3))
        entry = served.entries()[0]
    headers = told(response)
    assert text_of(response) == TEACHER_TEXT
    assert (headers["route"], headers["reason"], headers["guarantee"]) == (
        "teacher",
        "low_confidence",
        "0.95@0.9",
    )
    assert float(headers["confidence"]) < THRESHOLD
    assert float(headers["cost-usd"]) == pytest.approx(COST)
    assert response.json()["model"] == "gpt-4o-2026"
    assert teacher.asked[0] == {**question(seed=3), "model": "gpt-4o"}
    assert teacher.headers[0]["authorization"] == "Bearer sk-teacher"
    assert (entry.local_answer, entry.model) == (local_text(), "gpt-4o-2026")
    assert entry.cost_usd == pytest.approx(COST)


def test_what_the_certificate_does_not_cover_goes_to_the_teacher(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    local = local_model()
    asked: list[tuple[dict[str, Any], str]] = [
        (question(tools=TOOLS), "unsupported"),
        (question(response_format={"type": "json_object"}), "unsupported"),
        (question(n=2), "unsupported"),
        (question(a_field_of_tomorrow=1), "unsupported"),
        (OTHER, "not_this_task"),
        ({**OTHER, "messages": [SYSTEM, {"role": "user", "content": "no prefix"}]}, "not_this_task"),
    ]
    with hybrid(tmp_path, local, teacher_model()) as served:
        for body, reason in asked:
            headers = told(served.ask(body))
            assert (headers["route"], headers["reason"], headers["guarantee"]) == ("teacher", reason, "none")
    assert local.asked == []


def test_an_unparsable_answer_is_named(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    with hybrid(tmp_path, local_model(SURE, local_text("no such label")), teacher_model()) as served:
        headers = told(served.ask(question()))
    assert (headers["route"], headers["reason"], headers["confidence"]) == ("teacher", "unparsable", "0.0")


def test_an_uncertified_release_sends_everything_to_the_teacher(tmp_path: Path) -> None:
    write_release(tmp_path / "releases", router={"certified": False, "threshold": None, "model": None})
    local = local_model()
    with hybrid(tmp_path, local, teacher_model()) as served:
        headers = told(served.ask(question()))
    assert (headers["reason"], headers["threshold"], headers["guarantee"]) == ("policy", "null", "none")
    assert local.asked == []


def test_before_the_first_release_everything_is_passed_through(tmp_path: Path) -> None:
    teacher = teacher_model()
    with hybrid(tmp_path, None, teacher) as served:
        response = served.ask({"model": "gpt-x", "messages": [{"role": "user", "content": "Hi"}], "n": 1})
        entry = served.entries()[0]
    headers = told(response)
    assert (headers["route"], headers["reason"]) == ("teacher", "no_release")
    assert (headers["cost-usd"], response.json()["homestill"]["cost_usd"]) == ("null", None)
    assert teacher.asked[0]["model"] == "gpt-x"
    assert (entry.reason, entry.asked, entry.cost_usd, entry.task) == ("no_release", "gpt-x", None, None)
    assert entry.answer == {"role": "assistant", "content": TEACHER_TEXT}


def test_a_configured_teacher_model_answers_before_the_first_release(tmp_path: Path) -> None:
    teacher = teacher_model()
    with hybrid(tmp_path, None, teacher, Settings(tmp_path, teacher_model="gpt-y")) as served:
        assert served.ask(question()).json()["model"] == "gpt-y-2026"


def test_teacher_down_gives_the_local_answer_marked_degraded(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    for teacher in (None, status(500), status(429), status(401)):
        with hybrid(tmp_path, local_model(UNSURE), teacher) as served:
            for body in (question(), OTHER):
                response = served.ask(body)
                headers = told(response)
                assert response.status_code == 200
                assert (headers["route"], headers["reason"]) == ("local", "teacher_down")
                assert (headers["degraded"], headers["guarantee"]) == ("true", "none")


def test_local_down_gives_the_teachers_answer(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    broken = Model(lambda *_: Response("<html>", media_type="text/html"))
    without_logprobs = Model(lambda _, body: JSONResponse(completion(body["model"], local_text())))
    for local in (None, status(500), broken, without_logprobs):
        with hybrid(tmp_path, local, teacher_model()) as served:
            response = served.ask(question())
        headers = told(response)
        assert (text_of(response), headers["route"], headers["reason"]) == (
            TEACHER_TEXT,
            "teacher",
            "local_down",
        )


def test_both_down_is_one_error_that_names_both(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    with hybrid(tmp_path, status(500, "out of memory"), status(503, "busy", {"Retry-After": "7"})) as served:
        response = served.ask(question())
        entry = served.entries()[0]
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (503, "server_error", "no_model_available")
    assert "busy" in error["message"]
    assert "out of memory" in error["message"]
    assert response.headers["retry-after"] == "7"
    assert (entry.status, entry.route, entry.id) == (503, None, response.headers["x-request-id"])


def test_what_the_local_model_cannot_do_is_never_answered_silently_wrong(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    local = local_model()
    with hybrid(tmp_path, local, None, dialect=OLLAMA) as served:
        response = served.ask(question(tools=TOOLS, tool_choice="required"))
    assert response.status_code == 503
    assert "tool_choice" in response.json()["error"]["message"]
    assert local.asked == []


def test_the_teachers_verdict_on_a_bad_request_reaches_the_client(tmp_path: Path) -> None:
    with hybrid(tmp_path, None, status(400, "no such temperature")) as served:
        response = served.ask(question(temperature=1.5))
    assert (response.status_code, response.json()["error"]["message"]) == (400, "no such temperature")


def test_a_rate_limit_before_the_first_release_is_passed_on(tmp_path: Path) -> None:
    with hybrid(tmp_path, None, status(429, "slow down", {"Retry-After": "3"})) as served:
        response = served.ask(question())
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


class TestOffline:
    def test_no_connection_to_a_teacher_is_ever_opened(self, tmp_path: Path) -> None:
        write_release(tmp_path / "releases")
        teacher = teacher_model()
        offline = Settings(tmp_path, offline=True)
        with hybrid(tmp_path, local_model(UNSURE), teacher, offline, dialect=OLLAMA) as served:
            unsure, unmatched = told(served.ask(question())), told(served.ask(OTHER))
            tools = served.ask(question(tools=TOOLS, tool_choice="required"))
            unknown = served.ask({**OTHER, "model": "gpt-4o"})
        for headers in (unsure, unmatched):
            assert (headers["route"], headers["reason"], headers["guarantee"]) == ("local", "offline", "none")
            assert headers["degraded"] == "false"
        assert (tools.status_code, unknown.status_code) == (503, 404)
        assert unknown.json()["error"]["code"] == "model_not_found"
        assert teacher.asked == []

    def test_a_confident_answer_keeps_its_promise(self, tmp_path: Path) -> None:
        write_release(tmp_path / "releases")
        with hybrid(tmp_path, local_model(SURE), None, Settings(tmp_path, offline=True)) as served:
            headers = told(served.ask(question()))
        assert (headers["reason"], headers["guarantee"]) == ("confident", "0.95@0.9")


class TestStreams:
    def test_a_kept_answer_becomes_chunks(self, tmp_path: Path) -> None:
        write_release(tmp_path / "releases")
        with hybrid(tmp_path, local_model(SURE), teacher_model()) as served:
            response = served.ask(question(stream=True, stream_options={"include_usage": True}))
            entry = served.entries()[0]
        *chunks, done = events(response)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert done == "[DONE]"
        assert told(response)["route"] == "local"
        pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
        assert "".join(pieces) == local_text()
        assert chunks[-1]["usage"]["total_tokens"] == 9
        assert [("homestill" in chunk) for chunk in chunks] == [False, False, False, True]
        assert chunks[-1]["homestill"]["reason"] == "confident"
        assert entry.streamed
        assert entry.answer == {"role": "assistant", "content": local_text()}

    @pytest.mark.parametrize("usage", [True, False])
    def test_a_teachers_stream_is_passed_through(self, tmp_path: Path, usage: bool) -> None:
        write_release(tmp_path / "releases")
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
        teacher = teacher_model()
        with hybrid(tmp_path, local_model(UNSURE), teacher) as served:
            response = served.ask(question(stream=True, **options))
            entry = served.entries()[0]
        *chunks, done = events(response)
        assert (done, told(response)["route"], told(response)["reason"]) == (
            "[DONE]",
            "teacher",
            "low_confidence",
        )
        assert teacher.asked[0]["stream_options"] == {"include_usage": True}
        assert [bool(chunk["choices"]) for chunk in chunks[-2:]] == [True, not usage]
        assert chunks[-1]["homestill"]["cost_usd"] == pytest.approx(COST)
        assert "homestill" not in chunks[-2]
        assert (entry.answer, entry.status) == ({"role": "assistant", "content": TEACHER_TEXT}, 200)
        assert entry.cost_usd == pytest.approx(COST)
        assert entry.prompt_tokens == 100

    def test_each_chunk_is_sent_when_it_comes(self, tmp_path: Path) -> None:
        teacher = Model(held_stream([chunk("m", {"content": "first"})]))
        with (
            hybrid(tmp_path, None, teacher) as served,
            served.client.stream("POST", "/v1/chat/completions", json=question(stream=True)) as response,
        ):
            lines = response.iter_lines()
            assert "first" in next(lines)  # the teacher says no more before this arrived
            teacher.go_on.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"

    def test_a_stream_that_fails_before_its_first_chunk_falls_back(self, tmp_path: Path) -> None:
        write_release(tmp_path / "releases")
        error = Model(lambda *_: streamed([{"error": {"message": "overloaded"}}]))
        for teacher in (status(500), error, Model(lambda *_: streamed([], done=False)), None):
            with hybrid(tmp_path, local_model(UNSURE), teacher) as served:
                response = served.ask(question(stream=True))
            assert told(response)["reason"] == "teacher_down"
            assert events(response)[-1] == "[DONE]"

    def test_a_stream_that_breaks_in_the_middle_ends_in_an_error(self, tmp_path: Path) -> None:
        teacher = Model(lambda *_: streamed([chunk("m", {"content": "Hel"})], done=False))
        with hybrid(tmp_path, None, teacher) as served:
            response = served.ask(question(stream=True))
            entry = served.entries()[0]
        first, last = events(response)
        assert first["choices"][0]["delta"]["content"] == "Hel"
        assert "broke off" in last["error"]["message"]
        assert (entry.status, entry.answer) == (502, {"role": "assistant", "content": "Hel"})


class TestHangingUp:
    def test_cancels_the_question_to_the_local_model(self, tmp_path: Path) -> None:
        write_release(tmp_path / "releases")
        local = Model(lambda model, _: Stall(model))
        with hybrid(tmp_path, local, teacher_model()) as served:
            hang_up_after(served.url, question(), local.began)
            assert local.hung_up.wait(10)

    def test_cancels_the_question_to_the_teacher(self, tmp_path: Path) -> None:
        teacher = Model(lambda model, _: Stall(model))
        with hybrid(tmp_path, None, teacher) as served:
            hang_up_after(served.url, question(), teacher.began)
            assert teacher.hung_up.wait(10)

    def test_cancels_a_stream_though_nothing_comes(self, tmp_path: Path) -> None:
        teacher = Model(held_stream([chunk("m", {"content": "Hel"})]))
        with hybrid(tmp_path, None, teacher) as served:
            hang_up_after(served.url, question(stream=True), teacher.began)
            assert teacher.hung_up.wait(10)
        (entry, *_) = journaled(served)
        assert (entry.status, entry.answer) == (499, {"role": "assistant", "content": "Hel"})


def test_characters_that_utf8_cannot_hold_pass_through(tmp_path: Path) -> None:
    teacher = teacher_model()
    with hybrid(tmp_path, None, teacher) as served:
        data = b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}'
        assert served.client.post("/v1/chat/completions", content=data).status_code == 200
        assert len(served.entries()) == 1
    assert teacher.asked[0]["messages"][0]["content"] == "\ud800"

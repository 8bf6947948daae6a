"""Each way to choose between the two models, over a real endpoint with stand-in models."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, StreamingResponse

from serve.config import Config, StrategyName, TaskRules
from serve.settings import Settings
from tests.serve.endpoint_support import (
    SURE,
    UNSURE,
    Model,
    as_chunks,
    completion,
    events,
    hybrid,
    journaled,
    local_model,
    local_text,
    question,
    status,
    teacher_model,
)
from tests.serve.release_support import write_release

TOOL_RESULT = {"role": "tool", "tool_call_id": "c", "content": "42"}
PLAIN = {"model": "tickets", "messages": [{"role": "user", "content": "Hello there"}]}


def settings(home: Path, **rules: Any) -> Settings:
    return Settings(home, config=Config(defaults=TaskRules(audit=0, **rules)))


def asked(
    home: Path, local: Model, body: dict[str, Any], teacher: Model | None = None, **rules: Any
) -> dict[str, str]:
    write_release(home / "releases")
    with hybrid(home, local, teacher or teacher_model(), settings(home, **rules)) as served:
        response = served.ask(body)
    assert response.status_code == 200
    return {key.removeprefix("x-homestill-"): value for key, value in response.headers.items()}


@pytest.mark.parametrize(
    ("strategy", "threshold", "logprob", "outcome"),
    [
        ("mean-logprob", None, SURE, ("local", "confident")),
        ("mean-logprob", None, UNSURE, ("teacher", "low_confidence")),
        ("mean-logprob", 0.1, UNSURE, ("local", "confident")),
        ("random", 1.0, UNSURE, ("local", "confident")),
        ("random", 0.0, SURE, ("teacher", "policy")),
        ("always-local", None, UNSURE, ("local", "confident")),
        ("always-teacher", None, SURE, ("teacher", "policy")),
        ("knn", None, SURE, ("teacher", "policy")),  # this release knows no neighbours
    ],
)
def test_every_strategy_decides_its_own_way_and_promises_nothing_about_local_answers(
    tmp_path: Path, strategy: StrategyName, threshold: float | None, logprob: float, outcome: tuple[str, str]
) -> None:
    found = asked(tmp_path, local_model(logprob), PLAIN, strategy=strategy, threshold=threshold)
    assert (found["route"], found["reason"], found["guarantee"]) == (*outcome, "none")


@pytest.mark.parametrize(("said", "route"), [("True", "local"), ("False", "teacher"), ("maybe", "teacher")])
def test_self_ask_asks_the_student_itself(tmp_path: Path, said: str, route: str) -> None:
    texts = iter(["It is fine.", said])
    local = Model(lambda _, body: JSONResponse(completion(body["model"], next(texts), None, SURE)))
    assert asked(tmp_path, local, PLAIN, strategy="self-ask")["route"] == route
    assert "It is fine." in local.asked[1]["messages"][0]["content"]


def test_shadow_answers_with_the_teacher_and_journals_whether_both_agree(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    teacher = Model(lambda _, body: JSONResponse(completion(body["model"], local_text("other"))))
    with hybrid(tmp_path, local_model(), teacher, settings(tmp_path, strategy="shadow")) as served:
        response = served.ask(question())
    assert response.headers["x-homestill-route"] == "teacher"
    first, second = journaled(served)
    assert (first.endpoint, second.endpoint, second.audited) == ("chat", "shadow", first.id)
    assert (second.audit, second.reason, second.local_answer) == (0.0, "confident", local_text())


def test_what_shadow_journals_is_redacted_like_everything_else(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    local = local_model(text=local_text("bob@example.org"))
    rules = settings(tmp_path, strategy="shadow", egress="redact")
    with hybrid(tmp_path, local, teacher_model(), rules) as served:
        served.ask(question("Write to bob@example.org"))
    entries = journaled(served)
    assert "bob@example.org" not in str(entries)
    assert [entry.endpoint for entry in entries] == ["chat", "shadow"]
    assert entries[1].messages == entries[0].messages
    assert "<EMAIL_1>" in str(entries[1].local_answer)


class TestOptimistic:
    def test_tokens_go_out_at_once_and_the_end_tells_what_they_were_worth(self, tmp_path: Path) -> None:
        write_release(tmp_path / "releases")
        rules = settings(tmp_path, stream="optimistic")
        with hybrid(tmp_path, local_model(UNSURE), teacher_model(), rules) as served:
            response = served.ask(question(stream=True))
        found = events(response)
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in found[:-1])
        told = found[-2]["homestill"]
        assert (text, told["route"], told["reason"], told["guarantee"]) == (
            local_text(),
            "local",
            "optimistic",
            "none",
        )
        assert 0 < told["confidence"] < told["threshold"]
        assert journaled(served)[0].confidence == told["confidence"]

    def test_what_is_not_streamed_is_certified_as_ever(self, tmp_path: Path) -> None:
        found = asked(tmp_path, local_model(UNSURE), question(), stream="optimistic")
        assert (found["route"], found["reason"]) == ("teacher", "low_confidence")

    def test_what_is_done_to_a_decided_answer_alone_is_waited_for(self, tmp_path: Path) -> None:
        found = asked(tmp_path, local_model(UNSURE), question(stream=True, stop=["x"]), stream="optimistic")
        assert (found["route"], found["reason"]) == ("teacher", "low_confidence")

    def test_a_student_that_does_not_begin_gives_way(self, tmp_path: Path) -> None:
        found = asked(tmp_path, status(500), question(stream=True), stream="optimistic")
        assert (found["route"], found["reason"]) == ("teacher", "local_down")


class TestEarlyHandOver:
    def test_the_student_is_stopped_as_soon_as_it_cannot_be_kept(self, tmp_path: Path) -> None:
        from tests.serve.endpoint_support import held_stream

        write_release(tmp_path / "releases")
        answer = completion("t", local_text("billing"), None, UNSURE)
        local = Model(held_stream(as_chunks(answer)[:-2]))  # it would go on for ever
        with hybrid(tmp_path, local, teacher_model(), settings(tmp_path)) as served:
            response = served.ask(question(stream=True))
            assert local.hung_up.wait(10)
        assert response.headers["x-homestill-reason"] == "low_confidence"
        entry = journaled(served)[0]
        assert entry.local_answer and entry.local_answer.startswith("[[ ## label ## ]]\nbilling")

    def test_with_the_teacher_out_it_is_asked_again_to_the_end(self, tmp_path: Path) -> None:
        write_release(tmp_path / "releases")
        local = local_model(UNSURE)
        with hybrid(tmp_path, local, status(500), settings(tmp_path)) as served:
            response = served.ask(question(stream=True))
        told = [chunk["choices"][0]["delta"].get("content") or "" for chunk in events(response)[:-1]]
        assert "".join(told) == local_text()
        assert (response.headers["x-homestill-degraded"], len(local.asked)) == ("true", 2)

    def test_a_whole_answer_is_there_when_the_teacher_is_out(self, tmp_path: Path) -> None:
        write_release(tmp_path / "releases")
        local = local_model(UNSURE)
        with hybrid(tmp_path, local, status(500), settings(tmp_path)) as served:
            response = served.ask(question())
        assert response.json()["choices"][0]["message"]["content"] == local_text()
        assert (response.headers["x-homestill-degraded"], len(local.asked)) == ("true", 1)

    def test_offline_it_is_asked_once_and_to_the_end(self, tmp_path: Path) -> None:
        write_release(tmp_path / "releases")
        local = local_model(UNSURE)
        with hybrid(tmp_path, local, None, Settings(tmp_path, offline=True)) as served:
            response = served.ask(question())
        assert (response.headers["x-homestill-reason"], len(local.asked)) == ("offline", 1)


class TestToolLoop:
    def loop(self, identity: str) -> dict[str, Any]:
        call = {"id": identity, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {**PLAIN, "messages": [*PLAIN["messages"], said, {**TOOL_RESULT, "tool_call_id": identity}]}

    @pytest.mark.parametrize("strategy", ["certified", "always-local"])
    def test_it_stays_with_the_model_that_began_it(self, tmp_path: Path, strategy: StrategyName) -> None:
        write_release(tmp_path / "releases")
        with hybrid(
            tmp_path, local_model(), teacher_model(), settings(tmp_path, strategy=strategy)
        ) as served:
            theirs = served.ask(self.loop("call_abc")).headers
            ours = served.ask(self.loop("call_local_abc")).headers
        assert (theirs["x-homestill-route"], theirs["x-homestill-reason"]) == ("teacher", "tool_loop")
        assert (ours["x-homestill-route"], ours["x-homestill-guarantee"]) == ("local", "none")

    def test_the_students_calls_carry_ids_by_which_they_are_known(self, tmp_path: Path) -> None:
        write_release(tmp_path / "releases")

        def behave(_: Model, body: dict[str, Any]) -> Any:
            answer = completion(body["model"], "", None, SURE)
            call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            answer["choices"][0]["message"] |= {"content": None, "tool_calls": [call]}
            answer["choices"][0]["finish_reason"] = "tool_calls"
            return JSONResponse(answer)

        body = {**PLAIN, "tools": [{"type": "function", "function": {"name": "f"}}]}
        with hybrid(
            tmp_path, Model(behave), teacher_model(), settings(tmp_path, strategy="always-local")
        ) as served:
            whole = served.ask(body).json()
            parts = events(served.ask({**body, "stream": True}))
        assert whole["choices"][0]["message"]["tool_calls"][0]["id"].startswith("call_local_")
        deltas = [chunk["choices"][0]["delta"] for chunk in parts[:-1]]
        assert [delta["tool_calls"][0]["function"]["name"] for delta in deltas if "tool_calls" in delta] == [
            "f"
        ]


def test_a_prompt_that_cannot_fit_is_not_even_tried(tmp_path: Path) -> None:
    local = local_model()
    found = asked(tmp_path, local, question("x" * 20_000))
    assert (found["route"], found["reason"], local.asked) == ("teacher", "too_long", [])


def test_stop_texts_and_log_probabilities_are_seen_to_after_the_decision(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    with hybrid(tmp_path, local_model(), teacher_model(), settings(tmp_path)) as served:
        choice = served.ask(question(stop=["\n\n"], logprobs=True, top_logprobs=1)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("[[ ## label ## ]]\nbilling", "stop")
    assert choice["logprobs"]["content"][0]["logprob"] == SURE


def test_a_slow_decision_shows_signs_of_life(tmp_path: Path) -> None:
    from serve.config import Limits

    write_release(tmp_path / "releases")
    go_on = threading.Event()

    def slow(_: Model, body: dict[str, Any]) -> Any:
        async def chunks() -> Any:
            import asyncio

            while not go_on.is_set():
                await asyncio.sleep(0.01)
            for each in as_chunks(completion(body["model"], local_text(), None, SURE)):
                yield each

        return _streamed(chunks())

    config = Config(limits=Limits(keep_alive_s=0.05))
    with (
        hybrid(tmp_path, Model(slow), teacher_model(), Settings(tmp_path, config=config)) as served,
        served.client.stream("POST", "/v1/chat/completions", json=question(stream=True)) as response,
    ):
        lines = response.iter_lines()
        signs = [next(lines) for _ in range(4)]
        go_on.set()
        rest = [line for line in lines if line.startswith("data")]
    assert signs == [": still deciding", "", ": still deciding", ""]
    assert '"route":"local"' in rest[-2]
    assert rest[-1] == "data: [DONE]"


def _streamed(chunks: Any) -> Any:
    async def data() -> Any:
        async for each in chunks:
            yield f"data: {json.dumps(each)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    return StreamingResponse(data(), media_type="text/event-stream")

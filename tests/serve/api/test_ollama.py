"""Ollama's API around a chat whose answers are known."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.ollama import ELSEWHERE, OllamaApi
from serve.api.ollama_words import Asked, Ids, from_chat, from_generate
from serve.errors import ApiError
from serve.wire.sse import dumps
from tests.serve.api.dialect_support import (
    LOGPROBS,
    FakeChat,
    answer,
    chat,
    client,
    lines,
    tasks,
)

SAY_HELLO = {"role": "user", "content": "Hello"}
CALL = {"id": "call_9", "type": "function", "function": {"name": "look", "arguments": '{"at": {"x": 1}}'}}


def api_of(fake: FakeChat, tmp_path: Path) -> OllamaApi:
    ticks = itertools.count(0, 1000)
    return OllamaApi(fake, tasks(tmp_path), "1.2.3", clock=lambda: next(ticks))  # type: ignore[arg-type]


async def post(fake: FakeChat, tmp_path: Path, path: str, body: Any, **headers: str) -> httpx.Response:
    api = api_of(fake, tmp_path)
    with client(api.routes()) as asking:
        return await asking.post(path, json=body, headers=headers)


async def get(fake: FakeChat, tmp_path: Path, path: str, **known: Any) -> httpx.Response:
    api = OllamaApi(fake, tasks(tmp_path, **known), "1.2.3")  # type: ignore[arg-type]
    with client(api.routes()) as asking:
        return await asking.get(path)


def request(**more: Any) -> dict[str, Any]:
    return {"model": "tickets:latest", "messages": [SAY_HELLO], "stream": False, **more}


@pytest.mark.asyncio
class TestChat:
    async def test_whole(self, tmp_path: Path) -> None:
        fake = chat(tmp_path, answer=answer("Hi", "length", logprobs=LOGPROBS))
        response = await post(fake, tmp_path, "/api/chat", request())
        body = response.json()
        assert fake.asked == [{"model": "tickets", "messages": [SAY_HELLO], "stream": False}]
        assert fake.endpoints == ["ollama"]
        assert response.headers["x-homestill-route"] == "teacher"
        assert body["message"] == {"role": "assistant", "content": "Hi"}
        assert (body["model"], body["done"], body["done_reason"]) == ("tickets:latest", True, "length")
        assert (body["prompt_eval_count"], body["eval_count"], body["total_duration"]) == (11, 4, 1000)
        assert body["logprobs"] == LOGPROBS["content"]
        assert body["homestill"]["model"] == "gpt-4o-2026"
        assert body["homestill"]["reason"] == "no_release"

    async def test_streams_where_nothing_is_said(self, tmp_path: Path) -> None:
        fake = chat(tmp_path, answer=answer("Hello you", logprobs=LOGPROBS))
        body = request()
        del body["stream"]
        response = await post(fake, tmp_path, "/api/chat", body)
        assert response.headers["content-type"] == "application/x-ndjson"
        assert fake.asked[0]["stream_options"] == {"include_usage": True}
        *pieces, last = lines(response)
        assert "".join(piece["message"]["content"] for piece in pieces) == "Hello you"
        assert {piece["done"] for piece in pieces} == {False}
        assert pieces[0]["logprobs"] == LOGPROBS["content"]
        assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "stop", 4)
        assert last["prompt_eval_duration"] + last["eval_duration"] == last["total_duration"]
        assert last["homestill"]["route"] == "teacher"

    async def test_signs_of_life_are_lines_like_others(self, tmp_path: Path) -> None:
        fake = chat(tmp_path, answer=answer(""), events=[b"", b""])
        found = lines(await post(fake, tmp_path, "/api/chat", request(stream=True)))
        assert [line["message"]["content"] for line in found] == ["", "", ""]
        assert [line["done"] for line in found] == [False, False, True]

    async def test_an_error_on_the_way_is_the_last_line(self, tmp_path: Path) -> None:
        error = dumps({"error": {"message": "it broke off"}, "homestill": {"route": "teacher"}})
        fake = chat(tmp_path, answer=answer(""), events=[b"", error])
        *_, last = lines(await post(fake, tmp_path, "/api/chat", request(stream=True)))
        assert last["error"] == "it broke off"
        assert "done" not in last

    async def test_options(self, tmp_path: Path) -> None:
        fake = chat(tmp_path, answer=answer("Hi"))
        options = {"num_predict": 7, "temperature": 0, "top_p": 0.5, "seed": 3, "stop": ["x"]}
        more = {"num_ctx": 4096, "top_k": 1, "frequency_penalty": 1, "min_p": None}
        response = await post(
            fake, tmp_path, "/api/chat", request(options=options | more, think=True, keep_alive="5m")
        )
        told = fake.asked[0]
        del options["num_predict"]
        assert told == options | {
            "model": "tickets",
            "messages": [SAY_HELLO],
            "stream": False,
            "frequency_penalty": 1,
            "max_tokens": 7,
        }
        assert response.json()["homestill"]["ignored"] == ["num_ctx", "top_k", "think"]

    async def test_what_means_nothing_is_left_out(self, tmp_path: Path) -> None:
        fake = chat(tmp_path, answer=answer("Hi"))
        options = {"num_predict": -1, "seed": -1, "stop": []}
        await post(fake, tmp_path, "/api/chat", request(options=options, format="", tools=[], top_logprobs=3))
        assert fake.asked[0].keys() == {"model", "messages", "stream"}

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ("json", {"type": "json_object"}),
            (
                {"type": "object"},
                {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}},
            ),
        ],
    )
    async def test_format(self, tmp_path: Path, given: Any, told: Any) -> None:
        fake = chat(tmp_path, answer=answer("{}"))
        await post(fake, tmp_path, "/api/chat", request(format=given, logprobs=True, top_logprobs=2))
        assert fake.asked[0]["response_format"] == told
        assert (fake.asked[0]["logprobs"], fake.asked[0]["top_logprobs"]) == (True, 2)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_tool_calls(self, tmp_path: Path, stream: bool) -> None:
        fake = chat(tmp_path, answer=answer({"content": None, "tool_calls": [CALL]}, "tool_calls"))
        tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
        response = await post(fake, tmp_path, "/api/chat", request(tools=tools, stream=stream))
        found = lines(response)
        called = next(line["message"]["tool_calls"] for line in found if "tool_calls" in line["message"])
        assert called == [
            {"id": "call_9", "function": {"index": 0, "name": "look", "arguments": {"at": {"x": 1}}}}
        ]
        assert found[-1]["done_reason"] == "stop"
        assert fake.asked[0]["tools"] == tools

    @pytest.mark.parametrize("stream", [True, False])
    async def test_arguments_that_are_no_object_are_an_error(self, tmp_path: Path, stream: bool) -> None:
        broken = {**CALL, "function": {"name": "look", "arguments": '{"at": '}}
        fake = chat(tmp_path, answer=answer({"content": None, "tool_calls": [broken]}, "tool_calls"))
        response = await post(fake, tmp_path, "/api/chat", request(stream=stream))
        assert "no JSON object" in lines(response)[-1]["error"]
        assert response.status_code == (200 if stream else 502)

    async def test_results_find_their_calls(self, tmp_path: Path) -> None:
        """Clients of Ollama keep no ids: name and order have to do."""
        fake = chat(tmp_path, answer=answer("Hi"))
        calls = [{"function": {"name": name, "arguments": {"n": 1}}} for name in ("a", "b", "a")]
        results = [{"role": "tool", "content": str(at), "tool_name": name} for at, name in enumerate("baa")]
        results.append({"role": "tool", "content": "own", "tool_call_id": "call_own"})
        messages = [SAY_HELLO, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
        await post(fake, tmp_path, "/api/chat", request(messages=messages))
        _, said, *told = fake.asked[0]["messages"]
        one, two, three = (call["id"] for call in said["tool_calls"])
        assert said["tool_calls"][0]["function"] == {"name": "a", "arguments": '{"n":1}'}
        assert [message["tool_call_id"] for message in told] == [two, one, three, "call_own"]

    @pytest.mark.parametrize("stream", [True, False])
    async def test_calls_come_back_with_the_ids_that_they_had(self, tmp_path: Path, stream: bool) -> None:
        fake = chat(tmp_path, answer=answer({"content": None, "tool_calls": [CALL]}, "tool_calls"))
        asked = request(stream=stream)
        sent = {"function": {"name": "look", "arguments": {"at": {"x": 1}}}}
        result = {"role": "tool", "content": "there", "tool_name": "look"}
        back = [SAY_HELLO, {"role": "assistant", "tool_calls": [sent]}, result]
        other = [{**SAY_HELLO, "content": "Bye"}, *back[1:]]
        with client(api_of(fake, tmp_path).routes()) as asking:
            for messages in (asked["messages"], back, other):
                assert (await asking.post("/api/chat", json={**asked, "messages": messages})).is_success
        _, said, told = fake.asked[1]["messages"]
        assert said["tool_calls"] == [{**CALL, "function": {"name": "look", "arguments": '{"at":{"x":1}}'}}]
        assert told["tool_call_id"] == "call_9"
        assert fake.asked[2]["messages"][1]["tool_calls"][0]["id"] == "call_1_0"

    async def test_pictures(self, tmp_path: Path) -> None:
        fake = chat(tmp_path, answer=answer("Hi"))
        await post(
            fake, tmp_path, "/api/chat", request(messages=[{**SAY_HELLO, "images": ["iVBORw0", "/9j/4A"]}])
        )
        text, *pictures = fake.asked[0]["messages"][0]["content"]
        assert text == {"type": "text", "text": "Hello"}
        urls = [picture["image_url"]["url"] for picture in pictures]
        assert urls == ["data:image/png;base64,iVBORw0", "data:image/jpeg;base64,/9j/4A"]

    async def test_no_messages_load_the_model(self, tmp_path: Path) -> None:
        fake = chat(tmp_path)
        loaded = await post(fake, tmp_path, "/api/chat", {"model": "tickets"})
        assert (loaded.json()["done"], loaded.json()["done_reason"]) == (True, "load")
        unloaded = await post(fake, tmp_path, "/api/generate", {"model": "tickets", "keep_alive": 0})
        assert (unloaded.json()["response"], unloaded.json()["done_reason"]) == ("", "unload")
        unknown = await post(fake, tmp_path, "/api/chat", {"model": "nobody:latest"})
        assert unknown.status_code == 404
        assert fake.asked == []

    @pytest.mark.parametrize(
        ("more", "part"),
        [
            ({"model": ""}, "model"),
            ({"messages": "x"}, "messages"),
            ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
            ({"messages": [{"role": "user", "content": "", "images": "x"}]}, "images"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "without a call"),
            ({"messages": [{"role": "assistant", "tool_calls": [{"function": "x"}]}]}, "tool_calls is"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
            ({"options": []}, ""),
            ({"options": "x"}, "options"),
            ({"options": {"num_predict": 0}}, "num_predict"),
            ({"options": {"num_predict": True}}, "num_predict"),
            ({"options": {"num_predict": [1]}}, "num_predict"),
            ({"options": {"temperature": "hot"}}, "temperature"),
            ({"options": {"seed": {}}}, "seed"),
            ({"format": "xml"}, "format"),
            ({"format": 5}, "format"),
            ({"stream": "yes"}, "stream"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"logprobs": 1}, "logprobs"),
            ({"tools": "x"}, "tools"),
        ],
    )
    async def test_faults_are_told_in_one_text(self, tmp_path: Path, more: Any, part: str) -> None:
        fake = chat(tmp_path, answer=answer("Hi"))
        response = await post(fake, tmp_path, "/api/chat", request(**more))
        if not part:
            assert response.status_code == 200
            return
        assert response.status_code == 400
        assert part in response.json()["error"]
        assert fake.asked == []

    async def test_errors_keep_status_and_headers(self, tmp_path: Path) -> None:
        error = ApiError(429, "slow down", headers={"Retry-After": "7"})
        response = await post(chat(tmp_path, answer={}, error=error), tmp_path, "/api/chat", request())
        assert (response.status_code, response.json()) == (429, {"error": "slow down"})
        assert response.headers["retry-after"] == "7"

    async def test_who_has_no_key_is_not_let_in(self, tmp_path: Path) -> None:
        fake = chat(tmp_path, keys=("sk-good",), answer=answer("Hi"))
        refused = await post(fake, tmp_path, "/api/chat", request())
        assert (refused.status_code, type(refused.json()["error"])) == (401, str)
        assert (await get(fake, tmp_path, "/api/tags")).status_code == 401
        assert (await post(fake, tmp_path, "/api/pull", {})).status_code == 401
        taken = await post(fake, tmp_path, "/api/chat", request(), authorization="Bearer sk-good")
        assert taken.status_code == 200


def test_only_so_many_ids_are_remembered() -> None:
    ids = Ids(most=2)
    calls = [{"id": f"call_{number}", "function": {"name": "f", "arguments": {}}} for number in range(3)]
    for number, call in enumerate(calls):
        ids.keep({"content": str(number)}, [call])
    assert [ids.of({"content": str(number)}, calls[:1]) for number in range(3)] == [
        None,
        ["call_1"],
        ["call_2"],
    ]


NAMES = ("model", "messages", "stream", "format", "options", "tools", "logprobs", "top_logprobs", "prompt")
WORDS = ("role", "content", "images", "tool_calls", "function", "name", "arguments", "user", "tool", "seed")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**40)
    | st.floats(0, 9)
    | st.sampled_from([*WORDS, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=500)
@given(st.dictionaries(st.sampled_from(NAMES), JSON))
def test_whatever_comes_is_taken_or_refused_and_nothing_else(more: dict[str, Any]) -> None:
    body = request(**more)
    reads: list[Callable[[], Asked]] = [lambda: from_chat(body, Ids()), lambda: from_generate(body)]
    for read in reads:
        try:
            dumps(read().body)
        except ApiError as error:
            assert error.status == 400


@pytest.mark.asyncio
class TestGenerate:
    async def test_prompt_and_system(self, tmp_path: Path) -> None:
        fake = chat(tmp_path, answer=answer("Hi"))
        body = {"model": "tickets", "prompt": "Hello", "system": "Be kind.", "stream": False}
        response = await post(fake, tmp_path, "/api/generate", body)
        assert fake.asked[0]["messages"] == [{"role": "system", "content": "Be kind."}, SAY_HELLO]
        assert (response.json()["response"], response.json()["done"]) == ("Hi", True)
        assert "message" not in response.json()

    async def test_stream(self, tmp_path: Path) -> None:
        fake = chat(tmp_path, answer=answer("Hello you"))
        *pieces, last = lines(
            await post(fake, tmp_path, "/api/generate", {"model": "tickets", "prompt": "Hi"})
        )
        assert "".join(piece["response"] for piece in pieces) == "Hello you"
        assert last["done"] is True

    @pytest.mark.parametrize("name", ["suffix", "template", "raw", "context"])
    async def test_what_would_change_the_answer_is_refused(self, tmp_path: Path, name: str) -> None:
        fake = chat(tmp_path, answer=answer("Hi"))
        body = {"model": "tickets", "prompt": "Hello", name: [1] if name == "context" else "x"}
        response = await post(fake, tmp_path, "/api/generate", body)
        assert response.status_code == 400
        assert name in response.json()["error"]


@pytest.mark.asyncio
class TestModels:
    async def test_tasks_are_listed(self, tmp_path: Path) -> None:
        (model,) = (await get(chat(tmp_path), tmp_path, "/api/tags")).json()["models"]
        assert (model["name"], model["model"], model["size"]) == ("tickets:latest", "tickets:latest", 5)
        assert model["digest"] == "a" * 64
        assert model["modified_at"] == "2026-11-20T22:15:00Z"
        assert model["details"]["quantization_level"] == "Q4_K_M"
        assert model["capabilities"] == ["completion", "tools"]

    async def test_only_what_runs_is_loaded(self, tmp_path: Path) -> None:
        (model,) = (await get(chat(tmp_path), tmp_path, "/api/ps")).json()["models"]
        assert (model["name"], model["context_length"]) == ("tickets:latest", 512)
        assert (await get(chat(tmp_path), tmp_path, "/api/ps", local=None)).json() == {"models": []}

    async def test_show(self, tmp_path: Path) -> None:
        shown = (await post(chat(tmp_path), tmp_path, "/api/show", {"model": "tickets"})).json()
        assert shown["model_info"]["homestill.threshold"] == 0.8
        assert shown["details"]["parent_model"] == "unsloth/Llama-3.2-1B-Instruct"
        assert "num_ctx" in shown["parameters"]
        unknown = await post(chat(tmp_path), tmp_path, "/api/show", {"model": "x"})
        assert unknown.status_code == 404
        assert (await post(chat(tmp_path), tmp_path, "/api/show", {})).status_code == 400

    async def test_version(self, tmp_path: Path) -> None:
        response = await get(chat(tmp_path, keys=("sk-good",)), tmp_path, "/api/version")
        assert response.json() == {"version": "0.33.0-homestill.1.2.3"}

    @pytest.mark.parametrize("path", sorted(ELSEWHERE))
    async def test_what_is_not_offered_says_so(self, tmp_path: Path, path: str) -> None:
        response = await post(chat(tmp_path), tmp_path, path.replace("{digest}", "sha256:0"), {})
        assert response.status_code == 501
        assert "not offered" in response.json()["error"]

"""The older completions API around a chat whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.api.completions import Completions
from serve.wire.sse import dumps
from tests.serve.api.dialect_support import LOGPROBS, FakeChat, answer, chat, client, events

pytestmark = pytest.mark.asyncio


async def post(fake: FakeChat, **more: Any) -> httpx.Response:
    with client(Completions(fake).routes()) as asking:  # type: ignore[arg-type]
        return await asking.post("/v1/completions", json={"model": "tickets", "prompt": "Once", **more})


async def test_a_completion_is_a_chat_with_one_message(tmp_path: Path) -> None:
    fake = chat(tmp_path, answer=answer(" upon", "length"))
    response = await post(fake, max_tokens=5, temperature=0, n=1, best_of=1, x=1)
    body = response.json()
    assert fake.asked == [
        {
            "model": "tickets",
            "messages": [{"role": "user", "content": "Once"}],
            "max_tokens": 5,
            "temperature": 0,
            "n": 1,
            "x": 1,
        }
    ]
    assert fake.endpoints == ["completions"]
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": " upon", "logprobs": None, "finish_reason": "length"}]
    assert (body["usage"]["total_tokens"], body["homestill"]["route"]) == (15, "teacher")
    assert response.headers["x-homestill-route"] == "teacher"


async def test_logprobs_in_the_older_form_and_echo(tmp_path: Path) -> None:
    fake = chat(tmp_path, answer=answer("Hello", logprobs=LOGPROBS))
    choice = (await post(fake, prompt=["Once"], logprobs=1)).json()["choices"][0]
    assert (fake.asked[0]["logprobs"], fake.asked[0]["top_logprobs"]) == (True, 1)
    assert choice["logprobs"] == {
        "tokens": ["Hel", "lo"],
        "token_logprobs": [-0.1, -0.2],
        "top_logprobs": [{"Hel": -0.1}, {"lo": -0.2}],
        "text_offset": [0, 3],
    }
    assert (await post(fake, echo=True)).json()["choices"][0]["text"] == "OnceHello"
    assert "echo" not in fake.asked[1]


async def test_stream(tmp_path: Path) -> None:
    fake = chat(tmp_path, answer=answer("Hello", logprobs=LOGPROBS))
    response = await post(fake, stream=True, echo=True, stream_options={"include_usage": True})
    *chunks, counts, done = events(response)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "OnceHello"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert (counts["choices"], counts["usage"]["total_tokens"]) == ([], 15)
    assert counts["homestill"]["reason"] == "no_release"


async def test_choices_are_told_apart_in_a_stream(tmp_path: Path) -> None:
    def chunk(index: int, text: str) -> bytes:
        delta = {"content": text}
        tokens = {"content": [{"token": text, "logprob": -0.1}]}
        return dumps({"id": "c", "choices": [{"index": index, "delta": delta, "logprobs": tokens}]})

    fake = chat(tmp_path, answer=answer(""), events=[chunk(0, "abc"), chunk(1, "de"), chunk(0, "f")])
    found = events(await post(fake, stream=True, n=2, logprobs=0))[:-1]
    offsets = [(each["choices"][0]["index"], each["choices"][0]["logprobs"]["text_offset"]) for each in found]
    assert offsets == [(0, [0]), (1, [0]), (0, [3])]


async def test_signs_of_life_and_errors_pass_through(tmp_path: Path) -> None:
    error = {"error": {"message": "broke off"}}
    fake = chat(tmp_path, answer=answer(""), events=[b"", dumps(error)])
    response = await post(fake, stream=True)
    assert response.text.startswith(":")
    assert events(response) == [error]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"echo": "yes"}, "echo"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": []}, "tools"),
        ({"temperature": 3}, "temperature"),
        ({"n": [1]}, "n"),
        ({"model": None}, "model"),
    ],
)
async def test_what_cannot_be_done_is_named(tmp_path: Path, more: dict[str, Any], param: str) -> None:
    fake = chat(tmp_path, answer=answer("x"))
    response = await post(fake, **more)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert fake.asked == []

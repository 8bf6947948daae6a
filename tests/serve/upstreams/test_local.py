from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from serve.config import Config, LocalRules
from serve.errors import SettingsError, UpstreamBusy, UpstreamDown, UpstreamRefused
from serve.release import load
from serve.settings import Settings
from serve.upstreams.dialects import ANY_SERVER, EMBEDDED, OLLAMA, Dialect
from serve.upstreams.gate import Gate
from serve.upstreams.local import EmbeddedLocal, LocalModel, ServerLocal, choose
from serve.upstreams.upstream import connect
from tests.serve.release_support import write_release
from tests.serve.upstreams.conftest import Ask
from tests.serve.upstreams.raw_server import (
    CHUNKS,
    RawServer,
    begun,
    chunk,
    closed_port,
    completion,
    head,
    held,
    raw,
    serving,
    status,
    streamed,
    whole,
)

pytestmark = pytest.mark.asyncio
BODY: dict[str, Any] = {"model": "tickets", "messages": [{"role": "user", "content": "Hi"}]}


class Runtime:
    stopped = False

    async def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


@pytest.fixture
def local(upstream: Ask, runtime: Runtime) -> Any:
    def make(server: RawServer, dialect: Dialect = OLLAMA, gate: Gate | None = None) -> LocalModel:
        return LocalModel(
            upstream(server.url, "local"), "tickets:1", runtime.stop, dialect=dialect, gate=gate
        )

    return make


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


async def test_the_request_is_translated(local: Any) -> None:
    async with serving(whole()) as server:
        await local(server).chat({**BODY, "stream": True, "stream_options": {}, "max_completion_tokens": 3})
        assert server.asked == [
            {**BODY, "model": "tickets:1", "max_tokens": 3, "temperature": 0.0, "top_p": 1.0}
        ]


async def test_what_it_cannot_do_is_refused_and_not_left_out(local: Any) -> None:
    async with serving(whole()) as server:
        asked = {**BODY, "logit_bias": {"1": 2}}
        assert local(server).unsupported(asked) == ["logit_bias"]
        with pytest.raises(UpstreamRefused, match="cannot do logit_bias"):
            await local(server).chat(asked)
        assert server.asked == []


async def test_several_choices_are_asked_for_one_by_one(local: Any) -> None:
    async with serving(*[whole(completion(text)) for text in "abc"]) as server:
        answer = await local(server).chat({**BODY, "n": 3, "seed": 5})
        assert texts(answer) == ["a", "b", "c"]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert answer["usage"] == {"prompt_tokens": 21, "completion_tokens": 6, "total_tokens": 27}
        assert [asked["seed"] for asked in server.asked] == [5, 6, 7]
        assert not any("n" in asked for asked in server.asked)


async def test_a_server_that_does_several_choices_is_let_do_so(local: Any) -> None:
    """And one that ignores it is asked until there are enough."""
    both = completion("a")
    both["choices"].append(
        {**both["choices"][0], "index": 1, "message": {"role": "assistant", "content": "b"}}
    )
    async with serving(whole(both), whole(completion("c"))) as server:
        assert texts(await local(server, ANY_SERVER).chat({**BODY, "n": 3})) == ["a", "b", "c"]
        assert [asked["n"] for asked in server.asked] == [3, 1]


async def test_a_failure_among_several_choices_is_one(local: Any) -> None:
    async with serving(whole(), status(500)) as server:
        with pytest.raises(UpstreamDown, match="HTTP 500"):
            await local(server).chat({**BODY, "n": 2})


async def test_streams(local: Any) -> None:
    async with serving(streamed()) as server:
        events = [json.loads(data) async for data in local(server).chat_stream(BODY)]
        assert events == CHUNKS
        assert server.asked[0]["stream"] is True


async def test_streams_of_several_choices(local: Any) -> None:
    async with serving(streamed()) as server:
        asked = {**BODY, "n": 2, "stream_options": {"include_usage": True}}
        events = [json.loads(data) async for data in local(server).chat_stream(asked)]
        *choices, usage = events
        assert [chunk["choices"][0]["index"] for chunk in choices] == [0, 0, 0, 1, 1, 1]
        assert {chunk["id"] for chunk in events} == {"c"}
        assert usage["usage"] == {"prompt_tokens": 14, "completion_tokens": 4, "total_tokens": 18}
    async with serving(streamed(chunk("Hi", "stop"))) as server:
        events = [json.loads(data) async for data in local(server).chat_stream({**BODY, "n": 2})]
        assert [chunk["choices"][0]["index"] for chunk in events] == [0, 1]


async def test_more_than_it_is_good_for(local: Any) -> None:
    """Streams hold their place until they end, and a request that gives up leaves it."""
    async with serving(held(begun(chunk("Hi")))) as server:
        model = local(server, gate=Gate(1, 1))
        async with aclosing(model.chat_stream(BODY)) as events:
            await anext(events)
            waiting = asyncio.create_task(model.chat(BODY))
            await asyncio.sleep(0)
            assert (model.active, model.waiting) == (1, 1)
            with pytest.raises(UpstreamBusy) as raised:
                await model.chat(BODY)
            assert raised.value.retry_after == "1"
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert (model.active, model.waiting) == (0, 0)
        await server.hung_up.wait()
        assert len(server.asked) == 1


async def test_retiring_waits_for_what_has_begun(local: Any, runtime: Runtime) -> None:
    body = json.dumps(completion()).encode()
    async with serving(held(b"", head("200 OK", "application/json", len(body)) + body)) as server:
        model = local(server, gate=Gate(1, 9))
        asking = [asyncio.create_task(model.chat(BODY)) for _ in range(2)]
        await server.began.wait()
        retiring = asyncio.create_task(model.retire())
        await asyncio.sleep(0)
        assert not runtime.stopped
        server.go_on.set()
        assert [texts(await answer) for answer in asking] == [["Hello"], ["Hello"]]
        await retiring
        assert runtime.stopped
        with pytest.raises(UpstreamDown, match="switched off"):
            await model.chat(BODY)


async def test_embeddings(local: Any) -> None:
    async with serving(whole({"object": "list", "data": [{"embedding": [0.5]}]}), status(501)) as server:
        model = local(server)
        assert (await model.embeddings({"model": "tickets", "input": "Hi"}))["data"][0]["embedding"] == [0.5]
        assert (server.paths, server.asked) == (["/v1/embeddings"], [{"model": "tickets:1", "input": "Hi"}])
        with pytest.raises(UpstreamDown):
            await model.embeddings({"input": "Hi"})
        with pytest.raises(UpstreamRefused, match="embedded runtime makes no embeddings"):
            await local(server, EMBEDDED).embeddings({"input": "Hi"})


async def test_several_hosts_behind_one_model(tmp_path: Path) -> None:
    """One is out, one has not got the model, the third answers; then the first two rest."""
    version = write_release(tmp_path)
    async with serving(status(404, "model not found")) as without, serving(whole()) as good:
        with closed_port() as out:
            rules = LocalRules(hosts=("three",), concurrency=2)
            runtime = ServerLocal(connect(proxies=False), [out, without.url, good.url], OLLAMA, rules)
            model = await runtime.start(load(tmp_path / "tickets" / version))
            for _ in range(3):
                assert texts(await model.chat(BODY)) == ["Hello"]
            assert (len(without.asked), len(good.asked)) == (1, 3)
            assert good.asked[0]["temperature"] == 0.0
            await model.retire()


@pytest.mark.parametrize(
    ("settings", "kind", "urls", "dialect"),
    [
        ({"local": "ollama"}, ServerLocal, ["http://127.0.0.1:11434/v1"], OLLAMA),
        ({"local": "http://gpu:8000/v1"}, ServerLocal, ["http://gpu:8000/v1"], ANY_SERVER),
        ({"local": "embedded"}, EmbeddedLocal, None, None),
        (
            {"local": "ollama", "hosts": ("gpu1", "gpu2:80", "https://gpu3/", "http://gpu4:1/v1")},
            ServerLocal,
            ["http://gpu1:11434/v1", "http://gpu2:80/v1", "https://gpu3/v1", "http://gpu4:1/v1"],
            OLLAMA,
        ),
    ],
)
async def test_the_runtime_that_the_settings_name(
    tmp_path: Path, settings: dict[str, Any], kind: type, urls: list[str] | None, dialect: Dialect | None
) -> None:
    config = Config(local=LocalRules(hosts=settings.pop("hosts", ())))
    local = choose(Settings(tmp_path, config=config, **settings), connect(proxies=False))
    assert type(local) is kind
    if isinstance(local, ServerLocal):
        assert (local._base_urls, local._dialect) == (urls, dialect)


async def test_hosts_of_an_embedded_runtime_are_a_fault(tmp_path: Path) -> None:
    config = Config(local=LocalRules(hosts=("gpu1",)))
    with pytest.raises(SettingsError, match="HOMESTILL_LOCAL"):
        choose(Settings(tmp_path, local="embedded", config=config), connect(proxies=False))


async def test_an_answer_without_an_end_is_none(local: Any) -> None:
    """Ollama's guard against repeats."""
    async with serving(
        whole(completion("x x x", reason=None)), raw(begun(chunk("x")) + b"0\r\n\r\n")
    ) as server:
        with pytest.raises(UpstreamDown, match="no finish_reason"):
            await local(server).chat(BODY)
        with pytest.raises(UpstreamDown, match="before it was complete"):
            assert [data async for data in local(server).chat_stream(BODY)]

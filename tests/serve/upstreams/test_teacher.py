from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from serve.config import Config, Price, TeacherRules
from serve.errors import UpstreamDown, UpstreamRefused
from serve.release import Release, ReleaseInvalid, load
from serve.settings import Settings
from serve.upstreams.breaker import Breaker, State
from serve.upstreams.teacher import Teacher, Teachers, cost, price_of
from serve.upstreams.upstream import connect
from tests.serve.release_support import write_release
from tests.serve.upstreams.raw_server import serving, status, whole

Script = list[Exception | str]


def down(code: int | None = 500, retry_after: str | None = None) -> UpstreamDown:
    return UpstreamDown("teacher", f"HTTP {code}", status=code, retry_after=retry_after)


class Api:
    """An upstream that answers as it is told; waits for ever where it is told nothing."""

    address = "http://api/v1"

    def __init__(self, *script: Exception | str) -> None:
        self.script = list(script)
        self.bodies: list[Mapping[str, Any]] = []
        self.asked = 0

    async def _next(self) -> str:
        self.asked += 1
        if not self.script:
            await asyncio.Event().wait()
        answer = self.script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        return {"text": await self._next()}

    async def chat_stream(self, body: Mapping[str, Any]) -> AsyncGenerator[bytes]:
        yield (await self._next()).encode()
        yield (await self._next()).encode()

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing is open."""


class Lab:
    def __init__(self, *script: Exception | str, model: str | None = "gpt-4o", **rules: Any) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.retried: list[str] = []
        self.api = Api(*script)
        settings = TeacherRules(**rules)
        self.breaker = Breaker(settings.failures, settings.rest_s, lambda: self.now)
        self.teacher = Teacher(
            self.api, model, rules=settings, breaker=self.breaker, sleep=self.sleep, random=Random(1)
        )

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def ask(self) -> str:
        answer = await self.teacher.chat({}, lambda error: self.retried.append(str(error)))
        return str(answer["text"])

    async def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.api.script = [down(401)]
            with pytest.raises(UpstreamDown):
                await self.ask()


def state(lab: Lab) -> State:
    """Asked through a function, so that mypy does not think it stays as it was."""
    return lab.breaker.state


@pytest.mark.asyncio
async def test_it_is_asked_again_after_a_while() -> None:
    lab = Lab(down(), down(None), "Hello", backoff_s=1.0)
    assert await lab.ask() == "Hello"
    assert lab.retried == ["HTTP 500", "HTTP None"]
    assert 0.5 <= lab.slept[0] <= 1.0 <= lab.slept[1] <= 2.0
    assert lab.slept[1] != 2 * lab.slept[0]  # jitter


@pytest.mark.asyncio
async def test_it_is_not_asked_for_ever() -> None:
    lab = Lab(*[down()] * 9, retries=3)
    with pytest.raises(UpstreamDown):
        await lab.ask()
    assert (lab.api.asked, len(lab.slept)) == (4, 3)


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [None, 408, 409, 425, 429, 500, 503, 529])
async def test_what_time_may_mend(code: int | None) -> None:
    assert await Lab(down(code), "Hello").ask() == "Hello"


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [308, 401, 403, 407])
async def test_what_time_does_not_mend(code: int) -> None:
    lab = Lab(down(code), "Hello")
    with pytest.raises(UpstreamDown):
        await lab.ask()
    assert lab.slept == []


@pytest.mark.asyncio
async def test_a_refusal_is_final_and_no_failure_of_the_teachers() -> None:
    lab = Lab("Hello", failures=1)
    lab.api.script = [UpstreamRefused("teacher", "no", status=400)]
    with pytest.raises(UpstreamRefused):
        await lab.ask()
    assert (lab.api.asked, state(lab)) == (1, "closed")


@pytest.mark.asyncio
async def test_retry_after() -> None:
    lab = Lab(down(429, "3"), "Hello")
    assert (await lab.ask(), lab.slept) == ("Hello", [3.0])
    lab = Lab(down(429, "11"), "Hello", longest_wait_s=10.0)
    with pytest.raises(UpstreamDown) as raised:
        await lab.ask()
    assert (raised.value.retry_after, lab.slept) == ("11", [])


@pytest.mark.asyncio
async def test_a_model_that_is_not_there() -> None:
    """Is the request's fault only where the client has chosen it."""
    missing = UpstreamRefused("teacher", "no such model", status=404)
    with pytest.raises(UpstreamDown, match="no such model"):
        await Lab(missing).ask()
    with pytest.raises(UpstreamRefused):
        await Lab(missing, model=None).ask()


@pytest.mark.asyncio
async def test_after_failures_in_a_row_it_is_left_alone() -> None:
    lab = Lab(failures=2, rest_s=15.0)
    await lab.fail(2)
    assert state(lab) == "open"
    lab.now = 4.5
    lab.api.script = ["Hello"]
    with pytest.raises(UpstreamDown, match=r"http://api/v1 is left alone .* HTTP 401") as raised:
        await lab.ask()
    assert (raised.value.retry_after, lab.api.asked, raised.value.billable) == ("11", 2, False)
    lab.now = 15.0
    assert await lab.ask() == "Hello"
    assert state(lab) == "closed"


@pytest.mark.asyncio
async def test_a_probe_is_one_attempt_and_others_do_not_wait_for_it() -> None:
    lab = Lab(failures=1, rest_s=15.0)
    await lab.fail()
    lab.now = 15.0
    lab.api.script = []
    probe = asyncio.create_task(lab.ask())
    await asyncio.sleep(0)
    with pytest.raises(UpstreamDown, match="left alone"):
        await lab.ask()
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    lab.api.script = [down(500), "Hello"]
    with pytest.raises(UpstreamDown, match="HTTP 500"):
        await lab.ask()
    assert (lab.slept, state(lab)) == ([], "open")


@pytest.mark.asyncio
async def test_a_request_does_not_go_on_when_others_have_opened_the_breaker() -> None:
    lab = Lab(down(), down(), "Hello", failures=1)

    async def sleep(_: float) -> None:
        ticket = lab.breaker.admit()
        lab.breaker.failed(ticket, "another request failed")

    lab.teacher._sleep = sleep
    with pytest.raises(UpstreamDown):
        await lab.ask()
    assert lab.api.asked == 2


@pytest.mark.asyncio
async def test_streams_are_asked_for_again_before_their_first_event() -> None:
    lab = Lab(down(), "Hel", "lo")
    assert [data async for data in lab.teacher.chat_stream({})] == [b"Hel", b"lo"]
    lab = Lab("Hel", down(), "Hello", failures=1)
    async with aclosing(lab.teacher.chat_stream({})) as events:
        assert await anext(events) == b"Hel"
        with pytest.raises(UpstreamDown):
            await anext(events)
    assert (lab.slept, state(lab)) == ([], "open")


@pytest.mark.asyncio
async def test_streams_that_always_break_open_the_breaker() -> None:
    lab = Lab(failures=2)
    for _ in range(2):
        lab.api.script = ["Hel", down()]
        with pytest.raises(UpstreamDown):
            assert [data async for data in lab.teacher.chat_stream({})]
    assert state(lab) == "open"


@pytest.mark.asyncio
async def test_a_stream_is_a_probe_until_its_first_event() -> None:
    lab = Lab(failures=1, rest_s=15.0)
    await lab.fail()
    lab.now = 15.0
    lab.api.script = ["Hel", "Hello"]
    events = lab.teacher.chat_stream({})
    assert await anext(events) == b"Hel"
    assert state(lab) == "closed"
    assert await lab.ask() == "Hello"  # while the stream is still open
    await events.aclose()
    assert state(lab) == "closed"


@pytest.mark.parametrize(
    ("address", "sent"),
    [
        ("https://api.mistral.ai/v1", {"max_tokens": 9}),
        ("https://api.deepseek.com", {"max_tokens": 9}),
        ("https://api.openai.com/v1", {"max_completion_tokens": 9, "max_tokens": 20}),
    ],
)
@pytest.mark.asyncio
async def test_the_limit_is_told_in_the_providers_word(address: str, sent: dict[str, int]) -> None:
    lab = Lab("well")
    lab.api.address = address
    await lab.teacher.chat({"model": "m", "max_completion_tokens": 9, "max_tokens": 20})
    assert lab.api.bodies == [{"model": "m", **sent}]


def test_cost() -> None:
    price = Price(input=2.0, output=10.0)
    assert cost(price, {"prompt_tokens": 100, "completion_tokens": 10}) == pytest.approx(0.0003)
    thought = {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "total_tokens": 130,
    }  # 20 of them in no other count
    assert cost(price, thought) == pytest.approx(0.0005)
    assert cost(None, {"prompt_tokens": 100, "completion_tokens": 10}) is None
    assert [cost(price, usage) for usage in (None, {}, {"prompt_tokens": 1}, "x")] == [None] * 4


def test_prices_by_name() -> None:
    a, b = Price(input=1, output=1), Price(input=2, output=2)
    assert price_of("openai/gpt-4o", {"gpt-4o": a}) == a
    assert price_of("gpt-4o", {"openai/gpt-4o": a}) == a
    assert price_of("openai/gpt-4o", {"gpt-4o": a, "openai/gpt-4o": b}) == b
    assert price_of("azure/gpt-4o", {"openai/gpt-4o": a}) is None
    assert price_of("openai/org/name", {"org/name": a}) == a
    assert price_of("", {"gpt-4o": a}) is None


def release(tmp_path: Path, task_yaml: str) -> Release:
    return load(tmp_path / "tickets" / write_release(tmp_path, task_yaml=task_yaml))


def teachers(tmp_path: Path, **settings: Any) -> Teachers:
    return Teachers(Settings(tmp_path, **settings), connect(proxies=False))


@pytest.mark.asyncio
async def test_the_teacher_of_a_release(tmp_path: Path) -> None:
    config = Config(prices={"gpt-4o": Price(input=1.0, output=4.0)})
    priced = release(tmp_path / "a", "name: tickets\nteacher:\n  price_per_1m: {input: 2, output: 10}\n")
    found = teachers(tmp_path, config=config).of(priced)
    assert (found.model, found.price) == ("gpt-4o", Price(input=2.0, output=10.0))
    assert found.upstream.address == "https://api.openai.com/v1"
    other = release(tmp_path / "b", "name: tickets\nteacher:\n  api_base: http://gateway/v1/\n")
    found = teachers(tmp_path, config=config).of(other)
    assert (found.price, found.upstream.address) == (Price(input=1.0, output=4.0), "http://gateway/v1")
    assert teachers(tmp_path).of(other).price is None
    assert (
        teachers(tmp_path, teacher_api_base="http://mine/v1").of(other).upstream.address == "http://mine/v1"
    )


@pytest.mark.asyncio
async def test_a_section_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ReleaseInvalid, match="no section"):
        teachers(tmp_path).of(release(tmp_path, "name: tickets\nteacher: [1]\n"))


@pytest.mark.asyncio
async def test_before_the_first_release(tmp_path: Path) -> None:
    config = Config(prices={"gpt-4o": Price(input=1.0, output=4.0)})
    found = teachers(tmp_path, config=config).before_release("gpt-4o")
    assert (found.model, found.price) == (None, Price(input=1.0, output=4.0))
    found = teachers(tmp_path, config=config, teacher_model="mini").before_release("gpt-4o")
    assert (found.model, found.price) == ("mini", None)


@pytest.mark.asyncio
async def test_one_breaker_an_address(tmp_path: Path) -> None:
    async with serving(status(500), whole()) as server:
        config = Config(teacher=TeacherRules(failures=1, retries=0))
        all_of_them = teachers(tmp_path, teacher_api_base=server.url, config=config)
        assert all_of_them.breakers == {}
        with pytest.raises(UpstreamDown, match="HTTP 500"):
            await all_of_them.before_release("a").chat({"model": "a"})
        with pytest.raises(UpstreamDown, match="left alone"):
            await all_of_them.before_release("b").chat({"model": "b"})
        assert all_of_them.breakers == {server.url: "open"}
        assert len(server.asked) == 1
        await all_of_them.close()

"""The embedded runtime with a real llama.cpp and a model of a few thousand weights."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("gguf", reason="needs gguf, to write a model")

from serve.app import create_app as create_endpoint
from serve.errors import ApiError, EmbeddedError
from serve.records.journal import Journal
from serve.runtime.child import create_app, sampling_of
from serve.runtime.embedded import Embedded, Endpoint
from serve.runtime.generation import Generated, Generator, Sampling
from serve.settings import Settings
from serve.upstreams.local import EmbeddedLocal
from serve.upstreams.upstream import connect
from serve.wire.chunks import Collector
from tests.serve.endpoint_support import hang_up_after, hybrid, question, running
from tests.serve.release_support import point, write_release
from tests.serve.runtime.tiny_gguf import LONG, SPECIAL, lora, write

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def generator(model: Path) -> Generator:
    return Generator.load(model, context=256, threads=1)


def never() -> bool:
    return False


class TestGenerator:
    def test_one_begin_of_text_token(self, generator: Generator) -> None:
        text, tokens = generator.render(HELLO)
        begin = 256 + 2
        assert text.startswith(SPECIAL[0] + SPECIAL[2])
        assert [place for place, token in enumerate(tokens) if token == begin] == [0]

    def test_logprobs_are_those_of_the_softmax_and_greedy_takes_the_best(self, generator: Generator) -> None:
        answer = generator.answer(HELLO, Sampling(max_tokens=8, logprobs=True, top_logprobs=20), never)
        assert answer.tokens is not None
        assert (len(answer.tokens), answer.completion_tokens, answer.finish_reason) == (8, 8, "length")
        for token in answer.tokens:
            tops = [other["logprob"] for other in token["top_logprobs"]]
            assert token["logprob"] == tops[0] == max(tops)
            assert 0.2 < sum(math.exp(top) for top in tops) <= 1 + 1e-5
        everything = generator.answer(HELLO, Sampling(max_tokens=1, logprobs=True, top_logprobs=263), never)
        assert everything.tokens is not None
        total = sum(math.exp(other["logprob"]) for other in everything.tokens[0]["top_logprobs"])
        assert total == pytest.approx(1, abs=1e-5)

    def test_the_text_is_the_tokens_bytes(self, generator: Generator) -> None:
        answer = generator.answer(HELLO, Sampling(max_tokens=12, logprobs=True), never)
        assert answer.tokens is not None
        assert (
            bytes(byte for token in answer.tokens for byte in token["bytes"]).decode(errors="replace")
            == answer.text
        )

    def test_long_tokens_are_whole(self, generator: Generator) -> None:
        assert generator._piece(257) == LONG.encode()

    def test_repeats_itself(self, generator: Generator) -> None:
        sampling = Sampling(max_tokens=12, logprobs=True, top_logprobs=2)
        first = generator.answer(HELLO, sampling, never)
        generator.answer([{"role": "user", "content": "Something else"}], sampling, never)
        again = generator.answer(HELLO, sampling, never)
        assert again.text == first.text
        assert again.tokens is not None
        assert first.tokens is not None
        pairs = zip(again.tokens, first.tokens, strict=True)
        assert all(one["logprob"] == pytest.approx(other["logprob"], abs=1e-3) for one, other in pairs)

    def test_a_seed_decides_the_draw(self, generator: Generator) -> None:
        def draw(seed: int) -> str:
            return generator.answer(HELLO, Sampling(max_tokens=12, temperature=1.5, seed=seed), never).text

        assert draw(1) == draw(1) != draw(2)

    def test_stops(self, generator: Generator) -> None:
        text = generator.answer(HELLO, Sampling(max_tokens=40), never).text
        readable = next(letter for letter in text if letter.isascii())
        cut = generator.answer(HELLO, Sampling(max_tokens=40, stop=(readable,)), never)
        assert (cut.text, cut.finish_reason) == (text[: text.index(readable)], "stop")
        assert generator.answer(HELLO, Sampling(max_tokens=40), lambda: True).completion_tokens == 1

    @pytest.mark.parametrize("number", range(4))
    @pytest.mark.parametrize("stop", [(), ("e",), ("no such text",)])
    def test_what_is_told_on_the_way_is_the_whole_answer(
        self, generator: Generator, number: int, stop: tuple[str, ...]
    ) -> None:
        messages = [{"role": "user", "content": f"Größe {number} 😀"}]
        sampling = Sampling(
            max_tokens=30, temperature=0.9, seed=number, stop=stop, logprobs=True, top_logprobs=2
        )
        heard: list[tuple[str, dict[str, Any] | None]] = []
        answer = generator.answer(messages, sampling, never, lambda *piece: heard.append(piece))
        assert "".join(text for text, _ in heard) == answer.text
        assert [entry for _, entry in heard if entry] == answer.tokens
        whole = generator.answer(messages, sampling, never)
        assert (whole.text, whole.tokens, whole.finish_reason) == (
            answer.text,
            answer.tokens,
            answer.finish_reason,
        )

    def test_a_schema_is_followed(self, generator: Generator) -> None:
        schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        found = generator.answer(
            HELLO, Sampling(max_tokens=60, seed=1, temperature=1.0, schema=json.dumps(schema)), never
        )
        assert found.finish_reason == "stop"
        assert isinstance(json.loads(found.text)["ok"], bool)
        with pytest.raises(ApiError, match="schema cannot be followed"):
            generator.answer(HELLO, Sampling(schema='{"$ref": "#/nowhere"}'), never)

    def test_a_prompt_that_does_not_fit_is_refused(self, generator: Generator) -> None:
        with pytest.raises(ApiError, match="context holds 256") as refusal:
            generator.answer([{"role": "user", "content": "a" * 300}], Sampling(), never)
        assert refusal.value.body["error"]["code"] == "context_length_exceeded"

    def test_a_model_without_a_template_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(EmbeddedError, match="chat_template"):
            Generator.load(write(tmp_path / "bare.gguf", template=None), context=64, threads=1)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({"tools": [{}]}, "tools"),
        ({"n": 2}, "n > 1"),
        ({"top_logprobs": 21}, "0-20"),
        ({"temperature": "hot"}, "hot"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
    ],
)
def test_what_it_does_not_offer_is_an_error(body: dict[str, Any], fault: str) -> None:
    with pytest.raises(ApiError, match=fault):
        sampling_of(body)


USAGE = {"include_usage": True}


def ask(endpoint: Endpoint, **more: Any) -> httpx.Response:
    body = {"model": endpoint.model, "messages": HELLO, "max_tokens": 3, "temperature": 0, **more}
    return httpx.post(f"{endpoint.base_url}/chat/completions", json=body, timeout=30)


class TestEmbedded:
    def test_answers_comes_back_after_a_crash_and_ends(self, model: Path) -> None:
        runtime = Embedded(model, context=128, alias="tiny:1", threads=1)
        with runtime as endpoint:
            answer = ask(endpoint, logprobs=True, top_logprobs=2).json()
            assert (answer["model"], answer["usage"]["completion_tokens"]) == ("tiny:1", 3)
            assert len(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
            whole = ask(endpoint, max_tokens=9, temperature=0, logprobs=True).json()
            lines = ask(
                endpoint, max_tokens=9, temperature=0, logprobs=True, stream=True, stream_options=USAGE
            ).text
            *chunks, end = [line.removeprefix("data: ") for line in lines.splitlines() if line]
            collector = Collector()
            for chunk in chunks:
                collector.add(chunk.encode())
            assert (end, collector.answer()["choices"], collector.usage) == (
                "[DONE]",
                whole["choices"],
                whole["usage"],
            )
            refused = ask(endpoint, messages=[{"role": "user", "content": "a" * 300}], stream=True)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
            rendered = httpx.post(
                endpoint.base_url.replace("/v1", "/extras/render"), json={"messages": HELLO}
            ).json()
            assert len(rendered["tokens"]) == answer["usage"]["prompt_tokens"]
            crashed = runtime.pid
            assert crashed
            os.kill(crashed, signal.SIGSEGV)
            assert answers_again(endpoint)
            assert (runtime.starts, runtime.pid == crashed) == (2, False)
            last = runtime.pid
        assert last
        assert runtime.pid is None
        with pytest.raises(ProcessLookupError):
            os.kill(last, 0)
        with pytest.raises(httpx.ConnectError):
            ask(endpoint)

    def test_a_machine_that_cannot_start_it_again_just_now_is_tried_once_more(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, refusals = (
            subprocess.Popen,
            [OSError(11, "no process is left"), RuntimeError("no thread is left")],
        )

        def popen(*args: Any, **options: Any) -> Any:
            if refusals:
                raise refusals.pop()
            return real(*args, **options)

        runtime = Embedded(model, context=128, alias="tiny:1", threads=1)
        with runtime as endpoint:
            assert runtime.pid
            monkeypatch.setattr(subprocess, "Popen", popen)
            os.kill(runtime.pid, signal.SIGSEGV)
            assert answers_again(endpoint)
        assert refusals == []

    def test_what_cannot_be_loaded_says_why(self, tmp_path: Path) -> None:
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(b"GGUF, it says")
        with pytest.raises(EmbeddedError, match="cannot be loaded"), Embedded(broken, context=64, alias="x"):
            pass
        with (
            pytest.raises(EmbeddedError, match="does not exist"),
            Embedded(tmp_path / "no", context=64, alias="x"),
        ):
            pass

    def test_an_adapter_is_put_on_and_stays_on_after_a_crash(self, tmp_path: Path, model: Path) -> None:
        adapter = lora(tmp_path / "adapter.gguf")

        def said(endpoint: Endpoint) -> list[float]:
            entries = ask(endpoint, logprobs=True).json()["choices"][0]["logprobs"]["content"]
            return [entry["logprob"] for entry in entries]

        with Embedded(model, context=128, alias="x", threads=1) as endpoint:
            bare = said(endpoint)
        runtime = Embedded(model, context=128, alias="x", threads=1, adapter=adapter)
        with runtime as endpoint:
            adapted = said(endpoint)
            assert adapted != pytest.approx(bare, abs=1e-3)
            assert runtime.pid
            os.kill(runtime.pid, signal.SIGSEGV)
            assert answers_again(endpoint)
            assert said(endpoint) == adapted

    def test_an_adapter_that_does_not_fit_or_is_not_there_says_so(self, tmp_path: Path, model: Path) -> None:
        other = lora(tmp_path / "other.gguf", tensor="blk.7.ffn_down.weight")
        for adapter, fault in ((other, "is no LoRA adapter of"), (tmp_path / "no", "no does not exist")):
            with (
                pytest.raises(EmbeddedError, match=fault),
                Embedded(model, context=64, alias="x", adapter=adapter),
            ):
                pass

    def test_the_child_ends_when_its_parent_is_killed(self, model: Path) -> None:
        program = (
            "import sys, json; from pathlib import Path; from serve.runtime.embedded import Embedded\n"
            f"runtime = Embedded(Path({str(model)!r}), context=64, alias='x', threads=1)\n"
            "runtime.start(); print(runtime.pid, flush=True); sys.stdin.read()"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with parent:
            assert parent.stdout
            child = int(parent.stdout.readline())
            watched = os.pidfd_open(child)
            parent.kill()
        try:
            poll = select.poll()
            poll.register(watched, select.POLLIN)
            assert poll.poll(10_000), "the child is still there"
        finally:
            os.close(watched)

    def test_secrets_and_settings_of_the_machine_stay_outside(self, model: Path) -> None:
        environment = {"PATH": os.environ["PATH"], "OPENAI_API_KEY": "sk-secret", "N_CTX": "7", "LANG": "C"}
        runtime = Embedded(model, context=64, alias="x", threads=1, environment=environment)
        with runtime:
            given = Path(f"/proc/{runtime.pid}/environ")
            if not given.exists():
                pytest.skip("needs /proc")
            names = {entry.partition(b"=")[0] for entry in given.read_bytes().split(b"\0") if entry}
        assert names <= {b"PATH", b"LANG", b"PYTHONPATH", b"PYTHONUNBUFFERED", b"LC_CTYPE"}


def answers_again(endpoint: Endpoint) -> bool:
    """Ask until it answers; refused connections are the restart."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            return ask(endpoint).status_code == 200
        except httpx.TransportError:
            continue
    return False


class Endless(Generator):
    """Generates until it is stopped."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.stopped = threading.Event()

    def answer(
        self, messages: Any, sampling: Sampling, stopped: Callable[[], bool], told: Any = None
    ) -> Generated:
        self.began.set()
        while not stopped():
            time.sleep(0.001)
        self.stopped.set()
        return Generated("", "length", None, 1, 1)


def test_a_hang_up_stops_the_generation() -> None:
    endless = Endless()
    with running(create_app(endless, "x")) as url:
        hang_up_after(url, {"messages": HELLO}, endless.began)
        assert endless.stopped.wait(10)


def test_the_router_over_a_real_model(tmp_path: Path, model: Path) -> None:
    """Random weights never fill the form: the answer is unparsable, and with no teacher it is degraded."""
    version = write_release(tmp_path / "releases", gguf=model.read_bytes())
    folder = tmp_path / "releases" / "tickets" / version
    with (
        Embedded(folder / "model.gguf", context=512, alias="tiny", threads=1) as endpoint,
        hybrid(tmp_path, endpoint.base_url.removesuffix("/v1"), None) as served,
    ):
        answer = served.ask(question()).json()
    assert answer["homestill"]["reason"] == "teacher_down"
    assert answer["homestill"]["confidence"] == 0.0
    assert answer["model"] == "tiny"
    assert json.dumps(answer["choices"][0]["message"]["content"])


def test_the_endpoint_starts_swaps_and_ends_the_child_of_each_release(tmp_path: Path, model: Path) -> None:
    releases = tmp_path / "releases"
    first = write_release(releases, runtime="embedded", gguf=model.read_bytes())
    second = write_release(
        releases, runtime="embedded", gguf=model.read_bytes(), stamp="20261121T000000Z", current=False
    )
    broken = write_release(releases, runtime="embedded", stamp="20261122T000000Z", current=False)
    started: list[Embedded] = []

    def embedded(*args: Any, **options: Any) -> Embedded:
        started.append(Embedded(*args, threads=1, **options))
        return started[-1]

    journal = Journal(f"sqlite:///{tmp_path / 'journal.db'}")
    local = EmbeddedLocal(connect(proxies=False), embedded)
    app = create_endpoint(Settings(tmp_path, offline=True), local, None, journal, poll_s=0.02)
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:

        def release() -> str:
            answer = client.post("/v1/chat/completions", json=question())
            assert (answer.status_code, answer.json()["homestill"]["route"]) == (200, "local")
            return str(answer.json()["homestill"]["release"])

        assert release() == first
        point(releases, second)
        while release() == first:
            pass
        assert release() == second
        point(releases, broken)
        while "problem" not in client.get("/healthz").json()["tasks"]["tickets"]:
            assert release() == second
        assert "cannot be loaded" in client.get("/healthz").json()["tasks"]["tickets"]["problem"]
        assert release() == second
        assert started[1].pid
    journal.close()
    assert not any(runtime.pid for runtime in started)

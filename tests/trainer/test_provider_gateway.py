"""One address for the embedded models: loading with the first question, passing on, refusals."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import dspy
import httpx
import pytest

from serve.runtime.embedded import Endpoint
from tests.servers import completion
from trainer.provider.gateway import Gateway
from trainer.runtimes.local import Registration


@contextmanager
def started(registration: Registration) -> Iterator[Endpoint]:
    """A server that says which model it is."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(completion(asked["model"], f"I am {registration.name}")).encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", registration.name)
    server.shutdown()
    server.server_close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    known = {name: Registration("embedded", name, "a" * 64, 512, gguf="x") for name in ("one", "two")}
    made = Gateway(known.get, started)
    yield made
    made.close()


def ask(gateway: Gateway, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Who?"}]}
    return httpx.post(f"{gateway.api_base}/chat/completions", json=body)


def test_a_question_loads_its_model_and_finds_it_at_the_one_address(gateway: Gateway) -> None:
    for name in ("one", "two", "one"):
        assert ask(gateway, name).json()["choices"][0]["message"]["content"] == f"I am {name}"
    assert gateway.loaded == ["one", "two"]
    gateway.unload("one")
    gateway.unload("one")
    assert gateway.loaded == ["two"]
    assert ask(gateway, "one").status_code == 200


def test_many_may_ask_at_the_same_moment(gateway: Gateway) -> None:
    assert ask(gateway, "one").status_code == 200
    gateway._server.shutdown()  # nobody takes up the connections for now
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(
                socket.create_connection(("127.0.0.1", gateway._server.server_port), timeout=2)
            )


def test_dspy_reaches_it(gateway: Gateway) -> None:
    lm = dspy.LM("ollama_chat/one", api_base=gateway.api_base, cache=False)
    assert lm("Who?") == ["I am one"]
    assert lm.copy(model="ollama_chat/two")("Who?") == ["I am two"]


@pytest.mark.parametrize(
    ("path", "content", "status", "said"),
    [
        (
            "/chat/completions",
            b'{"model": "three"}',
            404,
            "no model is called 'three' on the embedded runtime",
        ),
        ("/chat/completions", b"[]", 400, "names a model"),
        ("/chat/completions", b"{", 400, "names a model"),
        ("/embeddings", b"{}", 404, "is not served"),
        ("/completions", b"{}", 404, "/v1/completions is not served; use /v1/chat/completions"),
    ],
)
def test_refusals_have_openais_shape(
    gateway: Gateway, path: str, content: bytes, status: int, said: str
) -> None:
    answer = httpx.post(f"{gateway.api_base}{path}", content=content)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_a_server_that_went_away_is_a_502() -> None:
    @contextmanager
    def gone(registration: Registration) -> Iterator[Endpoint]:
        yield Endpoint("http://127.0.0.1:9/v1", registration.name)

    made = Gateway(lambda name: Registration("embedded", name, "a" * 64, 512, gguf="x"), gone)
    answer = ask(made, "one")
    made.close()
    assert answer.status_code == 502
    assert "gave no answer" in answer.json()["error"]["message"]

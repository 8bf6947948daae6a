"""Endpoints for the clients: in front of a real llama.cpp, of the Ollama double, and of a teacher alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from starlette.responses import JSONResponse, Response

from serve.app import create_app
from serve.config import Config, TaskRules, TeacherRules
from serve.records.journal import Journal
from serve.settings import Settings
from serve.upstreams.dialects import OLLAMA
from serve.upstreams.local import EmbeddedLocal, Local, ServerLocal
from serve.upstreams.teacher import Teachers
from serve.upstreams.upstream import connect
from tests.clients.clients import KEY
from tests.contract.files import shell
from tests.contract.ollama_double import OllamaDouble
from tests.contract.ollama_engine import Canned
from tests.serve.endpoint_support import Model, chunk, completion, held_stream, lab, running, streamed
from tests.serve.release_support import write_release

TASK = "tickets"
JSON_TEXT = '{"ok": true}'
TEXT = "A plain answer, it is."
TEMPLATE = "{{ range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}<assistant>"
RETRY_AFTER = "7"


@dataclass
class Backend:
    """A running endpoint. `answers`: who should answer what a local model can do."""

    name: str
    url: str
    answers: str
    model: str
    teacher: Model
    double: OllamaDouble | None = None
    """The local runtime, where it is this one."""
    local: Model | None = None
    """The local runtime, where it is a server that can do everything."""

    @property
    def capable(self) -> Model:
        """Who does what not every runtime can."""
        return self.local or self.teacher


@contextmanager
def embedded(home: Path) -> Iterator[Backend]:
    """llama.cpp with a model of a few thousand random weights, in a child process."""
    from tests.serve.runtime.tiny_gguf import write

    gguf = write(home / "tiny.gguf").read_bytes()
    write_release(home / "releases", runtime="embedded", gguf=gguf)
    with _endpoint(home, EmbeddedLocal(connect(proxies=False)), "embedded") as (url, teacher):
        yield Backend("embedded", url, "local", TASK, teacher)


@contextmanager
def ollama(home: Path) -> Iterator[Backend]:
    """The double of Ollama, which does what Ollama does: force, ignore and queue."""
    version = write_release(home / "releases", runtime="url")
    canned = Canned(lambda prompt: JSON_TEXT if "JSON" in prompt else TEXT)
    with OllamaDouble(home / "blobs", canned) as double:
        _register(double, shell(home / "model.gguf"), f"{TASK}:{version[-8:]}")
        runtime = ServerLocal(connect(proxies=False), f"{double.url}/v1", dialect=OLLAMA)
        with _endpoint(home, runtime, f"{double.url}/v1") as (url, teacher):
            yield Backend("ollama", url, "local", TASK, teacher, double=double)


@contextmanager
def server(home: Path) -> Iterator[Backend]:
    """Somebody's OpenAI-compatible server, which can do everything, tools with it."""
    write_release(home / "releases", runtime="url")
    local = Model(capable)
    url = f"{lab().address(local)}/v1"
    with _endpoint(home, ServerLocal(connect(proxies=False), url), url) as (endpoint, teacher):
        yield Backend("server", endpoint, "local", TASK, teacher, local=local)


@contextmanager
def teacher_alone(home: Path) -> Iterator[Backend]:
    """Day 0: no release, everything goes to the API model that the client names."""
    with _endpoint(home, EmbeddedLocal(connect(proxies=False)), "embedded") as (url, teacher):
        yield Backend("teacher", url, "teacher", "gpt-4o", teacher)


BACKENDS = {"embedded": embedded, "ollama": ollama, "server": server, "teacher": teacher_alone}


@contextmanager
def _endpoint(home: Path, local: Local, named: str) -> Iterator[tuple[str, Model]]:
    """With a teacher that can do everything, and a task that is answered locally wherever that is possible."""
    teacher = Model(capable)
    config = Config(
        defaults=TaskRules(strategy="always-local"), teacher=TeacherRules(retries=0, failures=1000)
    )
    settings = replace(
        Settings(home),
        local=named,
        teacher_api_base=f"{lab().address(teacher)}/v1",
        teacher_key="sk-teacher",
        api_keys=(KEY,),
        config=config,
    )
    journal = Journal(settings.journal_url)
    app = create_app(settings, local, Teachers(settings, connect(proxies=False)), journal, poll_s=0.02)
    try:
        with running(app) as url:
            yield url, teacher
    finally:
        journal.close()


def _register(double: OllamaDouble, gguf: Path, name: str) -> None:
    data = gguf.read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    with httpx.Client(base_url=double.url) as http:
        assert http.post(f"/api/blobs/{digest}", content=data).status_code == 201
        body = {"model": name, "files": {"m.gguf": digest}, "stream": False, "template": TEMPLATE}
        assert http.post("/api/create", json=body).status_code == 200


CALLS = [("look", {"at": {"x": 1}, "names": ["a"]}), ("look", {"at": {"x": 2}, "names": []}), ("sum", {})]
"""What the teacher calls when it is given tools."""


def capable(model: Model, body: dict[str, Any]) -> Response:
    """A teacher that does what OpenAI's API does; some model names have faults of their own."""
    name = body["model"]
    if name == "slow":
        first = [chunk(name, {"role": "assistant", "content": ""}), chunk(name, {"content": "Well"})]
        return held_stream(first)(model, body)
    if name in FAULTS:
        status, code = FAULTS[name]
        error = {"message": f"it says {status}", "type": "invalid_request_error", "param": None, "code": code}
        headers = {"Retry-After": RETRY_AFTER} if status == 429 else {}
        return JSONResponse({"error": error}, status, headers)
    whole = _answer(body)
    return streamed(_cut(whole, body)) if body.get("stream") else JSONResponse(whole)


FAULTS = {
    "nobody": (404, "model_not_found"),
    "limited": (429, "rate_limit_exceeded"),
    "picky": (400, "invalid_value"),
}


def _answer(body: dict[str, Any]) -> dict[str, Any]:
    asked = body["messages"][-1]
    text = TEXT
    if asked["role"] == "tool":
        results = {
            each["tool_call_id"]: each["content"] for each in body["messages"] if each["role"] == "tool"
        }
        text = json.dumps(results)
    elif "[[ ## ok ## ]]" in str(asked["content"]):  # DSPy's own way to ask for a field
        text = "[[ ## ok ## ]]\nTrue\n\n[[ ## completed ## ]]"
    elif (body.get("response_format") or {}).get("type") in ("json_object", "json_schema"):
        text = JSON_TEXT
    for stop in [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []:
        text = text.partition(stop)[0]
    whole = completion(body["model"], text, None, -0.25 if body.get("logprobs") else None)
    first = whole["choices"][0]
    if first["logprobs"] and not body.get("top_logprobs"):
        for token in first["logprobs"]["content"]:
            token["top_logprobs"] = []
    if body.get("tools") and asked["role"] != "tool" and body.get("tool_choice") != "none":
        first["finish_reason"] = "tool_calls"
        first["message"] = {"role": "assistant", "content": None, "tool_calls": _called(body)}
    whole["choices"] = [{**first, "index": index} for index in range(body.get("n") or 1)]
    return whole


def _called(body: dict[str, Any]) -> list[dict[str, Any]]:
    choice = body.get("tool_choice")
    wanted = choice["function"]["name"] if isinstance(choice, dict) else None
    calls = [call for call in CALLS if wanted in (None, call[0])]
    return [
        {
            "id": f"call_{at}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for at, (name, arguments) in enumerate(calls)
    ]


def _cut(whole: dict[str, Any], body: dict[str, Any]) -> list[dict[str, Any]]:
    """As OpenAI streams: token by token, a call's name first and then its arguments in two pieces."""
    name, choice = whole["model"], whole["choices"][0]
    message = choice["message"]
    chunks = [chunk(name, {"role": "assistant", "content": None if message.get("tool_calls") else ""})]
    text = message.get("content") or ""
    tokens = (choice["logprobs"] or {}).get("content") or [
        {"token": text[at : at + 6]} for at in range(0, len(text), 6)
    ]
    for token in [] if message.get("tool_calls") else tokens:
        piece = chunk(name, {"content": token["token"]})
        if "logprob" in token:
            piece["choices"][0]["logprobs"] = {"content": [token]}
        chunks.append(piece)
    for at, call in enumerate(message.get("tool_calls") or []):
        arguments = call["function"]["arguments"]
        start = {**call, "index": at, "function": {**call["function"], "arguments": ""}}
        chunks.append(chunk(name, {"tool_calls": [start]}))
        for part in (arguments[:3], arguments[3:]):
            chunks.append(chunk(name, {"tool_calls": [{"index": at, "function": {"arguments": part}}]}))
    chunks.append(chunk(name, {}, choice["finish_reason"]))
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**chunk(name, {}), "choices": [], "usage": whole["usage"]})
    return chunks

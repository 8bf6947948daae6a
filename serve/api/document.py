"""What this server speaks, written down for machines (/openapi.json) and for people (/docs)."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.door import EGRESS_HEADER, Door
from serve.api.schemas import ANYTHING, TEXT, Schema, components, maybe, ref, several, thing
from serve.interface import Interface
from serve.routing.decision import HEADERS
from serve.wire.sse import dumps

OPENAI, PREDICT, OLLAMA, WATCH = "OpenAI's API", "Predictions", "Ollama's API", "Watching"
JSON, EVENTS, LINES = "application/json", "text/event-stream", "application/x-ndjson"
STATUSES = {
    "400": "The request is at fault; the message names every fault.",
    "401": "The API key is missing or unknown.",
    "404": "There is no such task, or the key is not for it.",
    "413": "The request is too long.",
    "429": "The budget or the teacher's rate limit is used up; see Retry-After.",
    "503": "Neither model can answer; see Retry-After.",
}
MOST_AT_ONCE, LONGEST_BATCH = 16, 1000
Operation = dict[str, Any]


def document(interfaces: Mapping[str, Interface], *, version: str, secured: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document.

    Args:
        interfaces: of the tasks whose programs can be called, by task.
        version: of this software.
        secured: a key is needed.
    """
    about = "A local model answers what it is proven to answer well, an API model the rest. Who answered, and why, is told in the x-homestill headers and in the answer's homestill object."
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Homestill", "version": version, "description": about},
        "servers": [{"url": "/"}],
        "paths": {**_openai(), **_predictions(interfaces), **_ollama(), **_watching()},
        "components": {"schemas": components()},
    }
    if secured:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _openai() -> dict[str, Any]:
    return {
        "/v1/chat/completions": {
            "post": _asking(
                "chat", "Answer a chat.", OPENAI, ref("ChatRequest"), ref("ChatAnswer"), stream=EVENTS
            )
        },
        "/v1/completions": {
            "post": _asking(
                "completion",
                "Go on with a text, as a chat of one message.",
                OPENAI,
                ref("CompletionRequest"),
                ref("CompletionAnswer"),
                stream=EVENTS,
            )
        },
        "/v1/embeddings": {
            "post": _asking(
                "embedding",
                "Vectors of texts, from the task's local runtime. The embedded one makes none (501).",
                OPENAI,
                ref("EmbeddingRequest"),
                ref("EmbeddingAnswer"),
            )
        },
        "/v1/models": {"get": _looking("models", "The tasks.", OPENAI, ref("Models"))},
        "/v1/models/{name}": {
            "get": _looking("model", "One task.", OPENAI, ref("Model"), parameters=[_in_path("name")])
        },
    }


def _predictions(interfaces: Mapping[str, Interface]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for task, interface in sorted(interfaces.items()):
        one = thing({"outputs": interface.answer(), "homestill": ref("Outcome")}, "outputs", "homestill")
        row = thing({"outputs": maybe(interface.answer()), "homestill": maybe(ref("Outcome"))})
        many = thing({"results": several(row), "homestill": ref("Outcome")}, "results", "homestill")
        rows = thing(
            {
                "batch": several(interface.request(), minItems=1, maxItems=LONGEST_BATCH),
                "concurrency": {"type": "integer", "minimum": 1, "maximum": MOST_AT_ONCE},
            },
            "batch",
            additionalProperties=False,
        )
        path = f"/v1/predict/{task}"
        told = f"Run the program of {task}."
        paths[path] = {"post": _asking(f"predict_{task}", told, PREDICT, interface.request(), one)}
        told = f"Run the program of {task} on many inputs; a row that fails has an error of its own."
        paths[f"{path}/batch"] = {"post": _asking(f"predict_{task}_batch", told, PREDICT, rows, many)}
    return paths


def _ollama() -> dict[str, Any]:
    error = ref("OllamaError")

    def asking(name: str, told: str) -> Operation:
        shape = f"Ollama{name.capitalize()}"
        request, answer = ref(f"{shape}Request"), ref(f"{shape}Answer")
        return _asking(f"ollama_{name}", told, OLLAMA, request, answer, stream=LINES, error=error)

    return {
        "/api/chat": {"post": asking("chat", "Answer a chat; a stream unless stream is false.")},
        "/api/generate": {"post": asking("generate", "Answer a prompt; a stream unless stream is false.")},
        "/api/show": {
            "post": _asking(
                "ollama_show", "A task's release.", OLLAMA, ref("OllamaShowRequest"), ANYTHING, error=error
            )
        },
        "/api/tags": {"get": _looking("ollama_tags", "The tasks.", OLLAMA, ref("OllamaModels"), error=error)},
        "/api/ps": {
            "get": _looking(
                "ollama_ps",
                "The tasks whose local model runs.",
                OLLAMA,
                ref("OllamaModels"),
                error=error,
            )
        },
        "/api/version": {
            "get": _looking(
                "ollama_version",
                "The Ollama whose API this is.",
                OLLAMA,
                thing({"version": TEXT}, "version"),
                open_to_all=True,
            )
        },
    }


def _watching() -> dict[str, Any]:
    recent = {
        "name": "recent",
        "in": "query",
        "description": "How many requests to show; from 0 on.",
        "schema": {"type": "integer", "minimum": 0, "maximum": 50},
    }
    return {
        "/healthz": {
            "get": _looking("health", "Whether all is well.", WATCH, ref("Health"), open_to_all=True)
        },
        "/api/live": {
            "get": _looking("live", "Figures of the last hour.", WATCH, ANYTHING, parameters=[recent])
        },
        "/api/releases": {"get": _looking("releases", "The releases with their scores.", WATCH, ANYTHING)},
        "/metrics": {"get": _looking("metrics", "Figures for Prometheus.", WATCH, TEXT, media="text/plain")},
    }


def _asking(
    identity: str,
    summary: str,
    tag: str,
    request: Schema,
    answer: Schema,
    *,
    stream: str | None = None,
    error: Schema | None = None,
) -> Operation:
    streams = {EVENTS: thing({"data": TEXT}, "data"), LINES: TEXT}
    content = {JSON: {"schema": answer}} | ({stream: {"schema": streams[stream]}} if stream else {})
    headers = {name: {"schema": TEXT} for name in HEADERS.values()}
    egress = {
        "name": EGRESS_HEADER,
        "in": "header",
        "description": "What may leave this machine; the strictest of task, key and this holds.",
        "schema": {"enum": ["allow", "redact", "never"]},
    }
    return {
        "operationId": identity,
        "summary": summary,
        "tags": [tag],
        "parameters": [egress],
        "requestBody": {"required": True, "content": {JSON: {"schema": request}}},
        "responses": {
            "200": {"description": "The answer.", "content": content, "headers": headers},
            **_errors(list(STATUSES), error or ref("Error")),
        },
    }


def _looking(
    identity: str,
    summary: str,
    tag: str,
    answer: Schema,
    *,
    media: str = JSON,
    parameters: list[Schema] | None = None,
    open_to_all: bool = False,
    error: Schema | None = None,
) -> Operation:
    found: Operation = {
        "operationId": identity,
        "summary": summary,
        "tags": [tag],
        "responses": {
            "200": {"description": "Found.", "content": {media: {"schema": answer}}},
            **_errors([] if open_to_all else ["401"], error or ref("Error")),
        },
    }
    if parameters:
        found["parameters"] = parameters
    if open_to_all:
        found["security"] = []
    return found


def _errors(statuses: list[str], error: Schema) -> dict[str, Any]:
    told = {status: STATUSES[status] for status in statuses} | {"default": "Something else went wrong."}
    content = {JSON: {"schema": error}}
    return {status: {"description": text, "content": content} for status, text in told.items()}


def _in_path(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": TEXT}


STYLE = """
main.api { max-width: 60rem; margin: 0 auto; padding: 1rem; display: block; }
.api h2 { margin: 1.6rem 0 .6rem; font-size: 1rem; }
.api details { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; margin: .4rem 0; }
.api summary { padding: .6rem .8rem; margin: 0; cursor: pointer; overflow-wrap: anywhere; }
.api summary b { color: var(--local); margin-right: .5rem; font-size: .8em; }
.api .said { padding: 0 .8rem .8rem; }
.api h3 { margin: .8rem 0 .3rem; font-size: .84rem; }
.api pre { overflow: auto; max-height: 26rem; background: var(--raised); padding: .7rem; border-radius: .4rem; }
"""
_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
PAGE_HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; style-src 'self' 'sha256-{_DIGEST}'; script-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def page(found: Mapping[str, Any]) -> str:
    """The document as a page; it looks like the one at `/`, whose style it uses."""
    sections: dict[str, list[str]] = {}
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            sections.setdefault(operation["tags"][0], []).append(_shown(path, method, operation))
    body = "".join(f"<h2>{escape(tag)}</h2>{''.join(shown)}" for tag, shown in sections.items())
    schemas = "".join(
        f"<details id='{escape(name)}' open><summary>{escape(name)}</summary><div class='said'>{_pre(schema)}</div></details>"
        for name, schema in found["components"]["schemas"].items()
    )
    info = found["info"]
    key = "Send <code>Authorization: Bearer &lt;key&gt;</code>. " if "security" in found else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>Homestill: the API</title>'
        '<link rel="icon" href="/page/icon.svg" type="image/svg+xml">'
        '<link rel="stylesheet" href="/page/style.css"><script src="/page/theme.js"></script>'
        f"<style>{STYLE}</style></head><body><header class='bar'><h1>Homestill {escape(info['version'])}</h1>"
        "<nav aria-label='Page'><a href='/'>Live</a> <a href='/openapi.json'>openapi.json</a></nav></header>"
        f"<main class='api' id='main'><p>{escape(info['description'])}</p><p class='note'>{key}</p>{body}"
        f"<h2>Shapes</h2>{schemas}</main></body></html>"
    )


def _shown(path: str, method: str, operation: Mapping[str, Any]) -> str:
    parts = []
    for parameter in operation.get("parameters", ()):
        values = parameter["schema"].get("enum") or [parameter["schema"]["type"]]
        told = (
            f"{parameter['in']} {parameter['name']}: {', '.join(values)}. {parameter.get('description', '')}"
        )
        parts.append(f"<p class='note'>{escape(told)}</p>")
    if "requestBody" in operation:
        parts.append(f"<h3>Request</h3>{_pre(operation['requestBody']['content'][JSON]['schema'])}")
    for status, response in operation["responses"].items():
        if status == "200":
            parts.append(f"<h3>{', '.join(response['content'])}</h3>")
            parts.append(_pre(next(iter(response["content"].values()))["schema"]))
        else:
            parts.append(f"<p class='note'><b>{escape(status)}</b> {escape(response['description'])}</p>")
    summary = (
        f"<b>{method.upper()}</b><code>{escape(path)}</code> <span>{escape(operation['summary'])}</span>"
    )
    return f"<details><summary>{summary}</summary><div class='said'>{''.join(parts)}</div></details>"


def _pre(schema: Any) -> str:
    """A schema as text; one with a name as a link to it."""
    name = schema.get("$ref", "").rpartition("/")[2]
    if name:
        return f"<p><a href='#{escape(name)}'>{escape(name)}</a>, below</p>"
    return f"<pre>{escape(json.dumps(schema, indent=2, ensure_ascii=False))}</pre>"


class Documents:
    """GET /openapi.json and /docs.

    Args:
        door: who is not let in sees no task.
        interfaces: of the tasks, as they are now.
        version: of this software.
        secured: a key is needed.
    """

    def __init__(
        self, door: Door, interfaces: Callable[[], Mapping[str, Interface]], version: str, *, secured: bool
    ) -> None:
        self._door = door
        self._interfaces = interfaces
        self._version = version
        self._secured = secured

    def routes(self) -> list[Route]:
        return [Route("/openapi.json", self.openapi), Route("/docs", self.docs)]

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return Response(dumps(self._document(request)), media_type=JSON)

    async def docs(self, request: Request) -> Response:
        """GET /docs."""
        return Response(page(self._document(request)), headers=PAGE_HEADERS, media_type="text/html")

    def _document(self, request: Request) -> dict[str, Any]:
        """With the tasks that this client may use."""
        known: Mapping[str, Interface] = {}
        if self._door.is_open_to(request):
            tasks = self._door.caller(request).tasks
            known = {
                name: each for name, each in self._interfaces().items() if tasks is None or name in tasks
            }
        return document(known, version=self._version, secured=self._secured)

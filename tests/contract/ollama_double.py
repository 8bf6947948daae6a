"""A double of Ollama: a real HTTP server that behaves as Ollama 0.33 was seen to, faults included.

    python -m tests.contract.ollama_double --port 0 --port-file F [--llama] [--blobs DIR]

It names itself: version `0.33.0-double`, header `x-ollama-double: 1`. Beside Ollama's routes it has

    POST /_double/faults   {"cut_upload": 1, ...}   how often a fault happens from now on; -1 is always
    GET  /_double/log      every request so far: method, path, JSON body, and the status of its answer

Not done: safetensors, adapters in safetensors, quantize, images, tools, thinking, JSON schemas; the prompt that is too
long for the context is not shortened.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, cast

from tests.contract.ollama_chat import Server, native, openai
from tests.contract.ollama_engine import Canned, Engine, Llama
from tests.contract.ollama_state import Blobs, Faults, Models, Refused, read_exactly

VERSION = "0.33.0-double"
ROUTES = {
    "/": {"GET": "_root", "HEAD": "_root"},
    "/api/version": {"GET": "_version"},
    "/api/tags": {"GET": "_tags"},
    "/api/ps": {"GET": "_ps"},
    "/api/show": {"POST": "_show"},
    "/api/create": {"POST": "_create"},
    "/api/copy": {"POST": "_copy"},
    "/api/delete": {"DELETE": "_delete"},
    "/api/chat": {"POST": "_native_chat"},
    "/v1/chat/completions": {"POST": "_openai_chat"},
    "/v1/models": {"GET": "_openai_models"},
    "/_double/faults": {"POST": "_faults"},
    "/_double/log": {"GET": "_log"},
}


class Gone(Exception):
    """The connection ends here, without an answer."""


class OllamaDouble:
    """The double, served from a thread while the context lasts.

    Args:
        folder: keeps the blobs.
        engine: answers the prompts.
        port: 0 takes a free one.
    """

    def __init__(
        self, folder: Path, engine: Engine | None = None, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.faults = Faults()
        self.blobs = Blobs(folder)
        self.models = Models(self.blobs, self.faults)
        self.engine = engine or Canned()
        self.loaded: dict[str, str] = {}
        """Name by GGUF path: one runner per file, shown under the name that loaded it first."""
        self.loads: list[str] = []
        """The name of every load; two adapters on one file take turns, and each turn is a load."""
        self.on_gpu = False
        """Whether /api/ps says that models lie in video memory."""
        self.log: list[dict[str, Any]] = []
        self.finished = threading.Event()
        """Set when a create whose client had gone was finished."""
        double = self

        class BoundHandler(Handler):
            ollama = double

        self.server = ThreadingHTTPServer((host, port), BoundHandler)
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> OllamaDouble:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def requests(self, method: str, path: str) -> list[dict[str, Any]]:
        """The logged requests of one kind."""
        return [entry for entry in self.log if entry["method"] == method and entry["path"].startswith(path)]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    ollama: OllamaDouble
    protocol_version = "HTTP/1.1"
    server_version = "ollama-double"

    def log_message(self, format: str, *args: Any) -> None:
        """The double keeps its own log."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # names that http.server calls

    def _serve(self) -> None:
        self.entry: dict[str, Any] = {"method": self.command, "path": self.path, "status": None}
        self.ollama.log.append(self.entry)
        try:
            if not self.path.startswith("/_double") and self.ollama.faults.strikes("drop"):
                raise Gone
            self._route()
        except Refused as refusal:
            self._refuse(refusal)
        except (Gone, ConnectionError):
            self._reset()

    def _route(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/blobs/"):
            self._blob(path.removeprefix("/api/blobs/"))
        elif path not in ROUTES:
            self._plain(404, "404 page not found")
        elif self.command not in ROUTES[path]:
            self._plain(405, "405 method not allowed")
        else:
            cast(Callable[[], None], getattr(self, ROUTES[path][self.command]))()

    # -- blobs

    def _blob(self, digest: str) -> None:
        if self.command not in ("HEAD", "POST"):
            self._plain(405, "405 method not allowed")
            return
        there = self.ollama.blobs.path(digest).exists()
        if self.command == "HEAD":
            self._send(200 if there else 404, b"")
        elif there:
            self.close_connection = True  # the body is not read
            self._send(200, b"")
        else:
            self._upload(digest)

    def _upload(self, digest: str) -> None:
        faults = self.ollama.faults
        if faults.strikes("cut_upload"):
            self._read_some()
            raise Gone
        if faults.strikes("restart_upload"):
            self._read_some()
            faults.set({"drop": 1})
            raise Gone
        wrong = faults.strikes("wrong_digest")
        self.ollama.blobs.receive(digest, self._damaged() if wrong else self._chunks())
        self._send(201, b"")

    def _damaged(self) -> Iterator[bytes]:
        for chunk in self._chunks():
            yield bytes([chunk[0] ^ 1]) + chunk[1:]

    def _chunks(self) -> Iterator[bytes]:
        source = cast(BinaryIO, self.rfile)
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from read_exactly(source, int(self.headers.get("Content-Length", 0)))
            return
        while size := int(source.readline().strip() or b"0", 16):
            yield from read_exactly(source, size)
            source.readline()
        source.readline()

    def _read_some(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)

    # -- models

    def _create(self) -> None:
        body = self._json()
        self.ollama.models.check(body)
        faults = self.ollama.faults
        if faults.strikes("restart_create"):
            faults.set({"drop": 1})
            raise Gone
        if faults.strikes("slow_create"):
            self._await_disconnect()
            for _ in self.ollama.models.create(body):
                pass
            self.ollama.finished.set()
            raise Gone
        if body.get("stream", True) is False:
            *_, last = self.ollama.models.create(body)
            self._send_json(200, {"status": last})
        else:
            self._stream_create(body)

    def _stream_create(self, body: dict[str, Any]) -> None:
        statuses = self.ollama.models.create(body)
        first = next(statuses)
        self._begin_stream("application/x-ndjson")
        self._line({"status": first})
        try:
            for status in statuses:
                if status == "writing manifest" and self._disconnected():
                    raise Gone  # with its client's stream the create dies
                self._line({"status": status})
        except Refused as refusal:
            self._line({"error": str(refusal)})
        self._end_stream()

    def _show(self) -> None:
        name = self._json().get("model")
        if not name:
            raise Refused(400, "model is required")
        model = self.ollama.models.get(name)
        lines = [f"FROM {model.gguf}", f'TEMPLATE """{model.template}"""']
        shown = "\n".join(f"{key:<30} {json.dumps(value)}" for key, value in model.parameters.items())
        self._send_json(
            200,
            {
                "modelfile": "\n".join(lines + ([f"ADAPTER {model.adapter}"] if model.adapter else [])),
                "template": model.template or "{{ .Prompt }}",
                "parameters": shown,
                "details": model.details,
                "model_info": {"general.architecture": model.details["family"]},
                "capabilities": ["completion"],
                "modified_at": model.modified_at,
            },
        )

    def _tags(self) -> None:
        listed = [
            {"name": m.name, "model": m.name, "modified_at": m.modified_at, "digest": m.digest[7:], "size": 0}
            | {"details": m.details}
            for m in self.ollama.models.all()
        ]
        self._send_json(200, {"models": listed})

    def _openai_models(self) -> None:
        listed = [{"id": m.name, "object": "model", "owned_by": "library"} for m in self.ollama.models.all()]
        self._send_json(200, {"object": "list", "data": listed})

    def _ps(self) -> None:
        sizes = {name: Path(gguf).stat().st_size for gguf, name in self.ollama.loaded.items()}
        running = [
            {"name": name, "model": name, "size": size, "size_vram": size if self.ollama.on_gpu else 0}
            for name, size in sizes.items()
        ]
        self._send_json(200, {"models": running})

    def _delete(self) -> None:
        body = self._json()
        self.ollama.models.delete(str(body.get("model") or body.get("name")))
        self._send(200, b"")

    def _copy(self) -> None:
        body = self._json()
        self.ollama.models.copy(str(body.get("source")), str(body.get("destination")))
        self._send(200, b"")

    # -- the rest

    def _native_chat(self) -> None:
        self._chat(native)

    def _openai_chat(self) -> None:
        self._chat(openai)

    def _chat(self, shape: Callable[[Server, dict[str, Any], dict[str, Any]], Iterator[Any]]) -> None:
        body = self._json()
        answers = shape(self.ollama, body, self.entry)
        first = next(answers)
        if not isinstance(first, str):
            self._send_json(200, first)
            return
        self._begin_stream("text/event-stream" if first.startswith("data:") else "application/x-ndjson")
        for line in (first, *answers):
            self._line(line)
        self._end_stream()

    def _root(self) -> None:
        self._plain(200, "Ollama is running")

    def _version(self) -> None:
        self._send_json(200, {"version": VERSION})

    def _faults(self) -> None:
        self.ollama.faults.set(self._json())
        self._send_json(200, self.ollama.faults.left)

    def _log(self) -> None:
        self._send_json(200, {"requests": self.ollama.log})

    # -- the wire

    def _json(self) -> dict[str, Any]:
        content = b"".join(self._chunks())
        try:
            body = json.loads(content) if content else None
        except ValueError as error:
            raise Refused(400, f"invalid JSON: {error}") from error
        if not isinstance(body, dict):
            raise Refused(400, "missing request body")
        self.entry["body"] = body
        return body

    def _refuse(self, refusal: Refused) -> None:
        message = str(refusal)
        if self.path.startswith("/v1"):
            kind = {400: "invalid_request_error", 404: "not_found_error"}.get(refusal.status, "api_error")
            error: Any = {"message": message, "type": kind, "param": None, "code": None}
        else:
            error = message
        self.close_connection = True  # what is left of the request's body is not read
        self._send_json(refusal.status, {"error": error})

    def _send_json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json; charset=utf-8")

    def _plain(self, status: int, text: str) -> None:
        self._send(status, text.encode(), "text/plain")

    def _send(self, status: int, content: bytes, kind: str = "") -> None:
        self.entry["status"] = status
        self.send_response(status)
        self.send_header("x-ollama-double", "1")
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _begin_stream(self, kind: str) -> None:
        self.entry["status"] = 200
        self.send_response(200)
        self.send_header("x-ollama-double", "1")
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _line(self, value: Any) -> None:
        line = (value if isinstance(value, str) else json.dumps(value) + "\n").encode()
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")

    def _end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def _disconnected(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _await_disconnect(self) -> None:
        select.select([self.connection], [], [])

    def _reset(self) -> None:
        """Close with RST, as a process that died would."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A double of Ollama for tests.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--port-file", type=Path, help="is given the port once the double answers")
    parser.add_argument("--blobs", type=Path, help="keeps what was uploaded; a temporary folder without")
    parser.add_argument("--llama", action="store_true", help="answer with llama.cpp, not with a canned text")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        engine = Llama() if given.llama else Canned()
        double = OllamaDouble(given.blobs or Path(temporary), engine, given.host, given.port)
        if given.port_file:
            partial = given.port_file.with_suffix(".partial")
            partial.write_text(str(double.server.server_address[1]))
            partial.replace(given.port_file)
        sys.stdout.write(f"{double.url}\n")
        sys.stdout.flush()
        double.server.serve_forever()


if __name__ == "__main__":
    main()

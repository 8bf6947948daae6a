"""One address for every model of the embedded runtime, so that a DSPy model keeps its api_base.

DSPy gives a fine-tuned model another name and the settings of the model that it was made from. So all
models answer at one address, as Ollama's do: a model is loaded with the first question that names it,
stays until it is unloaded, and is loaded again by the next question.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from serve.runtime.embedded import Endpoint
from trainer.errors import HomestillError, RuntimeUnavailable
from trainer.runtimes.choice import launch
from trainer.runtimes.local import Registration

Find = Callable[[str], Registration | None]
Launch = Callable[[Registration], AbstractContextManager[Endpoint]]

ROUTE = "/v1/chat/completions"
TIMEOUT_S = 600.0
log = logging.getLogger("homestill.provider")


class Gateway:
    """Serves the models that `find` knows, on a free loopback port, until it is closed.

    Args:
        find: the registration of a model's name.
        launch: starts the server of a registration.
    """

    def __init__(self, find: Find, launch: Launch = launch) -> None:
        self._find = find
        self._launch = launch
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[AbstractContextManager[Endpoint], Endpoint]] = {}
        gateway = self

        class BoundHandler(_Handler):
            owner = gateway

        self._server = _Server(("127.0.0.1", 0), BoundHandler)
        self.api_base = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        serve = partial(self._server.serve_forever, poll_interval=0.1)
        self._thread = threading.Thread(target=serve, daemon=True, name="provider-gateway")
        self._thread.start()

    @property
    def loaded(self) -> list[str]:
        """Names of the models that hold memory now."""
        return list(self._loaded)

    def load(self, name: str) -> Endpoint:
        """The model's own server, started if it does not run.

        Raises:
            RuntimeUnavailable: nobody registered the name, or the server does not start.
        """
        with self._lock:
            if name not in self._loaded:
                registration = self._find(name)
                if registration is None:
                    raise RuntimeUnavailable(
                        f"no model is called {name!r} on the embedded runtime; take the name that finetune "
                        'returned, the base from OllamaProvider.lm(), or runtime="ollama" for Ollama\'s models'
                    )
                running = self._launch(registration)
                self._loaded[name] = (running, running.__enter__())
                log.info("%s is loaded", name)
            return self._loaded[name][1]

    def unload(self, name: str) -> None:
        """End the model's server, which frees its memory; one that does not run is fine."""
        with self._lock:
            if found := self._loaded.pop(name, None):
                found[0].__exit__(None, None, None)
                log.info("%s is unloaded", name)

    def close(self) -> None:
        """Unload every model and give the address back; safe to call again."""
        for name in self.loaded:
            self.unload(name)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 512
    """An optimizer's threads ask at the same moment; beyond Python's 5 their connections were reset."""
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    """One connection, one question; the answer ends where the connection ends."""

    owner: Gateway

    def log_message(self, format: str, *args: object) -> None:
        """Standard error belongs to the progress bar."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path != ROUTE:
            self._refuse(404, f"{self.path} is not served; use {ROUTE} (in DSPy, model_type='chat')")
            return
        try:
            endpoint = self.owner.load(str(json.loads(body)["model"]))
        except (ValueError, KeyError, TypeError):
            self._refuse(400, "the request is no JSON object that names a model")
        except HomestillError as error:
            self._refuse(404, str(error))
        else:
            self._pass_on(endpoint, body)

    def _pass_on(self, endpoint: Endpoint, body: bytes) -> None:
        address, begun = urlsplit(endpoint.base_url), False
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=TIMEOUT_S)
        try:
            connection.request("POST", self.path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            begun = True
            self.send_response(answer.status)
            self.send_header("content-type", answer.getheader("content-type") or "application/json")
            self.end_headers()
            while part := answer.read1(65536):
                self.wfile.write(part)
        except (OSError, http.client.HTTPException) as error:
            log.warning("%s: the answer broke off (%s)", endpoint.model, type(error).__name__)
            if not begun:
                self._refuse(502, f"{endpoint.model} gave no answer ({type(error).__name__}); ask again")
        finally:
            connection.close()

    def _refuse(self, status: int, message: str) -> None:
        """OpenAI's error shape."""
        body = json.dumps({"error": {"message": message, "type": "local_error", "code": status}}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

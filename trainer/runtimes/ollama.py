"""Ollama over HTTP: models uploaded, created, tried and removed over a network that may fail.

Uploads are not resumable and `create` may outlive the connection that asked for it, so every step
first asks what is there already, and is repeated from its beginning when the network broke.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ollama

from serve.runtime.embedded import Endpoint
from trainer.errors import RegisterError, RuntimeUnavailable
from trainer.runtimes.local import (
    BUSY,
    HELLO,
    PLAIN,
    Chat,
    Kind,
    LocalModel,
    Messages,
    Registration,
    Rendered,
    fault,
)

DEFAULT_PORT = 11434
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
SERVER_FAILED = 500

logger = logging.getLogger("homestill.register")


def host_url(host: str) -> str:
    """OLLAMA_HOST as a URL, by Ollama's own rules: a bare host means http and port 11434."""
    bare = "://" not in host
    url = httpx.URL(f"http://{host}" if bare else host)
    if bare and url.port is None:
        url = url.copy_with(port=DEFAULT_PORT)
    return str(url).rstrip("/")


def check_name(name: str) -> None:
    """Raise RegisterError for a name that Ollama refuses, or accepts and then never serves."""
    model, _, tag = name.partition(":")
    if not PART.fullmatch(model) or not PART.fullmatch(tag):
        raise RegisterError(
            f"model name is {name!r}; use <model>:<tag>, each 1-80 letters, digits, '_', '-' or '.', "
            "the first no '-' or '.'"
        )
    if tag.lower() in ("local", "cloud") or tag.lower().endswith("-cloud"):
        raise RegisterError(
            f"model name is {name!r}; Ollama cannot reach the tag 'local' and sends 'cloud' tags to "
            "ollama.com, choose another tag"
        )


@dataclass(frozen=True)
class Loaded:
    """A model that Ollama holds in memory, and how many of its bytes lie on the card."""

    name: str
    size: int
    vram: int


class Ollama:
    """The runtime behind OLLAMA_HOST.

    Args:
        host: as in OLLAMA_HOST.
        transport: carries the HTTP requests; tests give their own.
        sleep, clock: the passing of time, in seconds.
        create_timeout: seconds to wait for one `create`, which rewrites the whole file in silence,
            and again for a model whose `create` lost its connection.
        attempts: how often an upload or a create is begun before it counts as failed.
    """

    kind: Kind = "ollama"

    def __init__(
        self,
        host: str,
        *,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        create_timeout: float = 1800.0,
        attempts: int = 5,
    ) -> None:
        self.url = host_url(host)
        self._sleep = sleep
        self._clock = clock
        self._patience = create_timeout
        self._attempts = attempts
        timeout = httpx.Timeout(create_timeout, connect=10.0)
        self._http = httpx.Client(base_url=self.url, transport=transport, timeout=timeout, **PLAIN)
        self._client = ollama.Client(self.url, transport=transport, timeout=timeout, **PLAIN)
        self._chat = Chat(transport, sleep, timeout=create_timeout, attempts=attempts)

    def version(self) -> str:
        """The server's version.

        Raises:
            RuntimeUnavailable: it cannot be reached, or is no Ollama.
        """
        with self._translated("tell its version"):
            response = self._http.get("/api/version", timeout=10.0)
            try:
                return str(response.json()["version"])
            except (ValueError, KeyError, TypeError) as error:
                raise ollama.ResponseError("no version in the answer", response.status_code) from error

    def register(self, model: LocalModel) -> Registration:
        """Upload, create and try a model; one that is there with the same content is only tried.

        Raises:
            RegisterError: refused, or does not answer as trained; nothing that this call made is left.
            RuntimeUnavailable: Ollama cannot be reached, or stays busy.
        """
        check_name(model.name)
        model.check()
        found = self._find(model.name)
        if found is not None:
            self._same_or_error(model, found)
            self._try(model)
        else:
            try:
                self._make(model)
                self._try(model)
            except BaseException:
                self._clean_up(model.name)
                raise
        return Registration.of(self.kind, model, base_url=f"{self.url}/v1")

    @contextmanager
    def serving(self, registration: Registration) -> Iterator[Endpoint]:
        """Ollama loads the model with the first question; here it only has to be there.

        Raises:
            RuntimeUnavailable: Ollama cannot be reached, or has no such model.
        """
        if self._find(registration.name) is None:
            raise RuntimeUnavailable(
                f"{registration.name} is not in Ollama at {self.url}; delete the run's register folder and run again"
            )
        yield Endpoint(base_url=f"{self.url}/v1", model=registration.name)

    def render(self, endpoint: Endpoint, messages: Messages) -> Rendered:
        """The prompt text as Ollama renders it, without answering it.

        Raises:
            RegisterError: Ollama refuses, or is too old to show it.
        """
        body = {
            "model": endpoint.model,
            "messages": [dict(message) for message in messages],
            "stream": False,
            "_debug_render_only": True,
        }
        with self._translated(f"render a prompt with {endpoint.model}"):
            response = self._http.post("/api/chat", json=body)
            if response.status_code != httpx.codes.OK:
                raise ollama.ResponseError(response.text, response.status_code)
        text = response.json().get("_debug_info", {}).get("rendered_template")
        if text is None:
            raise RegisterError(
                f"Ollama at {self.url} does not show rendered prompts; upgrade it (0.33 is known to work)"
            )
        return Rendered(text=str(text))

    def loaded(self) -> list[Loaded]:
        """The models in memory, under the name that loaded each first.

        Raises:
            RuntimeUnavailable: Ollama cannot be reached.
        """
        with self._translated("tell what it has loaded"):
            running = self._client.ps().models
        return [
            Loaded(model.model or model.name or "", model.size or 0, model.size_vram or 0)
            for model in running
        ]

    def has(self, name: str) -> bool:
        """Whether a model of this name can be asked."""
        return self._find(name) is not None

    def load(self, name: str, keep_alive: str | float) -> None:
        """Bring a model into memory, for as long as Ollama's `keep_alive` says."""
        with self._translated(f"load {name}"):
            self._client.chat(name, messages=[], keep_alive=keep_alive)  # no message: it says nothing

    def unload(self, name: str) -> None:
        """Give a model's memory back at once; one that is not there is fine."""
        with self._translated(f"unload {name}"):
            try:
                self._client.chat(name, messages=[], keep_alive=0)
            except ollama.ResponseError as error:
                if error.status_code != httpx.codes.NOT_FOUND:
                    raise

    def unload_all(self) -> list[Loaded]:
        """Give the memory of every loaded model back, so that a training finds it free; what was loaded."""
        held = self.loaded()
        for model in held:
            self.unload(model.name)
        return held

    def remove(self, name: str) -> None:
        """Delete a model; one that is not there is fine."""
        with self._translated(f"delete {name}"):
            try:
                self._client.delete(name)
            except ollama.ResponseError as error:
                if error.status_code != httpx.codes.NOT_FOUND:
                    raise

    def _find(self, name: str) -> ollama.ShowResponse | None:
        with self._translated(f"look up {name}"):
            try:
                return self._client.show(name)
            except ollama.ResponseError as error:
                if error.status_code == httpx.codes.NOT_FOUND:
                    return None
                raise

    def _same_or_error(self, model: LocalModel, found: ollama.ShowResponse) -> None:
        """The name holds a hash of the content; whoever took it for something else is not overwritten."""
        if (found.template or "").strip() != model.template.go.strip():
            raise RegisterError(
                f"{model.name} is in Ollama at {self.url} with another template; it is not overwritten, "
                f"remove it with `ollama rm {model.name}` and run again"
            )

    def _make(self, model: LocalModel) -> None:
        """Upload and create until both are done; what is there already costs one question."""
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                self._sleep(min(2.0**attempt, 30.0))
            for file, sha256 in model.files.values():
                self._upload(file, sha256)
            problem = self._create(model)
            if not problem:
                return
        raise RuntimeUnavailable(
            f"Ollama at {self.url} did not create {model.name} in {self._attempts} attempts ({problem}); "
            "look at its log and run again"
        )

    def _upload(self, file: Path, sha256: str) -> None:
        """Bring the file there, whole, under its digest."""
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                self._sleep(min(2.0**attempt, 30.0))
            try:
                if self._has(sha256):
                    return
                problem = self._send(file, sha256)
            except httpx.TransportError as error:  # the upload may be complete all the same: ask again
                problem = f"{type(error).__name__}: {error}"
                continue
            if not problem:
                return
        raise RuntimeUnavailable(
            f"Ollama at {self.url} did not take {file.name} in {self._attempts} attempts ({problem}); "
            "check the network and that OLLAMA_HOST is an Ollama server, then run again"
        )

    def _has(self, sha256: str) -> bool:
        return self._http.head(f"/api/blobs/sha256:{sha256}").status_code == httpx.codes.OK

    def _send(self, file: Path, sha256: str) -> str:
        """Upload once. Returns why to try again; empty when it is there."""
        with open(file, "rb") as content:  # httpx takes Content-Length from the file
            response = self._http.post(f"/api/blobs/sha256:{sha256}", content=content)
        if response.is_success:
            return ""
        text = fault(response)
        if "no space left" in text:
            raise RegisterError(f"Ollama at {self.url} has no space for {file.name} ({text}); free some disk")
        if "digest mismatch" in text or response.status_code in BUSY or response.status_code >= SERVER_FAILED:
            return f"HTTP {response.status_code}: {text}"
        raise RegisterError(
            f"Ollama at {self.url} refused {file.name} with HTTP {response.status_code}: {text}; "
            "check that OLLAMA_HOST is an Ollama server and that nothing between limits uploads"
        )

    def _create(self, model: LocalModel) -> str:
        """Create once. Returns why to try again; empty when the model is there."""
        try:
            done = self._client.create(
                model=model.name,
                files={"model.gguf": f"sha256:{model.sha256}"},
                adapters={"adapter.gguf": f"sha256:{model.adapter.sha256}"} if model.adapter else None,
                template=model.template.go,
                parameters=parameters(model),
                stream=False,  # a stream's create dies with its connection, this one is finished by the server
            )
        except ConnectionError as error:
            return str(error)
        except httpx.TransportError as error:
            return "" if self._appears(model.name) else f"{type(error).__name__}: {error}"
        except ollama.ResponseError as error:
            if "no such file" in error.error or error.status_code in BUSY:
                return str(error.error)
            raise RegisterError(
                f"Ollama at {self.url} refused {model.name}: {error.error}; export the model again, "
                "or use a newer Ollama if it does not know the architecture"
            ) from error
        return "" if done.status == "success" else f"create ended with {done.status!r}"

    def _appears(self, name: str) -> bool:
        """Wait for a model whose create lost its connection: the server may still be at work on it."""
        deadline = self._clock() + self._patience
        while True:
            try:
                if self._find(name) is not None:
                    return True
            except RuntimeUnavailable:
                return False  # it went down, and the create with it
            if self._clock() >= deadline:
                return False
            self._sleep(2.0)

    def _try(self, model: LocalModel) -> None:
        """Prompt and first answer of the model must be as in training."""
        endpoint = Endpoint(base_url=f"{self.url}/v1", model=model.name)
        rendered = self.render(endpoint, HELLO).text
        # the tokenizer adds the beginning-of-text token; parity counts that it is there once
        expected = model.template.render(HELLO, add_generation_prompt=True).removeprefix(model.template.bos)
        if rendered != expected:
            raise RegisterError(
                f"{model.name} renders {rendered!r} in Ollama, trained was {expected!r}; "
                "Ollama did not take the template, see `ollama show --template`"
            )
        self._chat.smoke(endpoint)

    def _clean_up(self, name: str) -> None:
        try:
            self.remove(name)
        except RuntimeUnavailable as error:
            logger.warning(
                "%s is in no use but may be left in Ollama (%s); remove it with `ollama rm %s`",
                name,
                error,
                name,
            )

    @contextmanager
    def _translated(self, purpose: str) -> Iterator[None]:
        try:
            yield
        except (httpx.TransportError, ConnectionError) as error:
            raise RuntimeUnavailable(
                f"Ollama at {self.url} cannot {purpose} ({type(error).__name__}); check that it runs "
                "(`ollama serve`) and OLLAMA_HOST"
            ) from error
        except ollama.ResponseError as error:
            kind = RuntimeUnavailable if error.status_code in BUSY else RegisterError
            unknown = error.status_code == httpx.codes.NOT_FOUND
            raise kind(
                f"Ollama at {self.url} cannot {purpose}: HTTP {error.status_code}, {error.error}; "
                f"{'check the name with `ollama list`' if unknown else 'look at its log'}"
            ) from error


def parameters(model: LocalModel) -> dict[str, Any]:
    """The model's parameters, strictly typed: Ollama stores anything and fails at every answer later."""
    return {
        "temperature": 0.0,
        "num_ctx": int(model.context),
        "num_predict": int(model.max_tokens),
        "stop": [str(stop) for stop in model.template.stop],
    }

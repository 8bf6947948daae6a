"""The runtimes that can serve a local model, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import httpx

from serve.errors import EmbeddedError
from serve.runtime.embedded import Embedded, Endpoint
from trainer.errors import RegisterError, RuntimeUnavailable
from trainer.runs import Run
from trainer.runtimes.local import (
    PLAIN,
    Chat,
    Kind,
    LocalModel,
    Messages,
    Registration,
    Rendered,
    Reply,
    Runtime,
    fault,
)
from trainer.runtimes.ollama import Ollama

__all__ = [
    "Chat",
    "EmbeddedRuntime",
    "Endpoint",
    "LocalModel",
    "Registration",
    "Rendered",
    "Reply",
    "Runtime",
    "ServerRuntime",
    "choice",
    "describe",
    "launch",
    "ollama",
    "runtime",
]

OLLAMA_HOST = "127.0.0.1:11434"
Launch = Callable[[Registration], AbstractContextManager[Endpoint]]


def choice(environment: Mapping[str, str]) -> str:
    """HOMESTILL_LOCAL, or what it means when it is not set: Ollama where OLLAMA_HOST names one.

    Raises:
        RuntimeUnavailable: it names no runtime.
    """
    given = environment.get("HOMESTILL_LOCAL") or ("ollama" if environment.get("OLLAMA_HOST") else "embedded")
    if given not in ("ollama", "embedded") and not given.startswith(("http://", "https://")):
        raise RuntimeUnavailable(
            f"HOMESTILL_LOCAL is {given!r}; use ollama, embedded or the URL of an OpenAI-compatible server"
        )
    return given


def ollama(environment: Mapping[str, str], **options: Any) -> Ollama:
    """The Ollama of OLLAMA_HOST, else the one on this machine, whether it is the chosen runtime or not.

    Args:
        options: of `Ollama`.
    """
    return Ollama(environment.get("OLLAMA_HOST") or OLLAMA_HOST, **options)


def runtime(run: Run) -> Runtime:
    """The runtime that HOMESTILL_LOCAL names.

    Raises:
        RuntimeUnavailable: it names none.
    """
    given = choice(run.environment)
    if given == "ollama":
        return ollama(run.environment)
    return EmbeddedRuntime() if given == "embedded" else ServerRuntime(given)


def describe(environment: Mapping[str, str]) -> tuple[str, Literal["ok", "note", "missing"], str]:
    """The chosen runtime's kind, whether it answers, and what to read about it."""
    try:
        given = choice(environment)
        if given == "embedded":
            return given, "ok", f"llama-cpp-python {version('llama-cpp-python')}"
        if given == "ollama":
            found = ollama(environment)
            return given, "ok", f"version {found.version()} at {found.url}"
        return "url", "ok", f"{given} serves {', '.join(ServerRuntime(given).models()) or 'no model'}"
    except RuntimeUnavailable as error:
        return environment.get("HOMESTILL_LOCAL") or "ollama", "missing", str(error)
    except PackageNotFoundError:
        return "embedded", "missing", "llama-cpp-python is not installed; run scripts/install"


@contextmanager
def launch(registration: Registration) -> Iterator[Endpoint]:
    """Start the embedded server for a registered model, for as long as the context lasts.

    Raises:
        RuntimeUnavailable: the file is missing, or the server does not start.
    """
    if registration.gguf is None:
        raise RuntimeUnavailable(
            f"{registration.name} names no GGUF; delete the run's register folder and run again"
        )
    try:
        server = Embedded(
            Path(registration.gguf),
            context=registration.context,
            alias=registration.name,
            adapter=Path(registration.adapter) if registration.adapter else None,
        )
        endpoint = server.start()
    except EmbeddedError as error:
        raise RuntimeUnavailable(str(error)) from error
    try:
        yield endpoint
    finally:
        server.stop()


class EmbeddedRuntime:
    """llama.cpp's server as a child process of ours, started for as long as it is used.

    There is nothing to upload: a registration is the file and its name.

    Args:
        launch: starts the server of a registration; tests give their own.
        transport: carries the HTTP requests.
        chat: asks the server.
    """

    kind: Kind = "embedded"

    def __init__(
        self, launch: Launch = launch, transport: httpx.BaseTransport | None = None, chat: Chat | None = None
    ) -> None:
        self._launch = launch
        self._http = httpx.Client(transport=transport, timeout=60.0, **PLAIN)
        self._chat = chat or Chat(transport)

    def register(self, model: LocalModel) -> Registration:
        """Check the file and try it once.

        Raises:
            RegisterError: the file is not what export wrote, or does not answer.
            RuntimeUnavailable: the server does not start.
        """
        model.check()
        registration = Registration.of(self.kind, model)
        with self.serving(registration) as endpoint:
            self._chat.smoke(endpoint)
        return registration

    def serving(self, registration: Registration) -> AbstractContextManager[Endpoint]:
        """The model's server, stopped when the context ends."""
        return self._launch(registration)

    def render(self, endpoint: Endpoint, messages: Messages) -> Rendered:
        """The prompt's text and tokens, from the server's own `/extras/render`.

        Raises:
            RegisterError: the server refuses the messages.
            RuntimeUnavailable: it cannot be reached.
        """
        url = f"{endpoint.base_url.removesuffix('/v1')}/extras/render"
        try:
            response = self._http.post(url, json={"messages": [dict(message) for message in messages]})
        except httpx.TransportError as error:
            raise RuntimeUnavailable(
                f"{url} cannot be reached ({type(error).__name__}); run again"
            ) from error
        if response.status_code != httpx.codes.OK:
            raise RegisterError(
                f"{endpoint.model} cannot render a prompt: {fault(response)}; export it again"
            )
        shown = response.json()
        return Rendered(text=shown["prompt"], tokens=shown["tokens"])

    def has(self, name: str) -> bool:
        """Nothing outlives the server."""
        return False

    def remove(self, name: str) -> None:
        """Nothing outlives the server."""


class ServerRuntime:
    """An OpenAI-compatible server that somebody else runs: vLLM, Ray Serve, llama-server.

    Args:
        url: its address, with or without `/v1`.
        transport: carries the HTTP requests; tests give their own.
        chat: asks it.
    """

    kind: Kind = "url"

    def __init__(
        self, url: str, transport: httpx.BaseTransport | None = None, chat: Chat | None = None
    ) -> None:
        self.base_url = f"{url.rstrip('/').removesuffix('/v1')}/v1"
        self._http = httpx.Client(transport=transport, timeout=30.0, **PLAIN)
        self._chat = chat or Chat(transport)

    def register(self, model: LocalModel) -> Registration:
        """Find the model on the server, where its operator put it, and try it once.

        Raises:
            RegisterError: the server does not have it, or it does not answer.
            RuntimeUnavailable: the server cannot be reached.
        """
        model.check()
        served = self.models()
        if model.name not in served:
            raise RegisterError(
                f"{self.base_url} serves {', '.join(served) or 'no model'}; it must serve {model.name}: "
                f"start it there from {_named(model)} under that name"
            )
        registration = Registration.of(self.kind, model, base_url=self.base_url)
        self._chat.smoke(Endpoint(base_url=self.base_url, model=model.name))
        return registration

    @contextmanager
    def serving(self, registration: Registration) -> Iterator[Endpoint]:
        """The server as it is; it is neither started nor stopped."""
        yield Endpoint(base_url=self.base_url, model=registration.name)

    def render(self, endpoint: Endpoint, messages: Messages) -> Rendered:
        """How many tokens the server makes of `messages`."""
        return Rendered(count=self._chat.ask(endpoint, messages, max_tokens=1).prompt_tokens)

    def has(self, name: str) -> bool:
        """The operator's models are the operator's."""
        return True

    def remove(self, name: str) -> None:
        """The operator's models are the operator's."""

    def models(self) -> list[str]:
        """Names that the server lists.

        Raises:
            RuntimeUnavailable: it cannot be reached, or lists none.
        """
        try:
            response = self._http.get(f"{self.base_url}/models")
            response.raise_for_status()
            return [str(model["id"]) for model in response.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise RuntimeUnavailable(
                f"{self.base_url}/models does not list models ({type(error).__name__}: {error}); "
                "set HOMESTILL_LOCAL to an OpenAI-compatible server that runs"
            ) from error


def _named(model: LocalModel) -> str:
    """The model's files for the operator of a server."""
    return " with the LoRA adapter ".join(
        f"{file} (SHA-256 {sha256})" for file, sha256 in model.files.values()
    )

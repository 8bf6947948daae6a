"""Where a provider's models answer: Ollama, or the embedded runtime behind one address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

import httpx
import ollama

from trainer.errors import RuntimeUnavailable
from trainer.provider.gateway import Find, Gateway
from trainer.runtimes.choice import EmbeddedRuntime
from trainer.runtimes.local import UNPOOLED, Runtime
from trainer.runtimes.ollama import Ollama

KeepAlive = str | float
LOAD_TIMEOUT_S = 1800.0


class Models(Protocol):
    """The models that a provider trains and asks."""

    prefix: str
    """What stands before a model's name in DSPy."""
    runtime: Runtime

    @property
    def api_base(self) -> str:
        """The one address of all models, ending in `/v1`."""

    def check(self) -> None:
        """Raise RuntimeUnavailable unless models can be registered."""

    def has(self, name: str) -> bool:
        """Whether the name can be asked."""

    def load(self, name: str, keep_alive: KeepAlive) -> None:
        """Bring a model into memory; RuntimeUnavailable where that fails."""

    def unload(self, name: str) -> None:
        """Free a model's memory; one that is not loaded, or not there, is fine."""

    def close(self) -> None:
        """Give back what this process holds."""


class OllamaModels:
    """The models of an Ollama server.

    Args:
        host: as in OLLAMA_HOST.
        transport: carries the HTTP requests; tests give their own.
    """

    prefix = "ollama_chat"

    def __init__(self, host: str, transport: httpx.BaseTransport | None = None) -> None:
        self._ollama = Ollama(host, transport=transport)
        self.runtime: Runtime = self._ollama
        timeout = httpx.Timeout(LOAD_TIMEOUT_S, connect=10.0)
        self._client = ollama.Client(self._ollama.url, transport=transport, timeout=timeout, limits=UNPOOLED)

    @property
    def api_base(self) -> str:
        return f"{self._ollama.url}/v1"

    def check(self) -> None:
        self._ollama.version()

    def has(self, name: str) -> bool:
        with self._translated(f"look up {name}"):
            try:
                self._client.show(name)
            except ollama.ResponseError as error:
                if error.status_code != httpx.codes.NOT_FOUND:
                    raise
                return False
        return True

    def load(self, name: str, keep_alive: KeepAlive) -> None:
        with self._translated(f"load {name}"):
            self._client.chat(
                name, messages=[], keep_alive=keep_alive
            )  # no message: it loads and says nothing

    def unload(self, name: str) -> None:
        if self.has(name):
            with self._translated(f"unload {name}"):
                self._client.chat(name, messages=[], keep_alive=0)

    def close(self) -> None:
        """Ollama is somebody else's."""

    @contextmanager
    def _translated(self, purpose: str) -> Iterator[None]:
        try:
            yield
        except (httpx.TransportError, ConnectionError) as error:
            raise RuntimeUnavailable(
                f"Ollama at {self._ollama.url} cannot {purpose} ({type(error).__name__}); check that it runs "
                "(`ollama serve`) and OLLAMA_HOST"
            ) from error
        except ollama.ResponseError as error:
            raise RuntimeUnavailable(
                f"Ollama at {self._ollama.url} cannot {purpose}: {error.error} (HTTP {error.status_code}); "
                "check the name with `ollama list`"
            ) from error


class EmbeddedModels:
    """The registered GGUF files, each in a llama.cpp process of its own while it is loaded.

    Args:
        find: the registration of a model's name.
    """

    prefix = "openai"

    def __init__(self, find: Find) -> None:
        self._find = find
        self.runtime: Runtime = EmbeddedRuntime()

    @cached_property
    def gateway(self) -> Gateway:
        """Started when a model is first addressed."""
        return Gateway(self._find)

    @property
    def api_base(self) -> str:
        return self.gateway.api_base

    def check(self) -> None:
        """The runtime came with the installation; register tries it."""

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def load(self, name: str, keep_alive: KeepAlive) -> None:
        """The model stays until it is unloaded, whatever `keep_alive` says."""
        self.gateway.load(name)

    def unload(self, name: str) -> None:
        if "gateway" in self.__dict__:
            self.gateway.unload(name)

    def close(self) -> None:
        if "gateway" in self.__dict__:
            self.gateway.close()
            del self.gateway

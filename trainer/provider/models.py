"""Where a provider's models answer: Ollama, or the embedded runtime behind one address."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import httpx

from trainer.provider.gateway import Find, Gateway
from trainer.runtimes.choice import EmbeddedRuntime
from trainer.runtimes.local import Runtime
from trainer.runtimes.ollama import Ollama

KeepAlive = str | float


class Models(Protocol):
    """The models that a provider trains and asks."""

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

    def __init__(self, host: str, transport: httpx.BaseTransport | None = None) -> None:
        self._ollama = Ollama(host, transport=transport)
        self.runtime: Runtime = self._ollama

    @property
    def api_base(self) -> str:
        return f"{self._ollama.url}/v1"

    def check(self) -> None:
        self._ollama.version()

    def has(self, name: str) -> bool:
        return self._ollama.has(name)

    def load(self, name: str, keep_alive: KeepAlive) -> None:
        self._ollama.load(name, keep_alive)

    def unload(self, name: str) -> None:
        self._ollama.unload(name)

    def close(self) -> None:
        """Ollama is somebody else's."""


class EmbeddedModels:
    """The registered GGUF files, each in a llama.cpp process of its own while it is loaded.

    Args:
        find: the registration of a model's name.
    """

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

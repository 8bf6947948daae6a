"""Where a release's own model runs: in a child process, in Ollama, or on a server that somebody else runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from serve.release import Release
from serve.runtime.embedded import Embedded
from serve.settings import Settings
from serve.upstreams.upstream import Connect, Upstream


class LocalModel:
    """A running local model. Retired, it answers what it has begun and then stops."""

    def __init__(self, upstream: Upstream, name: str, stop: Callable[[], Awaitable[None]]) -> None:
        self.name = name
        self._upstream = upstream
        self._stop = stop
        self._asked = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A whole answer; `model` is filled in.

        Raises:
            UpstreamDown, UpstreamRefused.
        """
        self._asked += 1
        self._idle.clear()
        try:
            return await self._upstream.chat({**body, "model": self.name})
        finally:
            self._asked -= 1
            if not self._asked:
                self._idle.set()

    async def retire(self) -> None:
        """Wait for the answers under way, then stop."""
        await self._idle.wait()
        await self._upstream.close()
        await self._stop()


class Local(Protocol):
    """The local runtime."""

    async def start(self, release: Release) -> LocalModel:
        """Run the release's model.

        Raises:
            EmbeddedError: it does not start.
        """


class EmbeddedLocal:
    """A child process for every release.

    Args:
        connect: makes sessions.
        embedded: starts the child; tests give their own.
    """

    def __init__(self, connect: Connect, embedded: Callable[..., Embedded] = Embedded) -> None:
        self._connect = connect
        self._embedded = embedded

    async def start(self, release: Release) -> LocalModel:
        gguf: Path = release.model
        runtime = self._embedded(gguf, context=release.router.sampling.context, alias=served_name(release))
        endpoint = await asyncio.to_thread(runtime.start)

        async def stop() -> None:
            await asyncio.to_thread(runtime.stop)

        return LocalModel(Upstream(self._connect, endpoint.base_url, who="local"), endpoint.model, stop)


class ServerLocal:
    """Ollama, or any OpenAI-compatible server, where the release's model is registered already."""

    def __init__(self, connect: Connect, base_url: str) -> None:
        self._connect = connect
        self._base_url = base_url

    async def start(self, release: Release) -> LocalModel:
        async def stop() -> None:
            """It is not ours to stop."""

        return LocalModel(Upstream(self._connect, self._base_url, who="local"), served_name(release), stop)


def served_name(release: Release) -> str:
    """The name under which the model was registered, else task and version."""
    return release.manifest.model.ollama or f"{release.manifest.task}:{release.version}"


def choose(settings: Settings, connect: Connect) -> Local:
    """The runtime that HOMESTILL_LOCAL names."""
    if settings.local == "embedded":
        return EmbeddedLocal(connect)
    base_url = f"{settings.ollama_url}/v1" if settings.local == "ollama" else settings.local
    return ServerLocal(connect, base_url)

"""Where a release's own model runs: in a child process, in Ollama, or on a server that somebody else runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import orjson

from serve.config import LocalRules
from serve.errors import SettingsError, UpstreamRefused
from serve.release import Release
from serve.runtime.embedded import Embedded
from serve.settings import OLLAMA_PORT, Settings
from serve.upstreams.dialects import (
    ANY_SERVER,
    EMBEDDED,
    OLLAMA,
    Dialect,
    merged,
    reseeded,
    summed,
    with_own_ids,
)
from serve.upstreams.gate import Gate
from serve.upstreams.pool import Pool
from serve.upstreams.upstream import DOWN, NO_SUCH_MODEL, Connect, Patience, Server, Upstream
from serve.wire.sse import dumps

Stop = Callable[[], Awaitable[None]]


class LocalModel:
    """A running local model, asked no more at once than it is good for. Retired, it answers what it has
    begun and then stops.

    Args:
        upstream: where it runs.
        name: what it is called there.
        stop: ends what was started for it.
        dialect: what it understands.
        gate: counts who is at work and who waits.
        temperature: for requests that say none.
    """

    def __init__(
        self,
        upstream: Server,
        name: str,
        stop: Stop,
        *,
        dialect: Dialect = ANY_SERVER,
        gate: Gate | None = None,
        temperature: float = 0.0,
    ) -> None:
        rules = LocalRules()
        self.name = name
        self.upstream = upstream
        self._stop = stop
        self._dialect = dialect
        self._gate = gate or Gate(rules.concurrency, rules.queue)
        self._temperature = temperature
        self._asked = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        """Requests at work."""
        return self._gate.active

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return self._gate.waiting

    def unsupported(self, body: Mapping[str, Any]) -> list[str]:
        """The fields of a chat request that this runtime cannot do, sorted."""
        return self._dialect.unsupported(body)

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A whole answer; `model` is filled in, and with `n` there are as many choices.

        Raises:
            UpstreamBusy: too many wait.
            UpstreamDown, UpstreamRefused.
        """
        told = self._told(body)
        told.pop("stream", None)
        told.pop("stream_options", None)
        async with self._turn():
            return with_own_ids(await self._answers(told, body.get("n") or 1))

    async def chat_stream(self, body: Mapping[str, Any]) -> AsyncGenerator[bytes]:
        """The data of each event but the closing `[DONE]`; with `n` one choice after the other.

        Raises:
            UpstreamBusy, UpstreamDown, UpstreamRefused.
        """
        told = self._told(body) | {"stream": True}
        count = body.get("n") or 1
        async with self._turn():
            events = self.upstream.chat_stream(told) if count == 1 else self._streams(told, count)
            async with aclosing(events):
                async for data in events:
                    yield data

    async def embeddings(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """OpenAI's list of embeddings; `model` is filled in.

        Raises:
            UpstreamBusy, UpstreamDown, UpstreamRefused.
        """
        if not self._dialect.embeddings:
            raise UpstreamRefused(
                "local",
                f"the {self._dialect.name} runtime makes no embeddings; serve the model with Ollama or vLLM",
            )
        async with self._turn():
            return await self.upstream.post("/embeddings", {**body, "model": self.name})

    async def retire(self) -> None:
        """Wait for the answers under way, then stop."""
        await self._idle.wait()
        await self.upstream.close()
        await self._stop()

    def _told(self, body: Mapping[str, Any]) -> dict[str, Any]:
        cannot = self.unsupported(body)
        if cannot:
            raise UpstreamRefused(
                "local", f"the {self._dialect.name} runtime cannot do {', '.join(cannot)}; leave it out"
            )
        return self._dialect.translated(body, self._temperature) | {"model": self.name}

    async def _answers(self, told: dict[str, Any], count: int) -> dict[str, Any]:
        """One answer of `count` choices; a runtime that gives fewer at a time is asked until there are enough."""
        answers: list[dict[str, Any]] = []
        have = 0
        while have < count:
            several = {"n": count - have} if self._dialect.several and count > 1 else {}
            answer = await self.upstream.chat(reseeded(told, have) | several)
            have += len(answer["choices"])
            answers.append(answer)
        return merged(answers)

    async def _streams(self, told: dict[str, Any], count: int) -> AsyncGenerator[bytes]:
        """As many streams as one: the second choice follows the first, and the token counts of all come last."""
        usages: list[Any] = []
        common: dict[str, Any] = {}
        for index in range(count):
            usage = None
            async with aclosing(self.upstream.chat_stream(reseeded(told, index))) as events:
                async for data in events:
                    chunk = orjson.loads(data)
                    usage = chunk.pop("usage", None) or usage
                    common = common or {key: chunk.get(key) for key in ("id", "object", "created", "model")}
                    for choice in chunk["choices"]:
                        choice["index"] = index
                    if chunk["choices"]:
                        yield dumps(chunk | common)
            usages.append(usage)
        if any(usages):
            yield dumps({**common, "choices": [], "usage": summed(usages)})

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        self._asked += 1
        self._idle.clear()
        try:
            async with self._gate.place():
                yield
        finally:
            self._asked -= 1
            if not self._asked:
                self._idle.set()


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
        rules: how much it is given to do at once.
    """

    def __init__(
        self, connect: Connect, embedded: Callable[..., Embedded] = Embedded, rules: LocalRules | None = None
    ) -> None:
        self._connect = connect
        self._embedded = embedded
        self._rules = rules or LocalRules()

    async def start(self, release: Release) -> LocalModel:
        gguf: Path = release.model
        sampling = release.router.sampling
        runtime = self._embedded(
            gguf, context=sampling.context, alias=served_name(release), adapter=release.lora
        )
        endpoint = await asyncio.to_thread(runtime.start)

        async def stop() -> None:
            await asyncio.to_thread(runtime.stop)

        return LocalModel(
            _host(self._connect, endpoint.base_url, self._rules),
            endpoint.model,
            stop,
            dialect=EMBEDDED,
            gate=Gate(self._rules.concurrency, self._rules.queue),
            temperature=sampling.temperature,
        )


class ServerLocal:
    """Ollama, or any OpenAI-compatible server, where the release's model is registered already.

    Args:
        connect: makes sessions.
        base_urls: up to and including `/v1`; of every host, where there are several.
        dialect: what it understands.
        rules: how much each host is given to do at once.
    """

    def __init__(
        self,
        connect: Connect,
        base_urls: str | Sequence[str],
        dialect: Dialect = ANY_SERVER,
        rules: LocalRules | None = None,
    ) -> None:
        self._connect = connect
        self._base_urls = [base_urls] if isinstance(base_urls, str) else list(base_urls)
        self._dialect = dialect
        self._rules = rules or LocalRules()

    async def start(self, release: Release) -> LocalModel:
        async def stop() -> None:
            """It is not ours to stop."""

        rules = self._rules
        hosts = [_host(self._connect, url, rules) for url in self._base_urls]
        return LocalModel(
            hosts[0] if len(hosts) == 1 else Pool(hosts, rules.rest_s),
            served_name(release),
            stop,
            dialect=self._dialect,
            gate=Gate(rules.concurrency * len(hosts), rules.queue),
            temperature=release.router.sampling.temperature,
        )


def _host(connect: Connect, base_url: str, rules: LocalRules) -> Upstream:
    """The model's name is ours, so a host that does not know it is at fault, not the request."""
    return Upstream(
        connect,
        base_url,
        who="local",
        patience=Patience(read=rules.read_s),
        down=DOWN | {NO_SUCH_MODEL},
        reconnect=True,
    )


def served_name(release: Release) -> str:
    """The name under which the model was registered, else task and version."""
    return release.manifest.model.ollama or f"{release.manifest.task}:{release.version}"


def choose(settings: Settings, connect: Connect) -> Local:
    """The runtime that HOMESTILL_LOCAL names, on the hosts that serve.yaml names where it names any.

    Raises:
        SettingsError: hosts are named, and the runtime is embedded.
    """
    rules = settings.config.local
    if settings.local == "embedded":
        if rules.hosts:
            raise SettingsError(
                [
                    f"serve.yaml names local.hosts ({', '.join(rules.hosts)}), and the local runtime is embedded; "
                    "set HOMESTILL_LOCAL=ollama or a server's URL, or remove local.hosts"
                ]
            )
        return EmbeddedLocal(connect, rules=rules)
    ollama = settings.local == "ollama"
    own = settings.ollama_url if ollama else settings.local
    urls = [_base_url(host, ollama=ollama) for host in rules.hosts or (own,)]
    return ServerLocal(connect, urls, OLLAMA if ollama else ANY_SERVER, rules)


def _base_url(host: str, *, ollama: bool) -> str:
    """A host as serve.yaml may write it, as the address up to and including `/v1`."""
    if "://" not in host:
        port = f":{OLLAMA_PORT}" if ollama and ":" not in host else ""
        host = f"http://{host}{port}"
    return f"{host.rstrip('/').removesuffix('/v1')}/v1"

"""Local models: what a runtime is given, what it hands back, and how it is asked.

A runtime (Ollama, embedded, or a server that somebody else runs) takes a `LocalModel`, returns a
`Registration` that survives in JSON, and serves it at an `Endpoint` with OpenAI's shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import httpx

from serve.runtime.embedded import Endpoint
from trainer.errors import RegisterError, RuntimeUnavailable
from trainer.runs import read_json, sha256_file, sha256_json, write_json

if TYPE_CHECKING:
    from trainer.template import Template  # loads transformers

Messages = Sequence[Mapping[str, str]]
Kind = Literal["ollama", "embedded", "url"]

HELLO: Messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Hello"}]
"""The smoke test's question; parity asks the task's own afterwards."""
RECORD = "register/registration.json"
"""Below a run's folder: its registrations."""
BUSY = frozenset({429, 503})
PLAIN: Mapping[str, Any] = {
    "limits": httpx.Limits(max_keepalive_connections=0),
    "mounts": {f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0")},
}
"""Options of every client of a runtime: a connection a request, since one that is left open may be to a server that
was restarted; and none to this machine through the proxy of HTTP_PROXY, which would read the prompts."""


@dataclass(frozen=True)
class Adapter:
    """A GGUF LoRA adapter; `sha256` are the 64 hex digits that export recorded."""

    gguf: Path
    sha256: str


@dataclass(frozen=True)
class LocalModel:
    """A GGUF file with all that a runtime has to know to serve it as it was trained."""

    name: str
    """Unique for the content, `<task>:<hash>`: a name never changes what it stands for."""
    gguf: Path
    sha256: str
    """64 hex digits of the file, as export recorded them."""
    template: Template
    context: int
    """Tokens of prompt and answer together."""
    max_tokens: int
    adapter: Adapter | None = None
    """What makes the student of `gguf`, where that is the base."""

    @classmethod
    def of(
        cls,
        task: str,
        role: str,
        *,
        gguf: Path,
        sha256: str,
        template: Template,
        context: int,
        max_tokens: int,
        adapter: Adapter | None = None,
    ) -> LocalModel:
        """Name the model by its content. `role` (`base`) stands before the hash where it is not empty."""
        parts = [sha256, template.go, list(template.stop), context, max_tokens]
        content = sha256_json([*parts, adapter.sha256] if adapter else parts)[:12]
        name = f"{task}:{role}-{content}" if role else f"{task}:{content}"
        return cls(name, gguf, sha256, template, context, max_tokens, adapter)

    @property
    def files(self) -> dict[str, tuple[Path, str]]:
        """Every file that the model is made of, by what it is, with its SHA-256."""
        own = {"model": (self.gguf, self.sha256)}
        return own | ({"adapter": (self.adapter.gguf, self.adapter.sha256)} if self.adapter else {})

    @property
    def identity(self) -> str:
        """SHA-256 of the file that is the model's own: the adapter, or the whole model."""
        return self.adapter.sha256 if self.adapter else self.sha256

    def check(self) -> None:
        """Raise RegisterError unless the files are those that export wrote."""
        for file, recorded in self.files.values():
            if not file.is_file():
                raise RegisterError(f"{file} is missing; export the model again")
            found = sha256_file(file)
            if found != recorded:
                raise RegisterError(
                    f"{file} has SHA-256 {found[:12]}…, export recorded {recorded[:12]}…; export it again"
                )


@dataclass(frozen=True)
class Registration:
    """A model that a runtime can serve."""

    runtime: Kind
    name: str
    sha256: str
    """Of the GGUF file as exported, of the adapter where there is one; Ollama itself may store a rewritten copy."""
    context: int
    base_url: str | None = None
    """Ends in `/v1`; None where the runtime starts a server when it is needed."""
    gguf: str | None = None
    adapter: str | None = None

    @classmethod
    def of(cls, kind: Kind, model: LocalModel, *, base_url: str | None = None) -> Registration:
        """The registration of a model with a runtime."""
        gguf, adapter = str(model.gguf.resolve()), model.adapter
        return cls(
            kind,
            model.name,
            model.identity,
            model.context,
            base_url=base_url,
            gguf=gguf,
            adapter=str(adapter.gguf.resolve()) if adapter else None,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Registration:
        return cls(**value)


def record(run: Path, registered: Mapping[str, Registration]) -> None:
    """Write a run's registrations, with its files named from the run on: other runs link to the record.

    Args:
        run: its folder.
        registered: `model` and `base`, or one of them.
    """
    write_json(run / RECORD, {key: _of(Path(), one).to_json() for key, one in registered.items()})


def recorded(run: Path) -> dict[str, Registration]:
    """A run's registrations, with the run's own files: a record of before may name those of the run that made it."""
    found = {key: Registration.from_json(value) for key, value in read_json(run / RECORD).items()}
    return {key: _of(run.resolve(), one) for key, one in found.items()}


def _of(run: Path, registered: Registration) -> Registration:
    def own(file: str | None) -> str | None:
        return str(run / "export" / Path(file).name) if file else None

    return replace(registered, gguf=own(registered.gguf), adapter=own(registered.adapter))


@dataclass(frozen=True)
class Rendered:
    """The prompt that a server makes of messages, as far as the server shows it."""

    text: str | None = None
    """Without the beginning-of-text token where the tokenizer adds it."""
    tokens: list[int] | None = None
    count: int | None = None
    """How many tokens."""


class Runtime(Protocol):
    """Where local models run."""

    kind: Kind

    def register(self, model: LocalModel) -> Registration:
        """Make the model servable and try it once.

        Raises:
            RegisterError: refused, or does not answer as trained; nothing that this call made is left.
            RuntimeUnavailable: the runtime cannot be reached or started.
        """

    def serving(self, registration: Registration) -> AbstractContextManager[Endpoint]:
        """The endpoint that answers as the model while the context lasts."""

    def render(self, endpoint: Endpoint, messages: Messages) -> Rendered:
        """The prompt that the served model gets for `messages`."""

    def has(self, name: str) -> bool:
        """Whether the model is there, whoever made it."""

    def remove(self, name: str) -> None:
        """Forget a model; one that is not there is fine."""


@dataclass(frozen=True)
class Reply:
    """A chat answer. `finish_reason` is None where the server gave up in the middle."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    logprobs: list[dict[str, Any]] | None

    @property
    def complete(self) -> bool:
        return self.finish_reason is not None


class Chat:
    """Asks an OpenAI-compatible server one question at a time, greedily and with log-probabilities."""

    def __init__(
        self,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        timeout: float = 600.0,
        attempts: int = 5,
    ) -> None:
        limit = httpx.Timeout(timeout, connect=10.0)
        self._http = httpx.Client(transport=transport, timeout=limit, **PLAIN)
        self._sleep = sleep
        self._attempts = attempts

    def ask(self, endpoint: Endpoint, messages: Messages, max_tokens: int) -> Reply:
        """One answer, or an incomplete one.

        Raises:
            RegisterError: the server refuses the model or the question.
            RuntimeUnavailable: it cannot be reached, or stays busy.
        """
        body = {
            "model": endpoint.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": 0.0,  # Ollama's /v1 samples at 1.0 unless it is sent, whatever the model says
            "logprobs": True,
            "top_logprobs": 5,
        }
        response = self._post(endpoint, body)
        choice = response["choices"][0]
        return Reply(
            text=choice["message"].get("content") or "",
            finish_reason=choice.get("finish_reason"),
            prompt_tokens=int((response.get("usage") or {}).get("prompt_tokens", 0)),
            logprobs=(choice.get("logprobs") or {}).get("content"),
        )

    def _post(self, endpoint: Endpoint, body: dict[str, Any]) -> dict[str, Any]:
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                self._sleep(min(2.0**attempt, 30.0))
            try:
                response = self._http.post(f"{endpoint.base_url}/chat/completions", json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in BUSY:
                problem = f"HTTP {response.status_code}: {fault(response)}"
                continue
            return _answer(endpoint, response)
        raise RuntimeUnavailable(
            f"{endpoint.base_url} did not answer for {endpoint.model} in {self._attempts} attempts ({problem}); "
            "check that it runs and is not overloaded"
        )

    def smoke(self, endpoint: Endpoint) -> None:
        """One short chat: a model that cannot answer, or shows no log-probabilities, raises RegisterError."""
        reply = self.ask(endpoint, HELLO, max_tokens=8)
        if not reply.complete:
            raise RegisterError(
                f"{endpoint.model} broke off its first answer without a finish_reason; "
                "its weights or its template are not what was trained, export the model again"
            )
        if reply.text and not reply.logprobs:
            raise RegisterError(
                f"{endpoint.base_url} gives no logprobs for {endpoint.model}; routing needs them, "
                "use a server that does (Ollama from 0.12.11, vLLM, or HOMESTILL_LOCAL=embedded)"
            )


def _answer(endpoint: Endpoint, response: httpx.Response) -> dict[str, Any]:
    if response.status_code != httpx.codes.OK:
        raise RegisterError(
            f"{endpoint.model} answers HTTP {response.status_code} at {endpoint.base_url}: {fault(response)}; "
            "look at the server's log, or export the model again"
        )
    value: dict[str, Any] = response.json()
    if not value.get("choices"):
        raise RegisterError(
            f"{endpoint.base_url} answered for {endpoint.model} without choices; use an OpenAI-compatible server"
        )
    return value


def fault(response: httpx.Response) -> str:
    """What an error answer says, in OpenAI's shape or Ollama's, or as it stands."""
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, KeyError, TypeError):
        return response.text[:300] or response.reason_phrase

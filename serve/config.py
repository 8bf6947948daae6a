"""serve.yaml: how the endpoint behaves. Every value has a default, so the file is needed by nobody on day 0.

defaults: {egress: redact, daily_usd: 5}     # for every task
tasks: {tickets: {strategy: shadow}}         # a task's own values go before
daily_usd: 20                                # over all tasks and keys
prices: {gpt-4o: {input: 2.5, output: 10}}   # US dollars per million tokens
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.errors import SettingsError

Egress = Literal["allow", "redact", "never"]
"""What may leave this machine: all, all but personal data and secrets, or nothing."""
StrategyName = Literal[
    "certified",
    "self-ask",
    "mean-logprob",
    "knn",
    "random",
    "always-local",
    "always-teacher",
    "shadow",
]
Streaming = Literal["held", "optimistic"]
Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Price(_Section):
    """US dollars per million tokens."""

    input: Usd
    """Of what is sent."""
    output: Usd
    """Of what is answered."""


Region = Annotated[str, Field(pattern=r"^[A-Z]{2}$")]


class TaskRules(_Section):
    """How one task is served."""

    strategy: StrategyName = "certified"
    """Who answers. Only `certified` and `shadow` keep the promise; all others have the guarantee `none`."""
    threshold: Share | None = None
    """From which score a strategy other than `certified` keeps the local answer; None: its own default."""
    stream: Streaming = "held"
    """`held`: no local token goes out before the decision. `optimistic`: at once, with the guarantee `none`."""
    egress: Egress = "allow"
    """What may leave this machine for the teacher: all, all but what `redact` finds, or nothing."""
    phone_region: Region = "US"
    """Country (ISO 3166, two letters) by which `redact` reads telephone numbers without a +country."""
    bodies: bool = True
    """Keep messages and answers in the journal; False keeps figures only."""
    audit: Share = 0.01
    """Share of the kept local answers that the teacher is asked about as well, in the background."""
    daily_usd: Usd | None = None
    """Most that the teacher may cost this task on one UTC day."""


class TaskOverrides(_Section):
    """A task's own values; what is not said here comes from `defaults`."""

    strategy: StrategyName | None = None
    threshold: Share | None = None
    stream: Streaming | None = None
    egress: Egress | None = None
    phone_region: Region | None = None
    bodies: bool | None = None
    audit: Share | None = None
    daily_usd: Usd | None = None


class TeacherRules(_Section):
    """How patiently the teacher is asked."""

    connect_s: Seconds = 5.0
    """For making the connection."""
    read_s: Seconds = 120.0
    """Between two pieces of an answer."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Of a request that failed before anything was answered."""
    backoff_s: Seconds = 0.5
    """Before the first retry, doubled (with jitter) for each further one; a Retry-After goes before."""
    longest_wait_s: Seconds = 10.0
    """A Retry-After beyond this is not waited for."""
    failures: Annotated[int, Field(ge=1)] = 5
    """Failed requests in a row after which it is left alone ..."""
    rest_s: Seconds = 15.0
    """... for this long; then one request tries whether it is back."""


class LocalRules(_Section):
    """How much the local model is given to do at once."""

    concurrency: Annotated[int, Field(ge=1)] = 4
    """Requests that a host answers at a time."""
    queue: Annotated[int, Field(ge=0)] = 64
    """Requests that wait beyond these; further ones go to the teacher, or get 503 with Retry-After."""
    read_s: Seconds = 120.0
    """Between two pieces of an answer."""
    hosts: tuple[str, ...] = ()
    """Several servers with the same models (Ollama or OpenAI-compatible), asked in turn; one that fails rests."""
    rest_s: Seconds = 15.0
    """How long a host that failed is left alone."""


class JournalRules(_Section):
    """How long requests are kept."""

    keep_days: Annotated[float, Field(gt=0)] | None = None
    """None: until they are deleted by hand."""


class Limits(_Section):
    """What a client may do."""

    body_bytes: Annotated[int, Field(ge=1024)] = 16 * 1024 * 1024
    """Largest request; a larger one gets 413."""
    header_s: Seconds = 10.0
    """In which a request's head must have come; a body may take 12 times that while at least 1 kB/s comes."""
    idle_s: Seconds = 75.0
    """How long a connection without a request is kept."""
    keep_alive_s: Seconds = 5.0
    """Between two signs of life on a stream whose answer is not decided yet."""
    hosts: tuple[str, ...] = ()
    """Names in the Host header beside loopback's and the address listened on; `*` lets all through."""


class Config(_Section):
    """serve.yaml."""

    defaults: TaskRules = TaskRules()
    """How every task is served ..."""
    tasks: dict[str, TaskOverrides] = {}
    """... but where a task, by its name, says otherwise; the same values."""
    daily_usd: Usd | None = None
    """Most that the teacher may cost on one UTC day, over all tasks and keys."""
    prices: dict[str, Price] = {}
    """By the teacher's name, with or without its provider: {input, output} in US dollars per million tokens."""
    teacher: TeacherRules = TeacherRules()
    local: LocalRules = LocalRules()
    journal: JournalRules = JournalRules()
    limits: Limits = Limits()
    log_format: Literal["text", "json"] = "text"
    """Of the lines on standard error, one a request."""
    otlp_endpoint: str | None = None
    """Where OpenTelemetry spans are sent (OTLP over HTTP); None: nowhere."""

    def rules(self, task: str | None) -> TaskRules:
        """What holds for a task; the defaults where it is not named."""
        own = self.tasks.get(task or "")
        return self.defaults.model_copy(update=own.model_dump(exclude_none=True)) if own else self.defaults


def load(path: Path) -> Config:
    """Read serve.yaml; the defaults where there is no such file.

    Raises:
        SettingsError: with every fault found.
    """
    try:
        value: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Config()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError([f"{path} cannot be read ({error}); mend it, or remove it"]) from error
    try:
        return Config.model_validate({} if value is None else value)
    except ValidationError as error:
        raise SettingsError([_fault(path, dict(fault)) for fault in error.errors()]) from error


def _fault(path: Path, fault: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"]) or "the file"
    if fault["type"] == "extra_forbidden":
        return f"{path}: {where} is no setting; remove it, or see docs/serving.md for those there are"
    return f"{path}: {where} is {str(fault['input'])[:60]!r}: {fault['msg']}"

"""DSPy language models that write down what they are asked, what they answer and what it costs.

DSPy calls an *engine* once per attempt with a canonical request. Ours stand between a program and
the real client: `Recorder` keeps every call of the running example; `trainer.teacher.engine` also pays,
stores and replays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import dspy
from dspy.lm15 import Request, Response

from trainer.errors import TeacherError

LOCAL_TIMEOUT_S = 600.0
TOP_LOGPROBS = 5


class Endpoint(Protocol):
    """Where an OpenAI-compatible server answers, and under which model name."""

    @property
    def base_url(self) -> str: ...

    @property
    def model(self) -> str: ...


@dataclass
class Session:
    """The calls of one example, in the order in which they were made."""

    example: str
    predictors: Mapping[int, str]
    """Name of each predictor of the program, by `id`."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)
    refused: dict[str, Exception] = field(default_factory=dict)
    """The calls that the teacher could not be asked, even where the program went on without them."""

    def caller(self) -> str:
        """Name of the predictor that is calling, or `judge` where a metric or an optimizer asks."""
        calling = reversed(dspy.settings.caller_modules or [])
        return next((self.predictors[id(one)] for one in calling if id(one) in self.predictors), "judge")


@contextmanager
def session(example: str, predictors: Mapping[int, str]) -> Iterator[Session]:
    """Collect the calls made inside; DSPy's settings carry it into the threads that DSPy starts."""
    opened = Session(example, predictors)
    with dspy.context(homestill_session=opened, disable_history=True):
        yield opened


def current_session() -> Session:
    """The session of the running example; outside of one, a fresh one that nobody reads."""
    found = dspy.settings.get("homestill_session")
    return found if isinstance(found, Session) else Session("", {})


class Recorder:
    """An engine that passes requests on and writes each call into the session."""

    def __init__(self, inner: dspy.LM, clock: Callable[[], float] = time.perf_counter) -> None:
        self._inner = inner
        self._clock = clock

    def complete(self, request: Request) -> Response:
        started = self._clock()
        response: Response = self._inner(request)
        opened = current_session()
        opened.calls.append(
            call_record(opened.caller(), request, response, (self._clock() - started) * 1000, 0.0)
        )
        return response


def local_lm(endpoint: Endpoint, max_tokens: int) -> dspy.LM:
    """A DSPy model on a local runtime: greedy, with log-probabilities, nothing cached."""
    name = f"openai/{endpoint.model}"
    client = dspy.LM(
        name, api_base=endpoint.base_url, api_key="local", cache=False, num_retries=2, timeout=LOCAL_TIMEOUT_S
    )
    return dspy.LM(
        name,
        engine=Recorder(client),
        cache=False,
        num_retries=0,
        temperature=0.0,
        max_tokens=max_tokens,
        logprobs=True,
        top_logprobs=TOP_LOGPROBS,
    )


def openai_messages(request: Request) -> list[dict[str, str]]:
    """The request's messages in OpenAI's shape, text only.

    Raises:
        TeacherError: a message holds something that is not text.
    """
    messages = [{"role": message.role, "content": _text(message.parts)} for message in request.messages]
    if request.system:
        system = request.system if isinstance(request.system, str) else _text(request.system)
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _text(parts: Any) -> str:
    other = sorted({part.type for part in parts} - {"text"})
    if other:
        raise TeacherError(f"a message holds {', '.join(other)}; this version distils text programs only")
    return "".join(part.text for part in parts)


def call_record(
    predictor: str, request: Request, response: Response, latency_ms: float, cost_usd: float
) -> dict[str, Any]:
    return {
        "predictor": predictor,
        "messages": openai_messages(request),
        "completion": response.text or "",
        "finish_reason": response.finish_reason,
        "prompt_tokens": response.usage.input_tokens or 0,
        "completion_tokens": response.usage.output_tokens or 0,
        "latency_ms": round(latency_ms, 3),
        "cost_usd": cost_usd,
        "logprobs": [_token(token) for token in response.logprobs or ()],
    }


def _token(token: Any) -> dict[str, Any]:
    top = [{"token": other.token, "logprob": other.logprob} for other in token.top]
    return {"token": token.token, "logprob": token.logprob, "top_logprobs": top}

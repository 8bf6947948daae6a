"""The local side: the student is asked, and its answer is taken apart for the decision.

With `Evidence` the answer is followed token by token and given up as soon as it is certain that it
will not be kept; the decision is the same as at its end, only earlier.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from serve.confidence import LocalAnswer, confidence
from serve.errors import UpstreamBusy, UpstreamError, UpstreamRefused
from serve.evidence import Evidence
from serve.routing.call import Call
from serve.routing.decision import Reason
from serve.routing.policy import LOCAL_CALL, Question
from serve.upstreams.local import LocalModel
from serve.wire.chunks import Collector

TOP_LOGPROBS = 5
"""Alternatives that a token's features are computed from, in certification and here."""
SHORT_TOKEN, LONG_TOKEN = 3, 7
"""Bytes. A prompt that would not fit if its tokens were short, and whose count says that they are long, was cut."""


def certified_body(call: Call, question: Question) -> dict[str, Any]:
    """The request as it was certified: the client's wishes for sampling are left out."""
    assert call.served is not None
    sampling = call.served.release.router.sampling
    wanted = call.body.get("max_completion_tokens") or call.body.get("max_tokens")
    return {
        "messages": question.messages,
        "temperature": sampling.temperature,
        "max_tokens": min(wanted or sampling.max_tokens, sampling.max_tokens),
        "logprobs": True,
        "top_logprobs": max(TOP_LOGPROBS, call.body.get("top_logprobs") or 0),
    }


def free_body(call: Call) -> dict[str, Any]:
    """The client's own request, for answers without a certificate; greedy and bounded where it does not say."""
    assert call.served is not None
    sampling = call.served.release.router.sampling
    body = {key: value for key, value in call.body.items() if key not in ("stream", "stream_options")}
    if not (body.get("max_completion_tokens") or body.get("max_tokens")):
        body["max_tokens"] = sampling.max_tokens
    if body.get("temperature") is None:
        body["temperature"] = sampling.temperature
    return body | {"logprobs": True, "top_logprobs": max(TOP_LOGPROBS, body.get("top_logprobs") or 0)}


async def ask(call: Call, body: Mapping[str, Any], evidence: Evidence | None = None) -> Reason | None:
    """Ask the student; the answer, or what was wrong, goes into `call`. The reason when there is no answer.

    With `evidence` an answer that cannot be kept is given up half way, and `call.confidence` is the most that it
    could have had.
    """
    if call.served is None or call.served.local is None:
        call.local_problem = call.served.problem if call.served else "there is no release of this task"
        return "local_down"
    local = call.served.local
    try:
        if evidence is None:
            answer: dict[str, Any] | None = await call.wait_for(local.chat(body))
        else:
            answer = await call.wait_for(_followed(call, local, body, evidence))
    except UpstreamError as error:
        call.local_problem = str(error)
        return reason_of(error)
    except ValueError as error:
        call.local_problem = f"the local model sent no stream of chunks: {error}"
        return "local_down"
    if answer is None:
        call.confidence = evidence.ceiling() if evidence else None
        return "low_confidence" if call.confidence else "unparsable"
    if _was_cut(answer, body["messages"], call.served.release.router.sampling.context):
        call.local_problem = "the messages are longer than the local model's context"
        return "too_long"
    call.local_answer = _with_own_calls(answer)
    return None


async def _followed(
    call: Call, local: LocalModel, body: Mapping[str, Any], evidence: Evidence
) -> dict[str, Any] | None:
    """The whole answer, or None once it is ruled out."""
    collector = Collector()
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    seen = 0
    async with aclosing(local.chat_stream(streamed)) as events:
        async for data in events:
            collector.add(data)
            evidence.add(collector.logprobs[seen:], "".join(collector.text))
            seen = len(collector.logprobs)
            if evidence.ruled_out:
                call.given_up = "".join(collector.text)
                return None
    return collector.answer()


async def stream(call: Call, body: Mapping[str, Any], collector: Collector) -> AsyncGenerator[bytes]:
    """The student's stream, whose first event has come; `collector` sees every one.

    Raises:
        UpstreamError: before the first event; after it the stream itself raises.
    """
    assert call.served is not None and call.served.local is not None
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    events = call.served.local.chat_stream(streamed)
    first = await call.wait_for(anext(events))
    collector.add(first)

    async def followed() -> AsyncGenerator[bytes]:
        async with aclosing(events):
            yield first
            while (data := await call.wait_for(anext(events, None))) is not None:
                collector.add(data)
                yield data

    return followed()


def confidence_of(call: Call, answer: Mapping[str, Any]) -> float | None:
    """Of an answer to a certified prompt; None where the release has no confidence model."""
    served, question = call.served, call.question
    if served is None or question is None or served.model is None:
        return None
    fields = served.fields[question.predictor.name]
    return confidence(taken_apart(answer, question.query), fields, served.neighbours, served.model)


def reason_of(error: UpstreamError) -> Reason:
    if isinstance(error, UpstreamBusy):
        return "local_busy"
    found = (error.body or {}).get("error") or {}
    if isinstance(error, UpstreamRefused) and "context" in f"{found.get('code')} {found.get('message')}":
        return "too_long"
    return "local_down"


def _was_cut(answer: Mapping[str, Any], messages: Any, context: int) -> bool:
    """Whether the runtime seems to have read only part of a long prompt, as Ollama does without a word."""
    counted = (answer.get("usage") or {}).get("prompt_tokens") or 0
    size = sum(len(str(message.get("content") or "").encode(errors="replace")) for message in messages)
    return bool(counted) and size > SHORT_TOKEN * context and size > LONG_TOKEN * counted


def _with_own_calls(answer: dict[str, Any]) -> dict[str, Any]:
    """Its tool calls with ids by which the loop is known as the local model's."""
    for choice in answer["choices"]:
        for each in choice["message"].get("tool_calls") or []:
            each["id"] = f"{LOCAL_CALL}{uuid.uuid4().hex}"
    return answer


def taken_apart(answer: Mapping[str, Any], query: str) -> LocalAnswer:
    """The first choice, as confidence reads it."""
    choice = answer["choices"][0]
    content = (choice.get("logprobs") or {}).get("content") or []
    return LocalAnswer(
        text=choice["message"].get("content") or "",
        logprobs=[known_to_certify(token) for token in content],
        finish_reason=choice.get("finish_reason") or "length",  # a runtime that gave up says nothing
        prompt_tokens=(answer.get("usage") or {}).get("prompt_tokens") or 0,
        query=query,
    )


def known_to_certify(token: Mapping[str, Any]) -> dict[str, Any]:
    """What the confidence model was fitted on: no `bytes`, and no more alternatives than then."""
    top = token.get("top_logprobs")
    return {
        "token": token.get("token"),
        "logprob": token.get("logprob"),
        "top_logprobs": top[:TOP_LOGPROBS] if top else top,
    }

"""The engine between a program and its teacher: what was bought before is replayed, the rest is bought once."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

import dspy
from dspy._vendor.lm15.serde import request_to_dict, response_from_dict, response_to_dict
from dspy._vendor.lm15.transports import ConnectError
from dspy.lm15 import Request, Response
from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMConfigurationError,
    LMError,
    LMLockTimeoutError,
    LMProviderError,
    LMTimeoutError,
    LMUnsupportedFeatureError,
)

from trainer.errors import HomestillError, TeacherError
from trainer.lm import Session, call_record, current_session, openai_messages
from trainer.runs import sha256_json
from trainer.teacher.prices import Ledger, Usage
from trainer.traces import LOST, Store, Trace

UNSENT = (LMConfigurationError, LMLockTimeoutError, LMUnsupportedFeatureError)
"""Failures that come before the provider has the request."""


def perhaps_billed(error: BaseException) -> bool:
    """Whether the provider may want to be paid for a call that failed: it has the request, and has not said no.

    An error status is a no, as for the endpoint's budget; one that tells of a timeout (408, 504) is none.
    """
    if isinstance(error, UNSENT) or (
        isinstance(error, LMProviderError) and not isinstance(error, LMTimeoutError)
    ):
        return False
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConnectError):
        cause = cause.__cause__
    return cause is None


def _as_text(response: Response) -> Response:
    """The answer as UTF-8 can hold it: half of a surrogate pair, where a provider cut one, becomes a question mark."""
    told = json.dumps(response_to_dict(response), ensure_ascii=False).encode(errors="replace")
    found: Response = response_from_dict(json.loads(told))
    return found


class Teacher:
    """An engine that replays what was bought before and buys the rest, within the budget."""

    def __init__(
        self,
        make_client: Callable[[], dspy.LM],
        store: Store,
        ledger: Ledger,
        identity: Mapping[str, Any],
        *,
        stopping: threading.Event | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            make_client: makes the real client, at the first call that has to be bought.
            identity: task, program, teacher, stand_in and purpose of the traces.
            stopping: once set, no further call is bought.
        """
        self._make_client = make_client
        self._store = store
        self._ledger = ledger
        self._identity = identity
        self._stopping = stopping or threading.Event()
        self._clock = clock
        self._client: dspy.LM | None = None
        self._lock = threading.Lock()
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def complete(self, request: Request) -> Response:
        opened = current_session()
        key = self._key(opened, request)
        with self._lock:
            asking = self._asking[key]
        with asking:  # two threads with the same question: one buys, the other finds it
            trace = self._store.trace(key) or self._bought(key, opened, request)
        for refused in (opened.refused, self._ledger.refused):
            refused.pop(key, None)  # an earlier attempt's
        response: Response = response_from_dict(trace.response)
        opened.traces.append(trace.id)
        opened.calls.append(call_record(trace.predictor, request, response, trace.latency_ms, trace.cost_usd))
        return response

    def _bought(self, key: str, opened: Session, request: Request) -> Trace:
        """Buy; a refusal is noted, for programs and optimizers that would swallow it."""
        try:
            return self._buy(key, opened, request)
        except ContextWindowExceededError:
            raise
        except (HomestillError, LMError) as error:
            opened.refused[key] = self._ledger.refused[key] = error
            raise

    def _key(self, opened: Session, request: Request) -> str:
        """A call's identity: whose it is, what is asked, and how often that was asked before it."""
        asked = request_to_dict(request)
        predictor = opened.caller()
        who = {key: self._identity[key] for key in ("task", "teacher", "stand_in", "purpose")}
        before = opened.traces
        for repeat in range(len(before) + 1):
            key = sha256_json([who, opened.example, predictor, asked, repeat])
            if key not in before:
                return key
        raise AssertionError("a session holds fewer repeats than calls")

    def _buy(self, key: str, opened: Session, request: Request) -> Trace:
        if self._stopping.is_set():
            raise TeacherError("the run is being stopped; run the same command again to go on")
        messages, client = openai_messages(request), self._real_client()
        with self._ledger.reserved(messages, request.config.max_tokens) as bill:
            started = self._clock()
            try:
                response = client(request)
            except BaseException as error:
                if bill.worst.cost_usd and perhaps_billed(error):
                    self._keep(opened, messages, bill.worst, id=uuid4().hex, purpose=LOST)
                raise
            response = _as_text(response)
            return self._keep(
                opened,
                messages,
                bill.settled(response.usage.input_tokens, response.usage.output_tokens),
                id=key,
                completion=response.text or "",
                response=response_to_dict(response),
                latency_ms=(self._clock() - started) * 1000,
            )

    def _keep(self, opened: Session, messages: list[dict[str, str]], usage: Usage, **told: Any) -> Trace:
        """Store what was paid for, and what may have been: that one has no answer."""
        empty: dict[str, Any] = {"completion": "", "response": {}, "latency_ms": 0.0}
        about = empty | vars(usage) | dict(self._identity) | told
        trace = Trace(example=opened.example, predictor=opened.caller(), messages=messages, **about)
        try:
            self._store.add_trace(trace)
        except HomestillError as error:
            self._ledger.closed = error
            raise
        return trace

    def _real_client(self) -> dspy.LM:
        with self._lock:
            if self._client is None:
                self._client = self._make_client()
            return self._client

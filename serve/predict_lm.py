"""A prediction: the program on a thread, each of its calls through the router on the event loop.

DSPy asks an *engine* once per attempt. Ours hands the request to the router as a chat request of the
task; DSPy's own retries, caches and second attempts in another format are off, as in certification.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any

from pydantic_core import to_jsonable_python

from serve.errors import ApiError
from serve.predict_program import Loaded

TOO_LONG = "context_length_exceeded"
Ask = Callable[[dict[str, Any], int], Coroutine[Any, Any, dict[str, Any]]]
"""A chat request and the number of the call in its prediction, from 1 on; answered with `homestill`."""


class Stopped(BaseException):
    """Nobody waits for this prediction any more; not an Exception, so that no program goes on after it."""


class Engine:
    """Answers the calls of one prediction; `complete` may run on several threads.

    Args:
        ask: the router; raises ApiError.
        loop: on which it runs.
    """

    def __init__(self, ask: Ask, loop: asyncio.AbstractEventLoop, loaded: Loaded) -> None:
        self.failed: ApiError | None = None
        """A model did not answer: then the prediction has failed, even where the program would go on."""
        self._ask = ask
        self._loop = loop
        self._loaded = loaded
        self._numbers = itertools.count(1)
        self._calls: dict[int, dict[str, Any]] = {}
        self._open: set[Future[dict[str, Any]]] = set()
        self._stopped = False
        self._lock = threading.Lock()

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Who answered each call and why, in the order in which they were made."""
        return [call for _, call in sorted(self._calls.copy().items())]

    def complete(self, request: Any) -> Any:
        """One call, as DSPy makes it.

        Raises:
            LM15Error: no model answered.
            Stopped.
        """
        from dspy.lm15 import ContextLengthError, ServerError, response_from_openai_chat

        if self.failed:
            raise ServerError(str(self.failed)) from self.failed
        body, predictor, number = self._body(request), self._caller(), next(self._numbers)
        try:
            answer = self._answered(body, number)
        except ApiError as error:
            if (
                error.body.get("error", {}).get("code") == TOO_LONG
            ):  # programs know how to go on after this one
                raise ContextLengthError(str(error)) from error
            self.failed = self.failed or error
            raise ServerError(str(error)) from error
        told = answer.get("homestill") or {}
        self._calls[number] = {
            "predictor": predictor,
            "model": answer.get("model"),
            "usage": answer.get("usage"),
            **told,
        }
        return response_from_openai_chat({key: value for key, value in answer.items() if key != "homestill"})

    def stop(self) -> None:
        """Make no further call, and give up those under way."""
        with self._lock:
            self._stopped = True
            waiting = list(self._open)
        for future in waiting:
            future.cancel()

    def _answered(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        with self._lock:
            if self._stopped:
                raise Stopped
            future = asyncio.run_coroutine_threadsafe(self._ask(body, number), self._loop)
            self._open.add(future)
        try:
            return future.result()
        except CancelledError as error:
            raise Stopped from error
        finally:
            with self._lock:
                self._open.discard(future)

    def _body(self, request: Any) -> dict[str, Any]:
        """DSPy's own rendering of the request for OpenAI's interface."""
        from dspy.lm15 import OpenAIChatLM

        rendered = OpenAIChatLM(api_key="unused").build_request(request, stream=False)
        body: dict[str, Any] = json.loads(rendered.body)
        return body | {"model": self._loaded.task}

    def _caller(self) -> str | None:
        """The predictor that is calling; None where the program asks the model itself."""
        import dspy

        names = self._loaded.predictors
        calling = reversed(dspy.settings.caller_modules or [])
        return next((names[id(module)] for module in calling if id(module) in names), None)


def run(loaded: Loaded, values: Mapping[str, Any], engine: Engine) -> dict[str, Any]:
    """Run the program once, on this thread.

    Args:
        values: its inputs, as JSON holds them: so they were in training.

    Returns:
        Its outputs as JSON holds them.

    Raises:
        Stopped, and whatever the program raises.
    """
    import dspy

    # the name is for messages only; a task's own might look like a model that DSPy has special rules for
    lm = dspy.LM("homestill/hybrid", engine=engine, cache=False, num_retries=0, **loaded.sampling)
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=lm, adapter=adapter, disable_history=True, trace=[]):
        prediction = loaded.module(**values)
    if not isinstance(prediction, dspy.Prediction | dict):
        raise TypeError(f"it returned {type(prediction).__name__}, a dspy.Prediction is needed")
    outputs = {**prediction}
    outputs.pop("logprobs", None)
    found: dict[str, Any] = to_jsonable_python(outputs, fallback=str)
    return found

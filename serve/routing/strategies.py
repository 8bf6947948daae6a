"""Ways to choose between the two models; a task names its own in serve.yaml.

`certified` is the one that keeps the promise. The others are what the field uses instead: they stay
selectable because the report compares against them, and all but `shadow` have the guarantee `none`.
"""

from __future__ import annotations

import math
from random import Random
from typing import Protocol

from serve import self_ask
from serve.confidence import confidence, parse
from serve.config import StrategyName
from serve.errors import UpstreamError
from serve.evidence import Evidence
from serve.routing import student
from serve.routing.call import Call
from serve.routing.decision import Reason
from serve.routing.policy import asked, conversation, demands, match, too_long, tool_loop


class Strategy(Protocol):
    """How one kind of task is routed."""

    promises: bool
    """Whether the certificate covers what it keeps."""

    def before(self, call: Call) -> Reason | None:
        """Why the student is not asked at all; None when it is. Sets `call.question` where there is one."""

    async def judge(self, call: Call) -> Reason:
        """Ask the student: `confident`, or why its answer is not kept. Sets `call.confidence`."""


class Certified:
    """The student's answer is kept from the certified threshold on, and only for the certified prompts."""

    promises = True

    def before(self, call: Call) -> Reason | None:
        served = call.served
        if served is None or served.refused:
            return "no_release"
        if tool_loop(call.body):
            return "tool_loop"
        messages = None if demands(call.body) else conversation(call.body)
        if messages is None:
            return "unsupported"
        router = served.release.router
        call.question = match(messages, router.predictors)
        if call.question is None:
            return "not_this_task"
        if not router.certified or served.model is None or router.threshold is None:
            return "policy"
        if served.local is None:
            return "local_down"
        if too_long(messages, router.sampling.context):
            return "too_long"
        call.evidence = _evidence(call, student.certified_body(call, call.question)["max_tokens"])
        return "out_of_distribution" if call.evidence.ruled_out else None

    async def judge(self, call: Call) -> Reason:
        served, question = call.served, call.question
        assert served is not None and question is not None and served.model is not None
        body = student.certified_body(call, question)
        # A client that waits for the whole answer gains little from an earlier decision, and following each
        # token costs as much as all the rest of its request.
        early = call.evidence if call.streamed and not call.alone else None
        reason = await student.ask(call, body, early)
        if reason or call.local_answer is None:
            return reason or "local_down"
        answer = student.taken_apart(call.local_answer, question.query)
        if answer.text and not answer.logprobs:
            call.local_problem = "the local model gave no log-probabilities"
            return "local_down"
        fields = served.fields[question.predictor.name]
        call.confidence = confidence(answer, fields, served.neighbours, served.model)
        if call.confidence >= (served.release.router.threshold or math.inf):
            return "confident"
        return "unparsable" if parse(answer.text, fields) is None else "low_confidence"


def _evidence(call: Call, max_tokens: int) -> Evidence:
    """Of an answer that has not begun: what is known before is how far the question is from training."""
    served, question = call.served, call.question
    assert served is not None and question is not None and served.model is not None
    router = served.release.router
    return Evidence(
        served.fields[question.predictor.name],
        served.model,
        served.neighbours.distance(question.query) if served.neighbours else (1.0, 1.0),
        router.threshold or 0.0,
        max_tokens=max_tokens,
        context=router.sampling.context,
    )


class _Free:
    """Any request that the local runtime can do, judged by a figure of its own."""

    promises = False
    default = 0.5

    def before(self, call: Call) -> Reason | None:
        served = call.served
        if served is None or served.refused:
            return "no_release"
        if tool_loop(call.body) == "teacher":
            return "tool_loop"
        if served.local is None:
            return "local_down"
        if served.local.unsupported(call.body):
            return "unsupported"
        if too_long(call.body["messages"], served.release.router.sampling.context):
            return "too_long"
        call.question = match(conversation(call.body) or [], served.release.router.predictors)
        return None

    async def judge(self, call: Call) -> Reason:
        reason = await student.ask(call, student.free_body(call))
        if reason or call.local_answer is None:
            return reason or "local_down"
        if self._is_unparsable(call):
            return "unparsable"
        call.confidence = await self.score(call)
        return (
            "confident"
            if call.confidence is None or call.confidence >= self._threshold(call)
            else "low_confidence"
        )

    async def score(self, call: Call) -> float | None:
        """Of the answer that was given, in [0, 1]; None keeps it. Called once the student has answered."""
        return None

    def _threshold(self, call: Call) -> float:
        return self.default if call.rules.threshold is None else call.rules.threshold

    def _is_unparsable(self, call: Call) -> bool:
        if call.question is None or call.served is None or call.local_answer is None:
            return False
        text = call.local_answer["choices"][0]["message"].get("content") or ""
        return parse(text, call.served.fields[call.question.predictor.name]) is None


class AlwaysLocal(_Free):
    """Whatever the student says."""

    def _is_unparsable(self, call: Call) -> bool:
        return False


class AlwaysTeacher:
    """As if there were no student."""

    promises = True  # the teacher's answer is what the promise is measured against

    def before(self, call: Call) -> Reason | None:
        return "policy"

    async def judge(self, call: Call) -> Reason:
        raise AssertionError("it is never asked")  # `before` always has a reason


class MeanLogprob(_Free):
    """The geometric mean of the tokens' probabilities."""

    default = 0.9

    async def score(self, call: Call) -> float | None:
        assert call.local_answer is not None
        tokens = student.taken_apart(call.local_answer, "").logprobs
        found = [max(-100.0, float(token["logprob"])) for token in tokens if token.get("logprob") is not None]
        return math.exp(min(0.0, sum(found) / len(found))) if found else 0.0


class Knn(_Free):
    """How near the request is to what the student was trained on; decided before anything is generated."""

    def before(self, call: Call) -> Reason | None:
        reason = super().before(call)
        if reason or call.served is None:
            return reason
        if call.served.neighbours is None:
            return "policy"
        query = call.question.query if call.question else asked(call.body)
        call.confidence = max(0.0, 1 - call.served.neighbours.distance(query)[0])
        return None if call.confidence >= self._threshold(call) else "out_of_distribution"

    async def score(self, call: Call) -> float | None:
        return call.confidence


class Randomly(_Free):
    """A share of the requests, whatever they are."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def before(self, call: Call) -> Reason | None:
        reason = super().before(call)
        return reason or (None if self._random.random() < self._threshold(call) else "policy")


class SelfAsk(_Free):
    """The student is asked whether it is confident of its answer."""

    async def score(self, call: Call) -> float | None:
        assert call.local_answer is not None and call.served is not None and call.served.local is not None
        given = call.local_answer["choices"][0]["message"].get("content") or ""
        message = {"role": "user", "content": self_ask.prompt(asked(call.body), given)}
        body = {"messages": [message], "temperature": 0.0, "max_tokens": self_ask.MAX_TOKENS}
        try:
            reply = await call.wait_for(call.served.local.chat(body))
        except UpstreamError as error:
            call.local_problem = str(error)
            return 0.0
        return self_ask.score(reply["choices"][0]["message"].get("content") or "")


def strategies(random: Random) -> dict[StrategyName, Strategy]:
    """All of them, by the name that serve.yaml uses. `shadow` judges as `certified` does."""
    certified = Certified()
    return {
        "certified": certified,
        "shadow": certified,
        "self-ask": SelfAsk(),
        "mean-logprob": MeanLogprob(),
        "knn": Knn(),
        "random": Randomly(random),
        "always-local": AlwaysLocal(),
        "always-teacher": AlwaysTeacher(),
    }

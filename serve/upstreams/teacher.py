"""The API model behind the endpoint: where it is, what it is called there, what it costs, and how patiently
it is asked."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import yaml

from serve.config import Price, TeacherRules
from serve.errors import UpstreamDown, UpstreamRefused
from serve.release import Release, ReleaseInvalid
from serve.settings import OPENAI, Settings
from serve.upstreams.breaker import Breaker, Resting, State
from serve.upstreams.upstream import NO_SUCH_MODEL, Connect, Patience, Server, Upstream, timed_out

Sleep = Callable[[float], Awaitable[None]]
Retried = Callable[[UpstreamDown], None]
MENDED_BY_TIME = frozenset({408, 409, 425, 429})
"""Client errors that may be gone a moment later; so may every server error."""
OLDER_WORD = (".mistral.ai", ".deepseek.com")
"""Providers that refuse or ignore `max_completion_tokens`, OpenAI's newer name of `max_tokens`."""
LIMITS = ("max_completion_tokens", "max_tokens")


def cost(price: Price | None, usage: Any) -> float | None:
    """US dollars for OpenAI's `usage` object; None where the price or the number of tokens is not known.

    Some providers count what a model thought in `total_tokens` alone; it is billed as its answer is.
    """
    if price is None or not isinstance(usage, Mapping):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    if isinstance(total := usage.get("total_tokens"), int):
        completion = max(completion, total - prompt)
    return (price.input * prompt + price.output * completion) / 1e6


def price_of(model: str, prices: Mapping[str, Price]) -> Price | None:
    """The price of a model by its name, with or without its provider; None where it is not known.

    A name with another provider is another model: `azure/gpt-4o` does not cost what `openai/gpt-4o` costs.
    """
    if model in prices:
        return prices[model]
    _, provided, bare = model.partition("/")
    if provided:
        return prices.get(bare)
    return next((price for name, price in prices.items() if name.partition("/")[1:] == ("/", model)), None)


class Teacher:
    """A teacher, asked again where that can help, and left alone where it keeps failing.

    Args:
        upstream: where it is.
        model: None: the one that the client names.
        price: None: not known, and never taken for 0.
        rules: how patiently it is asked.
        breaker: shared by all teachers at this address.
        sleep: waits so many seconds.
        random: for the jitter.
    """

    def __init__(
        self,
        upstream: Server,
        model: str | None = None,
        price: Price | None = None,
        *,
        rules: TeacherRules | None = None,
        breaker: Breaker | None = None,
        sleep: Sleep = asyncio.sleep,
        random: Random | None = None,
    ) -> None:
        self.upstream = upstream
        self.model = model
        self.price = price
        self._rules = rules or TeacherRules()
        self.breaker = breaker or Breaker(self._rules.failures, self._rules.rest_s)
        self._sleep = sleep
        self._random = random or Random()

    async def chat(self, body: Mapping[str, Any], retried: Retried | None = None) -> dict[str, Any]:
        """A whole answer.

        Args:
            body: as it is sent, its model with it.
            retried: told of every failure after which the teacher is asked again; some are `billable`.

        Raises:
            UpstreamDown: with `retry_after` where that is known.
            UpstreamRefused.
        """
        attempt, body = 0, self._worded(body)
        with self._admitted() as ticket:
            while True:
                try:
                    return await self.upstream.chat(body)
                except UpstreamDown as error:
                    await self._wait(error, attempt, ticket, retried)
                attempt += 1

    async def chat_stream(
        self, body: Mapping[str, Any], retried: Retried | None = None
    ) -> AsyncGenerator[bytes]:
        """The data of each event but the closing `[DONE]`; asked again only before the first one.

        Args:
            body: as it is sent: its model and `stream: true` with it.
            retried: as for `chat`.

        Raises:
            UpstreamDown, UpstreamRefused: also in the middle.
        """
        attempt, began, body = 0, False, self._worded(body)
        with self._admitted() as ticket:
            while True:
                try:
                    async with aclosing(self.upstream.chat_stream(body)) as events:
                        async for data in events:
                            if not began:
                                began = True
                                self.breaker.alive(ticket)
                            yield data
                    return
                except UpstreamDown as error:
                    if began:
                        raise
                    await self._wait(error, attempt, ticket, retried)
                attempt += 1

    def _worded(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the limit for the answer in the word that this provider knows."""
        given = [body[name] for name in LIMITS if body.get(name)]
        if not given or not (urlsplit(self.upstream.address).hostname or "").endswith(OLDER_WORD):
            return body
        return {
            **{name: value for name, value in body.items() if name not in LIMITS},
            "max_tokens": min(given),
        }

    @contextmanager
    def _admitted(self) -> Iterator[int]:
        """Ask the breaker, and tell it how the request ended."""
        ticket = self._ticket()
        try:
            yield ticket
        except UpstreamRefused as error:
            self.breaker.succeeded(ticket)
            if error.status == NO_SUCH_MODEL and self.model is not None:
                # The client did not choose this model, so the request is not at fault.
                raise UpstreamDown(error.who, str(error), status=error.status, body=error.body) from error
            raise
        except UpstreamDown as error:
            self.breaker.failed(ticket, str(error))
            raise
        except BaseException:
            self.breaker.gave_up(ticket)
            raise
        self.breaker.succeeded(ticket)

    def _ticket(self) -> int:
        try:
            return self.breaker.admit()
        except Resting as rest:
            raise UpstreamDown(
                "teacher",
                f"teacher at {self.upstream.address} is left alone after repeated failures; the last: {rest.problem}",
                retry_after=str(max(1, math.ceil(rest.wait_s))),
            ) from rest

    async def _wait(self, error: UpstreamDown, attempt: int, ticket: int, retried: Retried | None) -> None:
        """Wait before the next attempt; raises the error where there is none."""
        wait_s = self._rules.backoff_s * 2**attempt * self._random.uniform(0.5, 1.0)
        if error.retry_after is not None:
            wait_s = float(error.retry_after)
        last = attempt >= self._rules.retries or not self.breaker.allows_retry(ticket)
        if last or not mendable(error) or wait_s > self._rules.longest_wait_s:
            raise error
        if retried:
            retried(error)
        await self._sleep(wait_s)


def mendable(error: UpstreamDown) -> bool:
    """Whether asking again may help. A teacher that was too slow is not made to do the same work again."""
    if error.status is None:
        return not timed_out(error)
    return error.status in MENDED_BY_TIME or error.status >= 500


class Teachers:
    """The teachers of all releases, each address with its own connections and breaker. Not constructed offline.

    Args:
        connect: makes sessions.
        clock: seconds, monotonic, for the breakers.
        sleep: waits so many seconds before a retry.
        random: for the jitter.
    """

    def __init__(
        self,
        settings: Settings,
        connect: Connect,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = asyncio.sleep,
        random: Random | None = None,
    ) -> None:
        self._settings = settings
        self._rules = settings.config.teacher
        self._prices = settings.config.prices
        self._connect = connect
        self._clock = clock
        self._sleep = sleep
        self._random = random or Random()
        self._at: dict[str, tuple[Upstream, Breaker]] = {}

    @property
    def breakers(self) -> dict[str, State]:
        """The breaker's state at every address that was asked."""
        return {upstream.address: breaker.state for upstream, breaker in self._at.values()}

    def before_release(self, asked: str = "") -> Teacher:
        """Who answers for a task that has no release.

        Args:
            asked: the model that the client names.
        """
        model = self._settings.teacher_model
        return self._teacher(
            self._settings.teacher_api_base or OPENAI, model, price_of(model or asked, self._prices)
        )

    def of(self, release: Release) -> Teacher:
        """The teacher that the release was certified against. Its address may be another one than then.

        Raises:
            ReleaseInvalid: the release does not say where a teacher that is not OpenAI's can be asked.
        """
        section = _teacher_section(release.task)
        base = self._settings.teacher_api_base or section.get("api_base")
        named = release.manifest.teacher.model
        provider, _, _ = named.rpartition("/")
        if base is None and provider not in ("", "openai"):
            raise ReleaseInvalid(
                [
                    f"the teacher is {named}, which needs an OpenAI-compatible address; "
                    "set HOMESTILL_TEACHER_API_BASE"
                ]
            )
        # dspy.LM's names begin with the provider, which the provider itself does not know.
        name = named.partition("/")[2] if provider else named
        return self._teacher(base or OPENAI, name, _price(section) or price_of(named, self._prices))

    async def close(self) -> None:
        for upstream, _ in self._at.values():
            await upstream.close()

    def _teacher(self, base_url: str, model: str | None, price: Price | None) -> Teacher:
        base_url = base_url.rstrip("/")
        if base_url not in self._at:
            self._at[base_url] = self._new(base_url)
        upstream, breaker = self._at[base_url]
        return Teacher(
            upstream,
            model,
            price,
            rules=self._rules,
            breaker=breaker,
            sleep=self._sleep,
            random=self._random,
        )

    def _new(self, base_url: str) -> tuple[Upstream, Breaker]:
        rules = self._rules
        patience = Patience(rules.connect_s, rules.read_s)
        upstream = Upstream(
            self._connect, base_url, who="teacher", key=self._settings.teacher_key, patience=patience
        )
        return upstream, Breaker(rules.failures, rules.rest_s, self._clock)


def _teacher_section(task: Path) -> Mapping[str, Any]:
    """`teacher` of the release's task.yaml; load has checked the file's hash, and the trainer its content."""
    if not task.is_file():
        return {}
    try:
        section = (yaml.safe_load(task.read_text(encoding="utf-8")) or {}).get("teacher") or {}
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise ReleaseInvalid([f"{task} cannot be read ({error}); run release again, or roll back"]) from error
    if not isinstance(section, Mapping):
        raise ReleaseInvalid(
            [f"{task}: teacher is {json.dumps(section)}, no section; run release again, or roll back"]
        )
    return section


def _price(section: Mapping[str, Any]) -> Price | None:
    given = section.get("price_per_1m")
    return Price(input=given["input"], output=given["output"]) if given else None

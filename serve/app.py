"""The endpoint: everything that is served, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from serve.api.chat import Chat
from serve.api.completions import Completions
from serve.api.direct import EXPECTED, Direct, own_fault
from serve.api.document import Documents
from serve.api.door import Door
from serve.api.embeddings import Embeddings
from serve.api.finish import Finish, Observer, tell
from serve.api.models import Models
from serve.api.ollama import OllamaApi
from serve.auditing import Auditing
from serve.guard.budget import Budget
from serve.guard.hosts import HostCheck
from serve.guard.keys import Keys
from serve.predict import Predict
from serve.records.entry import Entry
from serve.records.journal import Journal
from serve.records.retention import Retention
from serve.routing.router import Router
from serve.settings import Settings
from serve.tasks import Tasks
from serve.upstreams.local import Local
from serve.upstreams.teacher import Teachers
from serve.watching.gauges import Drift, Gauges, Queue, Spending
from serve.watching.live import Live
from serve.watching.metrics import Metrics
from serve.watching.site import routes as site
from serve.watching.tracing import to_collector

LAST_AUDITS_S = 5.0
"""How long the end waits for audits under way: their answers are paid for."""


def create_app(
    settings: Settings,
    local: Local,
    teachers: Teachers | None,
    journal: Journal,
    *,
    observers: Sequence[Observer] = (),
    hosts: Sequence[str] = (),
    poll_s: float = 1.0,
) -> ASGIApp:
    """The ASGI application.

    Args:
        local: runs the releases' models.
        teachers: None offline.
        journal: stays open; whoever opened it closes it.
        observers: told of every ended request, beside the journal, the metrics and the page.
        hosts: names by which it may be asked, beside those of loopback and of serve.yaml.
        poll_s: seconds between two looks at every `current`.
    """
    endpoint = Endpoint(settings, local, teachers, journal, observers=observers, poll_s=poll_s)
    app = Starlette(
        routes=endpoint.routes(),
        exception_handlers={**EXPECTED, Exception: own_fault},
        lifespan=endpoint.running,
    )
    return HostCheck(Direct(app, endpoint.chat.completions), (*settings.config.limits.hosts, *hosts))


class Endpoint:
    """The parts, who knows whom, and what runs beside the requests. Arguments as for `create_app`."""

    def __init__(
        self,
        settings: Settings,
        local: Local,
        teachers: Teachers | None,
        journal: Journal,
        *,
        observers: Sequence[Observer],
        poll_s: float,
    ) -> None:
        self._settings = settings
        self._config = config = settings.config
        self._teachers = teachers
        self._journal = journal
        self._poll_s = poll_s
        self._tasks = Tasks(settings.releases, settings.runtime, local, teachers)
        self._budget = Budget(settings.budget_file, config)
        router = Router(self._tasks, teachers, config, self._budget)
        self._auditing = Auditing(router, journal, self._tell)
        gauges = self._gauges()
        self._live = Live(self._tasks, gauges)
        self._metrics = Metrics(CollectorRegistry(), self._tasks, gauges)
        self._tracing = (
            to_collector(config.otlp_endpoint, version("homestill")) if config.otlp_endpoint else None
        )
        self._observers: list[Observer] = [
            journal.record,
            self._live.observe,
            self._metrics.observe,
            *observers,
        ]
        traced = self._tracing.observe if self._tracing else None
        self._finish = Finish(self._observers, router, kept=self._auditing.kept, traced=traced)
        self._keys = Keys(settings.api_keys, settings.keys_file)
        self._door = Door(self._keys, config)
        self.chat = Chat(self._door, router, self._finish, config.limits)
        self._predict = Predict(self._tasks, self.chat.complete, self._door, config.limits.body_bytes)

    def routes(self) -> list[BaseRoute]:
        """Every path that is answered."""
        settings, known = self._settings, version("homestill")
        documents = Documents(self._door, self._predict.interfaces, known, secured=self._keys.required)
        return [
            *self.chat.routes(),
            *Completions(self.chat).routes(),
            *Embeddings(self.chat, self._tasks, self._tell).routes(),
            *OllamaApi(self.chat, self._tasks, known).routes(),
            *self._predict.routes(),
            *documents.routes(),
            *Models(self._door, self._tasks, self._journal, offline=settings.offline).routes(),
            *site(
                self._live,
                self._metrics,
                self._tasks,
                releases=settings.releases,
                authorize=self._door.caller,
            ),
        ]

    @asynccontextmanager
    async def running(self, _: Starlette) -> AsyncIterator[None]:
        """From the first request to the last."""
        await self._tasks.refresh()
        for served in self._tasks.served.values():
            await self._auditing.follow(served.release)
        retention = Retention(self._journal, self._config.journal.keep_days)
        beside = (self._tasks.watch(self._poll_s), retention.run(), self._auditing.audits.run())
        running = [asyncio.create_task(work) for work in beside]
        try:
            yield
        finally:
            await self._end(running)

    async def _end(self, running: Sequence[asyncio.Task[None]]) -> None:
        await self._predict.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._auditing.audits.drain(), LAST_AUDITS_S)
        for work in running:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
        await self._finish.drain()
        await self._tasks.close()
        if self._teachers:
            await self._teachers.close()
        self._budget.close()
        if self._tracing:
            await asyncio.to_thread(self._tracing.close)

    def _tell(self, entry: Entry) -> None:
        """Audits are told like requests."""
        tell(self._observers, entry)

    def _gauges(self) -> Gauges:
        """What the page and the metrics ask for when somebody looks."""
        return Gauges(
            queue=self._queue,
            breakers=self._breakers,
            lost=lambda: self._journal.lost,
            spending=self._spending,
            drift=self._drift,
        )

    def _queue(self) -> Queue:
        models = [served.local for served in self._tasks.served.values() if served.local]
        return Queue(sum(model.active for model in models), sum(model.waiting for model in models))

    def _breakers(self) -> Mapping[str, str]:
        return self._teachers.breakers if self._teachers else {}

    def _spending(self) -> list[Spending]:
        caps = {"all": self._config.daily_usd}
        caps |= {f"task {name}": self._config.rules(name).daily_usd for name in self._tasks.served}
        return [Spending(scope, self._budget.spent_usd(scope), cap) for scope, cap in caps.items()]

    def _drift(self) -> Mapping[str, Drift]:
        return self._auditing.drift(self._tasks)

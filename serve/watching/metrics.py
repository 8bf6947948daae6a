"""/metrics for Prometheus: counted from the entries of ended requests, gauges asked for at every scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.records.entry import Entry
from serve.watching.gauges import BACKGROUND, Gauges, ServedTasks, answered

NONE = "none"
"""Label where there is no task, route or reason."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
OVERHEAD_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
CONFIDENCES = tuple(step / 20 for step in range(1, 21))
BREAKER_STATES = ("closed", "half_open", "open")


class Metrics:
    """One observer of entries, one page of text.

    Every label has few values: the names of tasks, keys and upstreams that are set up here, and words
    of this program. What a client writes (a model's name, a header) never becomes one.

    Args:
        registry: of this endpoint alone, so that two in one process do not mix.
        tasks: whose releases are in use.
        gauges: asked at every scrape.
    """

    def __init__(self, registry: CollectorRegistry, tasks: ServedTasks, gauges: Gauges) -> None:
        self._registry = registry
        counter, histogram = partial(_counter, registry), partial(_histogram, registry)
        self._requests = counter(
            "homestill_requests", "Ended requests", "task", "route", "reason", "endpoint", "status"
        )
        self._degraded = counter(
            "homestill_degraded", "Local answers given because the teacher was out", "task"
        )
        self._seconds = histogram(
            "homestill_request_seconds", "From the request to the end of the answer", SECONDS, "route"
        )
        self._first = histogram(
            "homestill_first_token_seconds",
            "From the request to the first token that the client was sent",
            SECONDS,
            "route",
        )
        self._overhead = histogram(
            "homestill_overhead_seconds",
            "Time of a request that was not spent waiting for a model",
            OVERHEAD_SECONDS,
        )
        self._tokens = counter("homestill_tokens", "Tokens of answers", "route", "kind")
        self._cost = counter(
            "homestill_cost_usd", "US dollars paid to the teacher, audits included", "task", "key"
        )
        self._unpriced = counter(
            "homestill_unpriced", "Answers of the teacher whose cost is not known", "task"
        )
        self._confidence = histogram(
            "homestill_confidence", "Confidence of local answers, kept or not", CONFIDENCES, "task"
        )
        self._audits = counter(
            "homestill_audits", "Local answers compared with the teacher's", "task", "agreed"
        )
        registry.register(_Now(tasks, gauges))

    def observe(self, entry: Entry) -> None:
        """Count an ended request."""
        task = entry.task or NONE
        self._count_money(entry, task)
        if entry.endpoint in BACKGROUND:
            self._count_background(entry, task)
            return
        route = entry.route or NONE
        status = f"{entry.status // 100}xx"
        self._requests(task, route, entry.reason or NONE, entry.endpoint or NONE, status).inc()
        self._overhead().observe(entry.overhead_ms / 1000)
        if entry.confidence is not None:
            self._confidence(task).observe(entry.confidence)
        if answered(entry):
            self._count_answer(entry, task, route)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def _count_answer(self, entry: Entry, task: str, route: str) -> None:
        self._seconds(route).observe(entry.latency_ms / 1000)
        if entry.first_token_ms is not None:
            self._first(route).observe(entry.first_token_ms / 1000)
        if entry.prompt_tokens:
            self._tokens(route, "prompt").inc(entry.prompt_tokens)
        if entry.completion_tokens:
            self._tokens(route, "completion").inc(entry.completion_tokens)
        if entry.degraded:
            self._degraded(task).inc()

    def _count_money(self, entry: Entry, task: str) -> None:
        if entry.cost_usd:
            self._cost(task, entry.key or NONE).inc(entry.cost_usd)
        elif entry.cost_usd is None and entry.route == "teacher" and answered(entry):
            self._unpriced(task).inc()

    def _count_background(self, entry: Entry, task: str) -> None:
        if entry.audit is not None:
            self._audits(task, "yes" if entry.audit >= 1 else "no").inc()
        if entry.endpoint == "shadow" and entry.confidence is not None:
            self._confidence(task).observe(entry.confidence)


def _counter(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Callable[..., Counter]:
    """The counter's child of given labels. Few values, so each is looked up once and kept."""
    return cache(Counter(name, text, labels, registry=registry).labels)


def _histogram(
    registry: CollectorRegistry, name: str, text: str, buckets: Sequence[float], *labels: str
) -> Callable[..., Histogram]:
    """The same for a histogram; one without labels is its own only child."""
    metric = Histogram(name, text, labels, buckets=buckets, registry=registry)
    return cache(metric.labels) if labels else lambda: metric


class _Now(Collector):
    """The gauges, read when Prometheus asks."""

    def __init__(self, tasks: ServedTasks, gauges: Gauges) -> None:
        self._tasks = tasks
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        yield self._queue()
        yield self._breakers()
        yield CounterMetricFamily(
            "homestill_journal_lost",
            "Requests that could not be written to the journal",
            value=self._gauges.lost(),
        )
        yield from self._spending()
        yield from self._drift()
        yield from self._releases()

    def describe(self) -> Iterator[Metric]:
        """Nothing: whoever registers must not be asked for figures yet."""
        return iter(())

    def _queue(self) -> Metric:
        found = self._gauges.queue()
        metric = GaugeMetricFamily(
            "homestill_local_requests", "Requests at the local models", labels=["state"]
        )
        metric.add_metric(["active"], found.active)
        metric.add_metric(["waiting"], found.waiting)
        return metric

    def _breakers(self) -> Metric:
        metric = GaugeMetricFamily(
            "homestill_breaker", "1 for the state that it is in", labels=["upstream", "state"]
        )
        for upstream, state in self._gauges.breakers().items():
            for each in BREAKER_STATES:
                metric.add_metric([upstream, each], float(each == state))
        return metric

    def _spending(self) -> Iterator[Metric]:
        spent = GaugeMetricFamily(
            "homestill_budget_spent_usd", "US dollars spent or reserved on this UTC day", labels=["scope"]
        )
        cap = GaugeMetricFamily("homestill_budget_cap_usd", "US dollars allowed a UTC day", labels=["scope"])
        for each in self._gauges.spending():
            spent.add_metric([each.scope], each.spent_usd)
            if each.cap_usd is not None:
                cap.add_metric([each.scope], each.cap_usd)
        yield spent
        yield cap

    def _drift(self) -> Iterator[Metric]:
        alarm = GaugeMetricFamily(
            "homestill_drift_alarm", "1: kept answers have become worse", labels=["task"]
        )
        differing = GaugeMetricFamily(
            "homestill_audit_disagreement", "Share of audited answers that differ", labels=["task"]
        )
        for task, each in self._gauges.drift().items():
            alarm.add_metric([task], float(each.alarm))
            if each.disagreement is not None:
                differing.add_metric([task], each.disagreement)
        yield alarm
        yield differing

    def _releases(self) -> Iterator[Metric]:
        info = InfoMetricFamily("homestill_release", "The release in use", labels=["task"])
        for task, served in self._tasks.served.items():
            facts = {"version": served.release.version, "guarantee": served.guarantee}
            info.add_metric([task], facts)
        broken = GaugeMetricFamily(
            "homestill_release_problem", "1: the release that `current` names is not in use", labels=["task"]
        )
        for task in self._tasks.problems:
            broken.add_metric([task], 1)
        yield info
        yield broken

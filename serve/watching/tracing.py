"""OpenTelemetry: one span a request, by the names of the gen_ai semantic conventions (1.37 and later).

Spans are made from the entry when a request has ended, so an answer never waits for one. Neither messages
nor answers are in them.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from serve.errors import SettingsError
from serve.records.entry import Entry
from serve.watching.gauges import BACKGROUND

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

OPERATIONS = {"completions": "text_completion", "embeddings": "embeddings"}
PROVIDERS = {"local": "homestill", "teacher": "openai"}
"""Whose API was spoken: the convention asks for the provider as far as the caller can tell."""
SERVER_FAULT = 500


class Tracing:
    """Turns entries into spans.

    Args:
        provider: an SDK's; closed by `close`.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("homestill")

    def observe(self, entry: Entry, traceparent: str | None = None) -> None:
        """Make the span of an ended request.

        Args:
            traceparent: the client's header (W3C Trace Context): the span becomes a child of that one.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode

        end = int(datetime.fromisoformat(entry.created).timestamp() * 1e9)
        operation = OPERATIONS.get(entry.endpoint or "", "chat")
        span = self._tracer.start_span(
            f"{operation} {entry.asked}",
            context=_parent(traceparent),
            kind=SpanKind.INTERNAL if entry.endpoint in BACKGROUND else SpanKind.SERVER,
            attributes=_attributes(entry, operation),
            start_time=end - int(entry.latency_ms * 1e6),
        )
        if entry.status >= SERVER_FAULT:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def to_collector(endpoint: str, version: str) -> Tracing:
    """Spans to an OpenTelemetry collector, in batches from a thread of its own.

    Args:
        endpoint: OTLP over HTTP, such as http://127.0.0.1:4318; without a path it gets /v1/traces.
        version: of Homestill, told with every span.

    Raises:
        SettingsError: OpenTelemetry is not installed, or the endpoint is no URL.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise SettingsError(
            [
                f"otlp_endpoint is {endpoint}, and {error.name} is not installed; pip install 'homestill[tracing]'"
            ]
        ) from error
    address = urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise SettingsError(
            [f'otlp_endpoint is "{endpoint}"; use the URL of a collector, such as http://127.0.0.1:4318']
        )
    path = address.path if address.path.strip("/") else "/v1/traces"
    return Tracing(provider(OTLPSpanExporter(endpoint=address._replace(path=path).geturl()), version))


def provider(exporter: SpanExporter, version: str) -> TracerProvider:
    """A provider of this endpoint alone, never OpenTelemetry's global one."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": "homestill", "service.version": version})
    made = TracerProvider(resource=resource, shutdown_on_exit=False)
    made.add_span_processor(BatchSpanProcessor(exporter))
    return made


def _parent(traceparent: str | None) -> Context | None:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found = {"traceparent": traceparent} if traceparent else {}
    return TraceContextTextMapPropagator().extract(found, Context())


def _attributes(entry: Entry, operation: str) -> dict[str, Any]:
    """Without those that are not known: an attribute cannot be None."""
    first = entry.first_token_ms
    values = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDERS.get(entry.route or ""),
        "gen_ai.request.model": entry.asked,
        "gen_ai.response.model": entry.model,
        "gen_ai.response.time_to_first_chunk": None if first is None else first / 1000,
        "gen_ai.usage.input_tokens": entry.prompt_tokens,
        "gen_ai.usage.output_tokens": entry.completion_tokens,
        "http.response.status_code": entry.status,
        "error.type": str(entry.status) if entry.status >= 400 else None,
        "homestill.request_id": entry.id,
        "homestill.endpoint": entry.endpoint,
        "homestill.task": entry.task,
        "homestill.route": entry.route,
        "homestill.reason": entry.reason,
        "homestill.strategy": entry.strategy,
        "homestill.confidence": entry.confidence,
        "homestill.threshold": entry.threshold,
        "homestill.guarantee": entry.guarantee,
        "homestill.degraded": entry.degraded,
        "homestill.release": entry.release,
        "homestill.cost_usd": entry.cost_usd,
        "homestill.overhead_ms": entry.overhead_ms,
        "homestill.audit": entry.audit,
    }
    return {name: value for name, value in values.items() if value is not None}

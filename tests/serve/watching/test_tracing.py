"""Spans with the names of the gen_ai conventions, made when a request has ended."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from serve.errors import SettingsError
from serve.records.entry import Entry
from serve.watching.tracing import Tracing, provider, to_collector
from tests.serve.watching.site_support import THRESHOLD, by_teacher, entry

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def span_of(seen: Entry, traceparent: str | None = None) -> ReadableSpan:
    exporter = InMemorySpanExporter()
    made = provider(exporter, "1.2")
    tracing = Tracing(made)
    tracing.observe(seen, traceparent)
    assert made.force_flush()
    (span,) = exporter.get_finished_spans()
    tracing.close()
    return span


def test_a_local_answer() -> None:
    span = span_of(entry())
    assert (span.name, span.kind) == ("chat tickets", SpanKind.SERVER)
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.provider.name"] == "homestill"
    assert attributes["gen_ai.request.model"] == "tickets"
    assert attributes["gen_ai.response.model"] == "tickets:1a2b3c4d"
    assert attributes["gen_ai.usage.input_tokens"] == 300
    assert attributes["gen_ai.usage.output_tokens"] == 20
    assert attributes["homestill.confidence"] == 0.93 and attributes["homestill.threshold"] == THRESHOLD
    assert attributes["homestill.route"] == "local" and attributes["homestill.reason"] == "confident"
    assert "secret" not in str(attributes)
    assert span.resource.attributes["service.name"] == "homestill"


def test_it_lasted_as_long_as_the_request() -> None:
    span = span_of(entry(latency_ms=500.0))
    assert span.end_time is not None and span.start_time is not None
    assert span.end_time - span.start_time == 500_000_000
    assert span.start_time == 1_795_212_900 * 10**9


def test_the_clients_trace_is_joined() -> None:
    span = span_of(entry(), PARENT)
    assert span.parent is not None and span.parent.is_remote
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"


@pytest.mark.parametrize("header", [None, "", "nonsense", "00-0-0-01"])
def test_without_a_trace_of_the_clients_it_is_its_own(header: str | None) -> None:
    assert span_of(entry(), header).parent is None


@pytest.mark.parametrize(
    ("seen", "status", "kind"),
    [
        (entry(status=503, route=None, reason=None), StatusCode.ERROR, "503"),
        (entry(status=404, route=None, reason=None), StatusCode.UNSET, "404"),
        (by_teacher(), StatusCode.UNSET, None),
    ],
)
def test_failures_are_marked(seen: Entry, status: StatusCode, kind: str | None) -> None:
    span = span_of(seen)
    assert span.status.status_code is status
    assert (span.attributes or {}).get("error.type") == kind


def test_other_dialects_and_audits() -> None:
    assert span_of(entry(endpoint="completions")).name == "text_completion tickets"
    assert span_of(by_teacher(endpoint="audit")).kind is SpanKind.INTERNAL


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An OTLP collector's address, and what it was sent."""
    received: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_reach_a_collector(collector: tuple[str, list[tuple[str, bytes]]]) -> None:
    address, received = collector
    tracing = to_collector(address, "1.2")
    tracing.observe(entry())
    tracing.close()
    ((path, body),) = received
    sent = ExportTraceServiceRequest.FromString(body)
    assert path == "/v1/traces"
    assert sent.resource_spans[0].scope_spans[0].spans[0].name == "chat tickets"


@pytest.mark.parametrize("endpoint", ["localhost:4318", "file:///etc/passwd", "http://"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="use the URL of a collector"):
        to_collector(endpoint, "1")


def test_without_opentelemetry_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"pip install 'homestill\[tracing\]'"):
        to_collector("http://127.0.0.1:4318", "1")

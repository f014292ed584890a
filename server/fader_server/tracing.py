"""Spans of requests, sent by OpenTelemetry where the settings ask for it. Else it is never loaded.

Names of attributes: OpenTelemetry's semantic conventions for HTTP servers and generative AI, and
`fader.` for what those have no word for. No texts, no keys.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, Any

from fader_server.api.edge import NO_ROUTE
from fader_server.api.trace import Answered, Parent, Spans
from fader_server.errors import ConfigInvalid

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

_ATTRIBUTES = {
    "method": "http.request.method",
    "route": "http.route",
    "n": "gen_ai.request.choice.count",
    "status": "http.response.status_code",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
}
"""Fields of the log that the conventions have a name for; others are `fader.` and their own."""
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
}
_UNTOLD = ("/health", "/ready", "/metrics")
_FAULTS = ("error", "timeout", "stalled")
"""Ends of a call after its status was sent."""
_LAST_SECONDS = 5.0
"""What is not delivered in so many, when the server ends, is lost."""


@contextmanager
def open_spans(endpoint: str | None, *, version: str) -> Iterator[Spans | None]:
    """Spans that go to an OTLP/HTTP endpoint in batches, from a thread; None without one.

    Sampling, headers, the service's name and the like are OpenTelemetry's own OTEL_ variables.

    Raises ConfigInvalid where its packages are not installed.
    """
    if endpoint is None:
        yield None
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigInvalid(
            "--otlp-traces-endpoint needs packages that are not installed: "
            "pip install 'fader[tracing]'"
        ) from None
    with exporting(OTLPSpanExporter(endpoint, timeout=_LAST_SECONDS), version=version) as spans:
        yield spans


@contextmanager
def exporting(exporter: "SpanExporter", *, version: str) -> Iterator[Spans]:
    """Spans that `exporter` takes in batches, the last ones at the end."""
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({SERVICE_VERSION: version})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "fader"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield RequestSpans(provider.get_tracer("fader", version))
    finally:
        last = Thread(target=provider.shutdown, daemon=True)
        last.start()
        last.join(_LAST_SECONDS)


class RequestSpans:
    """One span of a server for every request but probes."""

    def __init__(self, tracer: "Tracer") -> None:
        self._tracer = tracer

    def add(self, answered: Answered, parent: Parent | None) -> tuple[str, str] | None:
        from opentelemetry.trace import (
            SpanKind,
            Status,
            StatusCode,
            format_span_id,
            format_trace_id,
        )

        fields = answered.fields
        if fields["route"] in _UNTOLD:
            return None
        span = self._tracer.start_span(
            _name(fields),
            context=_under(parent),
            kind=SpanKind.SERVER,
            attributes=_attributes(fields),
            start_time=answered.began,
        )
        fault = _fault(fields)
        if fault:
            span.set_attribute("error.type", fault)
            span.set_status(Status(StatusCode.ERROR))
        span.end(answered.ended)
        known = span.get_span_context()
        return format_trace_id(known.trace_id), format_span_id(known.span_id)


def _name(fields: Mapping[str, Any]) -> str:
    operation, model = _OPERATIONS.get(fields["route"]), fields.get("adapter")
    if operation is not None:
        return f"{operation} {model}" if model else operation
    return (
        fields["method"] if fields["route"] == NO_ROUTE else f"{fields['method']} {fields['route']}"
    )


def _attributes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds instead of milliseconds, as the conventions have it; nothing that is unknown."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "ms" or value is None or value in ([], NO_ROUTE):  # ms: the span's own length
            continue
        if name.endswith("_ms"):
            found[f"fader.{name.removesuffix('_ms')}_seconds"] = value / 1000
        else:
            found[_ATTRIBUTES.get(name, f"fader.{name}")] = value
    operation = _OPERATIONS.get(fields["route"])
    if operation is not None:
        found["gen_ai.operation.name"] = operation
        found["gen_ai.provider.name"] = "fader"
        if fields.get("adapter"):
            found["gen_ai.response.model"] = fields["adapter"]
    return found


def _fault(fields: Mapping[str, Any]) -> str | None:
    if fields["status"] >= 500:
        return str(fields["status"])
    return fields["outcome"] if fields.get("outcome") in _FAULTS else None


def _under(parent: Parent | None) -> "Context":
    from opentelemetry.context import Context
    from opentelemetry.trace import (
        NonRecordingSpan,
        SpanContext,
        TraceFlags,
        TraceState,
        set_span_in_context,
    )

    if parent is None:
        return Context()
    return set_span_in_context(
        NonRecordingSpan(
            SpanContext(
                int(parent.trace_id, 16),
                int(parent.span_id, 16),
                is_remote=True,
                trace_flags=TraceFlags(parent.flags & TraceFlags.SAMPLED),
                trace_state=TraceState.from_header([parent.state]),
            )
        ),
        Context(),
    )

"""Spans for OpenTelemetry: one a request, and one for each stage of the answer that took longest.

Imported only where spans are asked for: the packages are an extra.
"""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from slr_core._version import __version__

from .access_log import AccessLogEntry


def tracer(endpoint: str, model: str) -> Callable[[AccessLogEntry], None]:
    """What sends the spans of a request that has ended to a collector, in the background.

    Args:
        endpoint: of the collector, OTLP over HTTP.
        model: the checkpoint's name.
    """
    provider = TracerProvider(resource=Resource.create({"service.name": "slr", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return spans(provider, model)


def spans(provider: TracerProvider, model: str) -> Callable[[AccessLogEntry], None]:
    """The same for a provider that exists already."""
    made = provider.get_tracer("slr", __version__)
    context = TraceContextTextMapPropagator()

    def record(entry: AccessLogEntry) -> None:
        parent = context.extract({"traceparent": entry.traceparent} if entry.traceparent else {})
        span = made.start_span(f"{entry.method} {entry.path}", parent, SpanKind.SERVER, start_time=entry.began_ns)
        span.set_attributes(_attributes(entry, model))
        if entry.status >= 500:
            span.set_status(StatusCode.ERROR, entry.stats.error)
        timings = entry.stats.timings
        if timings is not None:
            # The end of the answer is the end of the request, but for what it takes to send it.
            at = entry.began_ns + round(1e9 * max(0.0, entry.duration_s - timings.total_s))
            inside = set_span_in_context(span)
            for stage in ("queue", "prefill", "loop", "decode"):
                ends = at + round(1e9 * getattr(timings, f"{stage}_s"))
                made.start_span(stage, inside, start_time=at).end(ends)
                at = ends
        span.end(entry.began_ns + round(1e9 * entry.duration_s))

    return record


def _attributes(entry: AccessLogEntry, model: str) -> dict[str, AttributeValue]:
    stats = entry.stats
    attributes: dict[str, AttributeValue] = {
        "http.request.method": entry.method,
        "url.path": entry.path,
        "http.response.status_code": entry.status,
        "slr.request_id": entry.request_id,
        "gen_ai.request.model": stats.loop_set or model,
        "slr.answers": stats.answers,
    }
    if stats.results:
        attributes |= {
            "gen_ai.usage.input_tokens": sum(result.prompt_tokens for result in stats.results),
            "gen_ai.usage.output_tokens": sum(result.completion_tokens for result in stats.results),
            "gen_ai.response.finish_reasons": [result.finish_reason for result in stats.results],
            "slr.iterations": [result.iterations for result in stats.results],
            "slr.exit_reasons": [result.exit_reason for result in stats.results],
            "slr.budget_reduced": stats.reduced,
        }
    return attributes

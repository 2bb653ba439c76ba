"""Request spans for OpenTelemetry. Imported only if spans are enabled: the packages are the extra ``otel``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, StatusCode
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slr_core._version import __version__

from .metrics import ENDPOINTS
from .request_stats import RequestStats, request_stats

_NOT_TRACED = rf"^(?!\w+://[^/]*({'|'.join(map(re.escape, ENDPOINTS))})(\?|$))"
"""Regular expression for the URLs of all other endpoints."""


def exporting_provider(endpoint: str) -> TracerProvider:
    """A tracer provider that sends spans to a collector, in the background.

    Args:
        endpoint: the collector's URL, OTLP over HTTP.
    """
    provider = TracerProvider(resource=Resource.create({"service.name": "slr", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Tracing:
    """Records a span for each request to one of :data:`slr_server.observability.metrics.ENDPOINTS`.

    The outermost middleware: :class:`slr_server.middleware.RequestContext` runs inside.

    Args:
        provider: takes the spans.
    """

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        # The stable names of HTTP attributes, such as http.response.status_code.
        os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
        self._traced: ASGIApp = OpenTelemetryMiddleware(
            _SpanAttributes(app),
            excluded_urls=_NOT_TRACED,
            server_request_hook=_keep_span,
            tracer_provider=provider,
            exclude_spans=["receive", "send"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await self._traced(scope, receive, send)


_SPAN = "slr_span"


def _keep_span(span: Span, scope: dict[str, Any]) -> None:
    scope.setdefault("state", {})[_SPAN] = span


class _SpanAttributes:
    """Sets the attributes of a request's span from its statistics, before the span ends: it ends with the response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        span: Span | None = scope.get("state", {}).get(_SPAN)
        if span is None:
            await self.app(scope, receive, send)
            return
        stats = request_stats(scope)

        async def respond(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                _annotate(span, stats)
            await send(message)

        try:
            await self.app(scope, receive, respond)
        finally:
            if span.is_recording():  # the response did not end: the client disconnected, or a stream failed
                _annotate(span, stats)


def _annotate(span: Span, stats: RequestStats) -> None:
    span.set_attributes(dict(_attributes(stats)))
    if stats.status is not None:
        span.set_attribute("http.response.status_code", stats.status)
        if stats.status >= 500:
            span.set_status(StatusCode.ERROR, stats.error)


def _attributes(stats: RequestStats) -> Iterator[tuple[str, AttributeValue]]:
    results, timings = stats.results, stats.timings
    yield "slr.request_id", stats.request_id
    yield "slr.answers", stats.answers
    if stats.loop_set is not None:
        yield "gen_ai.request.model", stats.loop_set
    if stats.error is not None:
        yield "error.type", stats.error
    if timings is not None:
        yield "gen_ai.usage.input_tokens", sum(result.prompt_tokens for result in results)
        yield "gen_ai.usage.output_tokens", sum(result.completion_tokens for result in results)
        yield "gen_ai.response.finish_reasons", [result.finish_reason for result in results]
        yield "slr.iterations", [result.iterations for result in results]
        yield "slr.exit_reasons", [result.exit_reason for result in results]
        yield "slr.budget_reduced", stats.reduced
        for name, seconds in vars(timings).items():
            yield f"slr.{name}", seconds

"""What is measured, in Prometheus' conventions: base units, bounded labels, every label set there from the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import get_args

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from server.errors import CLIENT_CLOSED_REQUEST
from slr_core._version import __version__
from slr_core.generation import Result
from slr_core.loop.convergence import ExitReason

ENDPOINTS = ("/generate", "/trace")
"""The paths whose requests are counted: those that ask the model for something."""

STATUSES = ("ok", "rejected", "cancelled", "timeout", "error")
REJECTIONS = {413: "too_large", 429: "queue_full", 503: "unavailable"}
INVALID = "invalid"
STAGES = ("queue", "prefill", "loop", "decode", "total")

# From a model of a millisecond to the longest request anyone waits for.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ITERATIONS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64)
_RESIDUAL = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.3, 0.5, 1, 3, 10)
_CONTRACTION = (0.25, 0.5, 0.75, 0.9, 0.95, 1, 1.05, 1.1, 1.5, 2, 5)
_LABELLED_ITERATIONS = 16
_LATER = f"over_{_LABELLED_ITERATIONS}"


class Metrics:
    """All metrics of one server, in a registry of their own.

    Args:
        model: the checkpoint's name.
        queued: answers that wait for the engine now.
        in_flight: answers that the engine computes now.
    """

    def __init__(self, model: str, queued: Callable[[], float], in_flight: Callable[[], float]) -> None:
        # A _created sample beside every series doubles the page, and nothing here reads it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        build = Gauge(
            "slr_build_info", "Versions and model; always 1", ("version", "torch", "model"), registry=registry
        )
        build.labels(__version__, torch.__version__, model).set(1)

        self._requests = Counter(
            "slr_requests_total", "HTTP requests by outcome", ("endpoint", "status"), registry=registry
        )
        _initialise(self._requests, ((endpoint, status) for endpoint in ENDPOINTS for status in STATUSES))
        self._rejections = Counter("slr_rejections_total", "HTTP requests refused", ("reason",), registry=registry)
        _initialise(self._rejections, ((reason,) for reason in (INVALID, *REJECTIONS.values())))
        Gauge("slr_requests_queued", "Answers that wait for the engine", registry=registry).set_function(queued)
        Gauge("slr_requests_in_flight", "Answers being computed", registry=registry).set_function(in_flight)

        self._iterations = Histogram(
            "slr_loop_iterations", "Iterations of a loop", buckets=_ITERATIONS, registry=registry
        )
        self._exits = Counter("slr_loop_exits_total", "Loops ended, by reason", ("reason",), registry=registry)
        _initialise(self._exits, ((reason,) for reason in get_args(ExitReason)))
        self._residual = Histogram(
            "slr_loop_residual_ratio",
            "Relative change of the state in an iteration",
            ("iteration",),
            buckets=_RESIDUAL,
            registry=registry,
        )
        _initialise(self._residual, ((str(t),) for t in (*range(1, _LABELLED_ITERATIONS + 1), _LATER)))
        self._contraction = Histogram(
            "slr_loop_contraction_ratio",
            "Length of a step over that of the step before; above 1 the loop expands",
            buckets=_CONTRACTION,
            registry=registry,
        )
        self._nonfinite = Counter("slr_nonfinite_total", "Loops that met a state that is not finite", registry=registry)
        self._row_iterations = Counter("slr_loop_row_iterations_total", "Iterations of all loops", registry=registry)
        self._prompt_tokens = Counter("slr_prompt_tokens_total", "Prompt tokens of answers", registry=registry)
        self._generated_tokens = Counter("slr_generated_tokens_total", "Tokens written", registry=registry)
        self._durations = {
            stage: Histogram(
                f"slr_request_{stage}_duration_seconds",
                "Time of an answer from its arrival" if stage == "total" else f"Time of an answer in the stage {stage}",
                buckets=_SECONDS,
                registry=registry,
            )
            for stage in STAGES
        }

    def answered(self, endpoint: str, http_status: int) -> None:
        """Count one HTTP request to one of :data:`ENDPOINTS`."""
        status = outcome(http_status)
        self._requests.labels(endpoint, status).inc()
        if status == "rejected":
            self._rejections.labels(REJECTIONS.get(http_status, INVALID)).inc()

    def record(self, result: Result) -> None:
        """Take in one finished answer."""
        self._iterations.observe(result.iterations)
        self._exits.labels(result.exit_reason).inc()
        self._row_iterations.inc(result.iterations)
        self._prompt_tokens.inc(result.prompt_tokens)
        self._generated_tokens.inc(result.completion_tokens)
        for record in result.records:
            if record.relative_change is not None:
                label = str(record.t) if record.t <= _LABELLED_ITERATIONS else _LATER
                self._residual.labels(label).observe(record.relative_change)
            if record.contraction is not None:
                self._contraction.observe(record.contraction)
        if any(record.norm is None for record in result.records):
            self._nonfinite.inc()
        for stage, histogram in self._durations.items():
            histogram.observe(getattr(result.timings, f"{stage}_s"))


def outcome(http_status: int) -> str:
    """The status label of an HTTP status."""
    if http_status < 400:
        return "ok"
    if http_status == CLIENT_CLOSED_REQUEST:
        return "cancelled"
    if http_status == 504:
        return "timeout"
    return "rejected" if http_status < 500 or http_status in REJECTIONS else "error"


def _initialise(metric: Counter | Histogram, label_sets: Iterable[tuple[str, ...]]) -> None:
    # rate() misses the first event of a series that did not exist before it.
    for labels in label_sets:
        metric.labels(*labels)

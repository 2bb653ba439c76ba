"""Metrics in Prometheus' conventions: base units, bounded labels, every series present from the start.

Requests, loops and steps are recorded when they end. The engine's own counters are read at each scrape, at no cost to a
step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
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
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slr_core._version import __version__
from slr_core.engine import Engine, EngineCounters, StepStats
from slr_core.types import ExitReason, Request, Result

from ..errors import CLIENT_CLOSED_REQUEST

ENDPOINTS = ("/generate", "/trace", "/v1/completions", "/v1/chat/completions")
"""The paths whose requests are counted: those that run the model."""

STATUSES = ("ok", "rejected", "cancelled", "timeout", "error")
REJECTIONS = {
    401: "unauthorized",
    403: "unauthorized",
    408: "too_slow",
    413: "too_large",
    429: "queue_full",
    503: "unavailable",
}
INVALID = "invalid"
STAGES = ("queue", "prefill", "loop", "decode", "total")

# From a tiny model to the longest request timeout. A step is a part of a request.
_REQUEST_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
_STEP_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_ITERATIONS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64)
_RESIDUAL = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.2, 1.5, 2, 3, 10)
_CONTRACTION = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1, 1.05, 1.1, 1.5, 2, 5)
_NORM = (0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000)
LABELLED_ITERATIONS = 16
"""Iterations with a label of their own; later ones share one label."""
_OVER = f"over_{LABELLED_ITERATIONS}"


class Metrics:
    """All metrics of one server, in a registry of its own.

    Args:
        model: name of the served model.
    """

    def __init__(self, model: str) -> None:
        # A _created sample for every series would double the size of a scrape, and is not used.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        build = Gauge(
            "slr_build_info", "Versions and model; always 1", ("version", "torch", "model"), registry=registry
        )
        build.labels(__version__, torch.__version__, model).set(1)
        self._engine = _EngineCollector()
        registry.register(self._engine)

        def counter(name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(name, documentation, labels, registry=registry)

        def histogram(name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, documentation, buckets=buckets, registry=registry)

        def by_iteration(name: str, documentation: str, buckets: Sequence[float]) -> list[Histogram]:
            histogram = Histogram(name, documentation, ("iteration",), buckets=buckets, registry=registry)
            return [histogram.labels(t) for t in (*map(str, range(1, LABELLED_ITERATIONS + 1)), _OVER)]

        self._requests = counter("slr_requests_total", "HTTP requests by outcome", ("endpoint", "status"))
        _initialise(self._requests, ((endpoint, status) for endpoint in ENDPOINTS for status in STATUSES))
        self._rejections = counter("slr_rejections_total", "Refused HTTP requests", ("reason",))
        _initialise(self._rejections, ((reason,) for reason in {INVALID, *REJECTIONS.values()}))
        self._in_flight = Gauge("slr_requests_in_flight", "HTTP requests in progress", registry=registry)

        self._connections = Gauge("slr_connections", "Open connections", registry=registry)
        self._refused_connections = counter(
            "slr_refused_connections_total", "Connections that were closed at once, because there were too many"
        )

        self._reduced = counter("slr_budget_reductions_total", "Answers whose iteration budget was reduced under load")
        self._iterations = histogram("slr_loop_iterations", "Iterations of a finished loop", _ITERATIONS)
        exits = counter(
            "slr_loop_exits_total",
            "Answers by the exit reason of their loop; cancelled: the request was dropped, waiting or running",
            ("reason",),
        )
        self._exits = {reason: exits.labels(reason) for reason in (*get_args(ExitReason), "cancelled")}
        self._saved = counter(
            "slr_loop_saved_iterations_total", "Iterations that converged loops left unused of their maximum"
        )
        self._residual = by_iteration(
            "slr_loop_residual_ratio", "Relative change of the state in an iteration", _RESIDUAL
        )
        self._contraction = by_iteration(
            "slr_loop_contraction_ratio",
            "Length of an iteration's step over that of the previous one; above 1 the loop expands",
            _CONTRACTION,
        )
        self._norm = by_iteration("slr_hidden_state_norm", "Norm of the state after an iteration", _NORM)
        self._prompt_tokens = counter("slr_prompt_tokens_total", "Prompt tokens of finished answers")
        self._durations = {
            stage: histogram(
                f"slr_request_{stage}_duration_seconds",
                "Time of an answer from its arrival" if stage == "total" else f"Time of an answer in stage {stage}",
                _REQUEST_S,
            )
            for stage in STAGES
        }
        self._first_token = histogram(
            "slr_time_to_first_token_seconds", "Time of an answer from its arrival to its first token", _REQUEST_S
        )

        self._step = histogram("slr_step_duration_seconds", "Time of an engine step", _STEP_S)
        self._rows = histogram("slr_step_rows", "Answers in an engine step", _ROWS)
        self._iteration = histogram(
            "slr_iteration_duration_seconds", "Time of an engine step with at least one loop iteration", _STEP_S
        )
        self._iteration_rows = histogram("slr_iteration_rows", "Loop iterations in such a step", _ROWS)

    # -- requests over HTTP ------------------------------------------------------------------------

    def request_started(self) -> None:
        """Record the start of an HTTP request to one of :data:`ENDPOINTS`; :meth:`request_finished` must follow."""
        self._in_flight.inc()

    def request_finished(self, endpoint: str, http_status: int) -> None:
        """Count the request by its outcome."""
        self._in_flight.dec()
        status = outcome(http_status)
        self._requests.labels(endpoint, status).inc()
        if status == "rejected":
            self._rejections.labels(REJECTIONS.get(http_status, INVALID)).inc()

    def watch_lags(self, tokenizer: Callable[[], float], event_loop: Callable[[], float]) -> None:
        """Read the delays of the tokenizer and of the event loop, in seconds, at each scrape."""
        for name, documentation, read in (
            ("slr_tokenizer_lag_seconds", "Age of the oldest request that is not tokenized yet", tokenizer),
            ("slr_event_loop_lag_seconds", "Longest delay of the event loop in the last 5 to 10 s", event_loop),
        ):
            Gauge(name, documentation, registry=self.registry).set_function(read)

    def watch_connections(self, count: Callable[[], int]) -> None:
        """Read the number of open connections at each scrape."""
        self._connections.set_function(count)

    def connection_refused(self) -> None:
        """Count a connection that was closed at once."""
        self._refused_connections.inc()

    def request_refused(self, http_status: int) -> None:
        """Count a request that was refused before its path was known."""
        self._rejections.labels(REJECTIONS.get(http_status, INVALID)).inc()

    def budget_reduced(self, answers: int) -> None:
        """Count answers whose iteration budget was reduced under load."""
        self._reduced.inc(answers)

    # -- answers -----------------------------------------------------------------------------------

    def record(self, request: Request, future: Future[Result]) -> None:
        """Record a request of the engine whose future is done. Thread-safe."""
        if future.cancelled():
            self._exits["cancelled"].inc()
        elif future.exception() is None:
            self._record_result(request, future.result())

    def _record_result(self, request: Request, result: Result) -> None:
        # In the workspace `token`, every token has a loop of its own; the prompt runs all iterations and saves none.
        for iterations in result.iterations_per_token or (result.iterations,):
            self._iterations.observe(iterations)
        self._exits[result.exit_reason].inc()
        if result.iterations_per_token:
            if result.exit_reason != "diverged":
                left = (request.loop.max_iterations - iterations for iterations in result.iterations_per_token[1:])
                self._saved.inc(sum(left))
        elif result.exit_reason == "converged":
            self._saved.inc(request.loop.max_iterations - result.iterations)
        self._prompt_tokens.inc(result.prompt_tokens)
        for record in result.records:
            i = min(record.t - 1, LABELLED_ITERATIONS)
            if record.relative_change is not None:
                self._residual[i].observe(record.relative_change)
            if record.contraction is not None:
                self._contraction[i].observe(record.contraction)
            if record.norm is not None:
                self._norm[i].observe(record.norm)
        for stage, histogram in self._durations.items():
            histogram.observe(getattr(result.timings, f"{stage}_s"))
        self._first_token.observe(result.first_token_s)

    # -- the engine --------------------------------------------------------------------------------

    def watch(self, engine: Engine) -> None:
        """Read this engine's counters at each scrape."""
        self._engine.engine = engine

    def record_step(self, step: StepStats) -> None:
        """Record a step: the ``on_step`` of an engine."""
        self._step.observe(step.duration_s)
        self._rows.observe(step.rows)
        if step.iterations:
            self._iteration.observe(step.duration_s)
            self._iteration_rows.observe(step.iterations)
        self._engine.positions, self._engine.stepped_at = step.used_positions, time.time()


class _EngineCollector(Collector):
    """An engine's counters; zeros until there is an engine."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.positions = 0
        self.stepped_at = 0.0

    def collect(self) -> Iterator[Metric]:
        engine = self.engine
        counters = EngineCounters() if engine is None else engine.counters
        for name, documentation, count in (
            ("slr_loop_row_iterations", "Loop iterations of all answers", counters.iterations),
            (
                "slr_wasted_row_iterations",
                "Loop iterations without effect: of dropped or failed answers, or past a diverged loop's last state",
                counters.wasted_iterations,
            ),
            (
                "slr_nonfinite",
                "Loops with a state that is not finite; their answers count as diverged exits",
                counters.nonfinite,
            ),
            ("slr_generated_tokens", "Generated tokens", counters.tokens),
            ("slr_prefill_tokens", "Prompt tokens run through the model", counters.prefill_tokens),
            (
                "slr_prefix_reused_tokens",
                "Prompt tokens taken from the prefix cache",
                counters.reused_tokens,
            ),
        ):
            yield CounterMetricFamily(name, documentation, value=count)
        slots = 0 if engine is None else engine.slots
        in_use = 0 if engine is None else engine.in_flight
        positions = 0 if engine is None else engine.slots * engine.capacity
        for name, documentation, value in (
            ("slr_requests_queued", "Answers waiting for a slot", 0 if engine is None else engine.queued),
            ("slr_slots_in_use", "Answers in progress: each uses one slot", in_use),
            ("slr_slots", "Maximum number of answers in progress", slots),
            # Freed slots are only reported with the next step, so an idle engine reports 0.
            (
                "slr_kv_slots_tokens_ratio",
                "Share of the key/value cache's positions in use",
                self.positions / positions if in_use else 0.0,
            ),
            (
                "slr_engine_last_step_timestamp_seconds",
                "Time of the engine's last step; 0 before the first",
                self.stepped_at,
            ),
        ):
            yield GaugeMetricFamily(name, documentation, value=value)


def outcome(http_status: int) -> str:
    """The status label of an HTTP status."""
    if http_status < 400:
        return "ok"
    if http_status == CLIENT_CLOSED_REQUEST:
        return "cancelled"
    if http_status == 504:
        return "timeout"
    return "rejected" if http_status < 500 or http_status in REJECTIONS else "error"


def _initialise(metric: Counter, label_sets: Iterable[tuple[str, ...]]) -> None:
    # rate() misses the first event of a series that did not exist before.
    for labels in label_sets:
        metric.labels(*labels)

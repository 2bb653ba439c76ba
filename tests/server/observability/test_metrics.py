import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import get_args

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from slr_core.engine import Engine
from slr_core.engine.events import IterationEvent
from slr_core.errors import DeadlineError
from slr_core.types import ExitReason
from slr_server.observability.metrics import ENDPOINTS, INVALID, REJECTIONS, STATUSES, Metrics, outcome
from tests import tiny
from tests.server.conftest import sample


def scrape(client):
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(response.text)
        for s in family.samples
    }


def values(metrics):
    """All samples, by name and labels."""
    return {(s.name, *sorted(s.labels.items())): s.value for f in metrics.registry.collect() for s in f.samples}


def test_accept_with_wrong_version(client):
    response = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=x.y"})
    assert (response.status_code, response.headers["content-type"][:10]) == (200, "text/plain")


def test_initial_series():
    metrics = Metrics("tiny")
    samples = values(metrics)
    iterations = (*map(str, range(1, 17)), "over_16")
    expected = [
        *(("slr_loop_exits_total", ("reason", r)) for r in ("converged", "max_iterations", "diverged", "cancelled")),
        *(("slr_rejections_total", ("reason", r)) for r in (INVALID, *REJECTIONS.values())),
        *(("slr_requests_total", ("endpoint", e), ("status", s)) for e in ENDPOINTS for s in STATUSES),
        *(
            (f"slr_{name}_count", ("iteration", i))
            for name in ("loop_residual_ratio", "loop_contraction_ratio", "hidden_state_norm")
            for i in iterations
        ),
        *((f"slr_request_{s}_duration_seconds_count",) for s in ("queue", "prefill", "loop", "decode", "total")),
        *((f"slr_{h}_duration_seconds_count",) for h in ("step", "iteration")),
        *((f"slr_{h}_rows_count",) for h in ("step", "iteration")),
        ("slr_time_to_first_token_seconds_count",),
        ("slr_loop_iterations_count",),
        *(
            (f"slr_{c}_total",)
            for c in (
                *("loop_row_iterations", "wasted_row_iterations", "loop_saved_iterations", "nonfinite"),
                "budget_reductions",
                *("prompt_tokens", "generated_tokens", "prefill_tokens", "prefix_reused_tokens"),
            )
        ),
        *((f"slr_{g}",) for g in ("requests_queued", "requests_in_flight", "slots", "slots_in_use")),
        *((f"slr_{g}",) for g in ("kv_slots_tokens_ratio", "engine_last_step_timestamp_seconds")),
    ]
    assert {key: samples.get(key) for key in expected} == dict.fromkeys(expected, 0)
    assert len(samples) < 1500
    assert not any("_created" in name for name, *_ in samples)
    (build,) = [(labels, value) for (name, *labels), value in samples.items() if name == "slr_build_info"]
    assert build[1] == 1
    assert {name for name, _ in build[0]} == {"version", "torch", "model"}


def test_metric_names(client):
    for name, *_ in scrape(client):
        if not name.startswith("process_"):
            assert re.fullmatch(r"slr_[a-z_]+", name)


def test_request_counts(client):
    body = {"prompt": ["w1 w2", "w3"], "max_iterations": 3, "max_new_tokens": 4, "convergence": {"criterion": "fixed"}}
    before = scrape(client)
    results = client.post("/generate", json=body).json()["results"]
    client.post("/trace", json={})
    client.post("/trace", json={"prompt": "w1" * (1 << 20)})
    samples = scrape(client)
    assert samples["slr_requests_total", ("endpoint", "/generate"), ("status", "ok")] == 1
    assert samples["slr_requests_total", ("endpoint", "/trace"), ("status", "rejected")] == 2
    assert samples["slr_rejections_total", ("reason", "invalid")] == 1
    assert samples["slr_rejections_total", ("reason", "too_large")] == 1
    assert samples["slr_loop_exits_total", ("reason", "max_iterations")] == 2
    assert samples["slr_prompt_tokens_total",] == 3
    for name, grown in (("loop_row_iterations", 6), ("generated_tokens", written(results))):
        # The engine, and so its counters, outlive the client here.
        assert samples[f"slr_{name}_total",] - before[f"slr_{name}_total",] == grown
    total = sum(result["timings"]["total_s"] for result in results)
    assert samples["slr_request_total_duration_seconds_sum",] == pytest.approx(total)
    assert samples["slr_requests_queued",] == samples["slr_requests_in_flight",] == samples["slr_slots_in_use",] == 0
    assert samples["slr_slots",] == client.app.state.service.check().slots


def written(results):
    return sum(result["usage"]["completion_tokens"] for result in results)


# -- numbers -----------------------------------------------------------------------------------------------


def assert_holds(metrics, name, observed, **labels):
    """Check a histogram's count, sum and buckets against the observed values."""
    samples, wanted = values(metrics), sorted(labels.items())
    assert samples[(f"{name}_count", *wanted)] == len(observed)
    assert samples[(f"{name}_sum", *wanted)] == pytest.approx(math.fsum(observed))
    buckets = {
        dict(key[1:])["le"]: value
        for key, value in samples.items()
        if key[0] == f"{name}_bucket" and {k: v for k, v in key[1:] if k != "le"} == labels
    }
    assert buckets == {le: sum(value <= float(le) for value in observed) for le in buckets}


def test_histograms(reasoner):
    metrics, steps = Metrics("tiny"), []

    def hear(step):
        steps.append(step)
        metrics.record_step(step)

    depths = (0, 1, 1, 2, 3, 5, 5, 7, 20)
    with Engine(tiny.twin(reasoner), on_step=hear) as engine:
        metrics.watch(engine)
        asked = [tiny.request(engine.reasoner, tiny.PROMPTS[2], fixed(depth)) for depth in depths]
        asked.append(tiny.request(engine.reasoner, tiny.PROMPTS[0], {"criterion": "relative_change", "threshold": 1e6}))
        futures = [engine.submit(request) for request in asked]
        for request, future in zip(asked, futures, strict=True):
            future.add_done_callback(partial(metrics.record, request))
        results = [future.result(20) for future in futures]
    assert [result.iterations for result in results[:-1]] == list(depths)
    assert results[-1].exit_reason == "converged"

    assert_holds(metrics, "slr_loop_iterations", [result.iterations for result in results])
    for name, read in (
        ("slr_loop_residual_ratio", lambda record: record.relative_change),
        ("slr_loop_contraction_ratio", lambda record: record.contraction),
        ("slr_hidden_state_norm", lambda record: record.norm),
    ):
        for label, ts in [*((str(t), (t,)) for t in range(1, 17)), ("over_16", range(17, 65))]:
            observed = [read(record) for result in results for record in result.records if record.t in ts]
            assert_holds(metrics, name, [value for value in observed if value is not None], iteration=label)
    for stage in ("queue", "prefill", "loop", "decode", "total"):
        observed = [getattr(result.timings, f"{stage}_s") for result in results]
        assert_holds(metrics, f"slr_request_{stage}_duration_seconds", observed)
    assert_holds(metrics, "slr_time_to_first_token_seconds", [result.first_token_s for result in results])
    assert all(0 < result.first_token_s <= result.timings.total_s for result in results)

    looping = [step for step in steps if step.iterations]
    assert_holds(metrics, "slr_step_duration_seconds", [step.duration_s for step in steps])
    assert_holds(metrics, "slr_step_rows", [step.rows for step in steps])
    assert_holds(metrics, "slr_iteration_duration_seconds", [step.duration_s for step in looping])
    assert_holds(metrics, "slr_iteration_rows", [step.iterations for step in looping])

    samples = values(metrics)
    iterations = sum(result.iterations for result in results)
    assert samples["slr_loop_row_iterations_total",] == samples["slr_loop_iterations_sum",] == iterations
    assert samples["slr_wasted_row_iterations_total",] == 0
    assert samples["slr_loop_saved_iterations_total",] == asked[-1].loop.max_iterations - results[-1].iterations
    assert samples["slr_generated_tokens_total",] == sum(result.completion_tokens for result in results)
    prompts = sum(result.prompt_tokens for result in results)
    assert samples["slr_prompt_tokens_total",] == prompts
    assert samples["slr_prefill_tokens_total",] + samples["slr_prefix_reused_tokens_total",] == prompts
    assert samples["slr_prefix_reused_tokens_total",] > 0, "nine requests share a prompt"
    assert samples["slr_engine_last_step_timestamp_seconds",] > 1.7e9
    reasons = (*get_args(ExitReason), "cancelled")
    assert [samples["slr_loop_exits_total", ("reason", r)] for r in reasons] == [1, 9, 0, 0]


def fixed(depth):
    return {"max_iterations": depth, "criterion": "fixed"}


def test_non_finite_loop_counts_once(reasoner):
    broken = tiny.twin(reasoner)
    with torch.no_grad():
        broken.timestep.table[2].fill_(float("nan"))  # acts in iteration 3
    metrics = Metrics("tiny")
    with Engine(broken) as engine:
        metrics.watch(engine)
        request = tiny.request(broken, "w1", fixed(5))
        future = engine.submit(request)
        future.add_done_callback(partial(metrics.record, request))
        assert future.result(20).exit_reason == "diverged"
    samples = values(metrics)
    assert samples["slr_loop_exits_total", ("reason", "diverged")] == samples["slr_nonfinite_total",] == 1
    assert sum(value for key, value in samples.items() if key[0] == "slr_loop_exits_total") == 1
    assert_holds(metrics, "slr_loop_iterations", [3])
    assert samples["slr_wasted_row_iterations_total",] == 1
    assert samples["slr_hidden_state_norm_count", ("iteration", "3")] == 0


def test_cancelled_counts_once(reasoner):
    metrics, shown = Metrics("tiny"), {}
    ready, gone = threading.Event(), threading.Event()

    def cancel_in_loop(event):
        if isinstance(event, IterationEvent) and event.record.t == 2:
            assert ready.wait(20)
            shown.update(values(metrics))
            running.cancel()
            waiting.cancel()
            gone.set()

    with Engine(tiny.twin(reasoner), slots=1, on_step=metrics.record_step) as engine:
        metrics.watch(engine)
        request = tiny.request(engine.reasoner, "w1 w2", fixed(5))
        running = engine.submit(request, on_event=cancel_in_loop)
        waiting = engine.submit(request)
        overdue = engine.submit(request, deadline=time.monotonic())
        for future in (running, waiting, overdue):
            future.add_done_callback(partial(metrics.record, request))
        ready.set()
        with pytest.raises(DeadlineError):
            overdue.result(20)
        assert gone.wait(20)
    assert (shown["slr_slots",], shown["slr_slots_in_use",]) == (1, 1)
    assert shown["slr_requests_queued",] in (1, 2), "the overdue request is dropped by the next step"
    samples = values(metrics)
    assert samples["slr_loop_exits_total", ("reason", "cancelled")] == 2
    assert samples["slr_loop_iterations_count",] == samples["slr_prompt_tokens_total",] == 0
    assert samples["slr_wasted_row_iterations_total",] == samples["slr_loop_row_iterations_total",] == 2
    assert (samples["slr_slots_in_use",], samples["slr_requests_queued",]) == (0, 0)


def test_cache_usage(reasoner):
    metrics, seen = Metrics("tiny"), []

    def hear(step):
        metrics.record_step(step)
        seen.append(values(metrics)["slr_kv_slots_tokens_ratio",])

    with Engine(tiny.twin(reasoner), slots=2, capacity=20, on_step=hear) as engine:
        metrics.watch(engine)
        request = tiny.request(engine.reasoner, tiny.words(1, 2, 3, 4, 5), fixed(3), max_new_tokens=1)
        assert engine.submit(request).result(20)
    assert seen == [5 / 40, 6 / 40, 7 / 40, 8 / 40]
    assert values(metrics)["slr_kv_slots_tokens_ratio",] == 0


def test_requests_in_flight(gated, gate):
    client = gated()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(client.post, "/generate", json={"prompt": "w1", "n": 3, "max_new_tokens": 2})
        assert gate.reached.wait(20)
        assert sample(client, "slr_requests_in_flight") == 1
        gate.opened.set()
        assert asked.result(20).status_code == 200
    assert sample(client, "slr_requests_in_flight") == 0


@pytest.mark.parametrize(
    ("http_status", "status"),
    [
        *[(200, "ok"), (307, "ok"), (400, "rejected"), (413, "rejected"), (429, "rejected"), (503, "rejected")],
        *[(499, "cancelled"), (500, "error"), (504, "timeout")],
    ],
)
def test_outcomes(http_status, status):
    assert outcome(http_status) == status


def test_openmetrics(client):
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = client.get("/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")

import dataclasses
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics, outcome
from slr_core.generation import generate
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


def test_every_label_is_there_from_the_start(client):
    samples = scrape(client)
    expected = [
        *(("slr_loop_exits_total", ("reason", r)) for r in ("converged", "max_iterations", "diverged", "cancelled")),
        *(("slr_rejections_total", ("reason", r)) for r in ("invalid", "too_large", "queue_full", "unavailable")),
        *(
            ("slr_requests_total", ("endpoint", e), ("status", s))
            for e in ("/generate", "/trace")
            for s in ("ok", "rejected", "cancelled", "timeout", "error")
        ),
        *(("slr_loop_residual_ratio_count", ("iteration", i)) for i in (*map(str, range(1, 17)), "over_16")),
        *((f"slr_request_{s}_duration_seconds_count",) for s in ("queue", "prefill", "loop", "decode", "total")),
        ("slr_loop_iterations_count",),
        ("slr_loop_contraction_ratio_count",),
        ("slr_nonfinite_total",),
        ("slr_loop_row_iterations_total",),
        ("slr_prompt_tokens_total",),
        ("slr_generated_tokens_total",),
        ("slr_requests_queued",),
        ("slr_requests_in_flight",),
    ]
    assert {key: samples.get(key) for key in expected} == dict.fromkeys(expected, 0)
    assert len(samples) < 1500
    assert not any("_created" in name for name, *_ in samples)
    (build,) = [(labels, value) for (name, *labels), value in samples.items() if name == "slr_build_info"]
    assert build[1] == 1
    assert {name for name, _ in build[0]} == {"version", "torch", "model"}


def test_names_follow_the_conventions(client):
    for name, *_ in scrape(client):
        if not name.startswith("process_"):
            assert re.fullmatch(r"slr_[a-z_]+", name)


def test_requests_are_counted(client):
    body = {"prompt": ["w1 w2", "w3"], "max_iterations": 3, "max_new_tokens": 4, "convergence": {"criterion": "fixed"}}
    results = client.post("/generate", json=body).json()["results"]
    client.post("/trace", json={})
    client.post("/trace", json={"prompt": "w1" * (1 << 20)})
    samples = scrape(client)
    assert samples["slr_requests_total", ("endpoint", "/generate"), ("status", "ok")] == 1
    assert samples["slr_requests_total", ("endpoint", "/trace"), ("status", "rejected")] == 2
    assert samples["slr_rejections_total", ("reason", "invalid")] == 1
    assert samples["slr_rejections_total", ("reason", "too_large")] == 1
    assert samples["slr_loop_exits_total", ("reason", "max_iterations")] == 2
    assert samples["slr_loop_iterations_sum",] == samples["slr_loop_row_iterations_total",] == 6
    assert samples["slr_loop_iterations_bucket", ("le", "2.0")] == 0
    assert samples["slr_loop_iterations_bucket", ("le", "3.0")] == 2
    assert samples["slr_prompt_tokens_total",] == 3
    written = sum(result["usage"]["completion_tokens"] for result in results)
    assert samples["slr_generated_tokens_total",] == written
    for t in "123":
        assert samples["slr_loop_residual_ratio_count", ("iteration", t)] == 2
    assert samples["slr_loop_residual_ratio_count", ("iteration", "4")] == 0
    assert samples["slr_loop_contraction_ratio_count",] == 4
    total = sum(result["timings"]["total_s"] for result in results)
    assert samples["slr_request_total_duration_seconds_sum",] == pytest.approx(total)
    assert samples["slr_requests_queued",] == samples["slr_requests_in_flight",] == 0


def test_what_waits_and_runs_is_shown(gated, gate):
    client = gated()
    engine = client.app.state.service.check()
    futures = [engine.submit(tiny.request(engine.reasoner, "w1")) for _ in range(4)]
    assert gate.reached.wait(20)
    shown = sample(client, "slr_requests_queued"), sample(client, "slr_requests_in_flight")
    assert sum(shown) == 4
    assert shown[1] >= 1
    gate.opened.set()
    for future in futures:
        future.result(20)


def test_late_and_bad_iterations(reference):
    metrics = Metrics("tiny", lambda: 0, lambda: 0)
    loop = {"max_iterations": 20, "criterion": "fixed"}
    result = generate(reference, [tiny.request(reference, "w1", loop)])[0]
    last = dataclasses.replace(result.records[-1], norm=None, relative_change=None, contraction=None)
    metrics.record(dataclasses.replace(result, records=(*result.records[:-1], last), exit_reason="diverged"))
    value = metrics.registry.get_sample_value
    assert value("slr_loop_residual_ratio_count", {"iteration": "over_16"}) == 3
    assert value("slr_nonfinite_total") == 1
    assert value("slr_loop_exits_total", {"reason": "diverged"}) == 1


@pytest.mark.parametrize(
    ("http_status", "status"),
    [
        *[(200, "ok"), (307, "ok"), (400, "rejected"), (413, "rejected"), (429, "rejected"), (503, "rejected")],
        *[(499, "cancelled"), (500, "error"), (504, "timeout")],
    ],
)
def test_outcomes(http_status, status):
    assert outcome(http_status) == status


def test_openmetrics_for_those_who_ask(client):
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = client.get("/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")

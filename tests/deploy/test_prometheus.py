"""Every query of the monitoring, against a real server and a real Prometheus, after half a minute of load."""

import asyncio
import math
import re
import shutil
import socket
import subprocess
import sys
import time

import httpx
import pytest
import yaml

from slr_core.evaluation.load_generator import LoadPlan, run_load
from tests.deploy.monitoring import PROMETHEUS, alerts, metrics_of, panel_expressions, rules

pytestmark = pytest.mark.slow

LOAD_S = 30
PODS = {"namespace": "reasoning", "service": "one-slr"}
"""Labels that a ServiceMonitor gives to the pods of the release of tests/deploy/conftest.py."""
QUIET = {
    # No request of the load diverges, fails, is cancelled or has its budget reduced: these exist and are zero.
    "slr_nonfinite_total",
    "slr_wasted_row_iterations_total",
    "slr_budget_reductions_total",
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "slr_server.cli", "--port", "0", "--threads", "1", "--slots", "8"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        line = process.stdout.readline()
        assert " ready at " in line, log.read_text()
        yield line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    """A client of a Prometheus that scrapes the server with the committed configuration."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    # The committed configuration with another target, and faster, since half a minute is short.
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / "rules" / "*.yml")]
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [server.removeprefix("http://")], "labels": PODS}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            until(lambda: get(client, "/-/ready") == 200)
            yield client
    finally:
        process.kill()
        process.wait()


def get(client, path):
    try:
        return client.get(path).status_code
    except httpx.TransportError:
        return None


def until(true, seconds=60):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.1)


def query(client, expression):
    """The samples of an instant query. Fails if Prometheus refuses it."""
    reply = client.get("/api/v1/query", params={"query": expression}).json()
    assert reply["status"] == "success", f"{expression}: {reply}"
    result = reply["data"]["result"]
    return result if reply["data"]["resultType"] == "vector" else [{"metric": {}, "value": result}]


@pytest.fixture(scope="module")
def loaded(server, prometheus):
    """The report of half a minute of load, and the number of iterations that the engine had run before."""
    until(lambda: query(prometheus, 'up{job="slr"} == 1'))
    # The server runs a warm-up request before it is ready: it counts in the engine, and in no metric of answers.
    before = value(query(prometheus, "sum(slr_loop_row_iterations_total)"))
    with httpx.Client(base_url=server, timeout=60) as client:
        refused = [client.post("/generate", json={"prompt": ""}).status_code for _ in range(3)]
        traced = client.post("/trace", json={"prompt": "Is Max a rompus or lempus?", "max_iterations": 3})
        deep = {"max_iterations": 20, "convergence": {"criterion": "fixed"}}
        client.post("/generate", json={"prompt": "Is Max a rompus or lempus?", **deep})
    assert refused == [400, 400, 400]
    assert traced.status_code == 200
    report = asyncio.run(run_load(LoadPlan(server, duration_s=LOAD_S, concurrency=12)))
    assert report.to_json()["outcomes"].keys() == {"200"}
    count = len(report.requests) + 2
    until(lambda: value(query(prometheus, "sum(slr_loop_iterations_count)")) == count)
    return report, before


def evaluated(client):
    groups = client.get("/api/v1/rules").json()["data"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def value(samples):
    (sample,) = samples
    return float(sample["value"][1])


def test_panels_have_data(loaded, prometheus):
    empty, broken = [], []
    for where, expression in panel_expressions():
        # As an instant query over the load, and as the range query that a panel sends.
        expression = expression.replace("[20s]", f"[{LOAD_S}s]")
        samples = query(prometheus, expression)
        if not samples:
            empty.append(where)
        numbers = [float(sample["value"][1]) for sample in samples]
        if numbers and all(math.isnan(number) for number in numbers):
            broken.append(where)
        reply = prometheus.get(
            "/api/v1/query_range",
            params={"query": expression, "start": time.time() - LOAD_S, "end": time.time(), "step": 5},
        ).json()
        assert reply["status"] == "success", where
    assert not empty
    assert not broken, "nothing but NaN"


def test_rules_have_data(loaded, prometheus):
    assert {rule["name"] for rule in evaluated(prometheus)} == {rule.get("record") or rule["alert"] for rule in rules()}
    until(lambda: all(rule["health"] == "ok" for rule in evaluated(prometheus)))
    for rule in rules():
        samples = query(prometheus, rule["expr"])
        if "record" in rule:
            assert samples, rule["record"]
    until(lambda: all(query(prometheus, rule["record"]) for rule in rules() if "record" in rule))


def test_no_alert_fires(loaded, prometheus):
    for name, alert in alerts().items():
        assert query(prometheus, alert["expr"]) == [], name
        for metric in metrics_of(alert["expr"]):
            assert query(prometheus, metric), f"{name}: {metric}"
        for recorded in set(re.findall(r"instance:[\w:]+", alert["expr"])):
            until(lambda: query(prometheus, recorded))  # noqa: B023


def test_scaling_query(loaded, prometheus, production):
    (trigger,) = production["ScaledObject"]["spec"]["triggers"]
    scaling = trigger["metadata"]["query"]
    assert value(query(prometheus, scaling)) == 0
    peak = value(query(prometheus, f"max_over_time(({scaling})[2m:1s])"))
    assert 8 < peak <= 13, "8 slots, and 12 clients at once"
    assert query(prometheus, scaling.replace("one-slr", "other")) == [], "no such pods: not zero"


def test_metadata(loaded, prometheus):
    metadata = prometheus.get("/api/v1/metadata").json()["data"]
    for _, expression in panel_expressions():
        for name in metrics_of(expression):
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            entry = metadata.get(name) or metadata.get(family) or metadata.get(name.removesuffix("_total"))
            assert entry, name
            kind = "counter" if name.endswith("_total") else "gauge" if family == name else "histogram"
            assert entry[0]["type"] == kind, name
            assert entry[0]["help"], name


def test_values_match_the_load(loaded, prometheus):
    report, before = loaded
    iterations = {int(t): count for t, count in report.to_json()["iterations"].items()}
    iterations[3] = iterations.get(3, 0) + 1
    iterations[20] = 1
    assert value(query(prometheus, "sum(slr_loop_iterations_sum)")) == sum(t * n for t, n in iterations.items())
    for bucket in query(prometheus, "sum by (le) (slr_loop_iterations_bucket)"):
        edge = float(bucket["metric"]["le"])
        assert float(bucket["value"][1]) == sum(n for t, n in iterations.items() if t <= edge)
    asked = len(report.requests)
    assert value(query(prometheus, 'sum(slr_requests_total{status="ok"})')) == asked + 2
    assert value(query(prometheus, 'sum(slr_requests_total{status="rejected"})')) == 3
    assert value(query(prometheus, 'slr_rejections_total{reason="invalid"}')) == 3
    run = value(query(prometheus, "sum(slr_loop_row_iterations_total)"))
    assert run - before == sum(t * n for t, n in iterations.items())
    for name in QUIET:
        assert value(query(prometheus, name)) == 0
    for variable, wanted in (("slr_build_info", {"model": "prosqa"}), ('slr_build_info{model=~"prosqa"}', {})):
        (sample,) = query(prometheus, variable)
        assert sample["metric"].items() >= wanted.items()

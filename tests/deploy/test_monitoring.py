import re
import shutil
import subprocess
from importlib.metadata import version

import pytest
import yaml
from prometheus_client import generate_latest

from deploy.grafana import make
from slr_server.observability.metrics import Metrics
from tests.deploy.monitoring import (
    DASHBOARDS,
    PROMETHEUS,
    ROOT,
    RULES,
    alerts,
    dashboards,
    metrics_of,
    panel_expressions,
    panels,
    rules,
)

UNITS = {"s": "_seconds", "bytes": "_bytes"}
"""Suffixes of metric names by Grafana's unit."""


@pytest.fixture(scope="module")
def exposed():
    """Every series that a server exposes at its start, and its type."""
    return {s.name: family.type for family in Metrics("tiny").registry.collect() for s in family.samples}


def test_dashboards_are_current():
    assert {path.name: path.read_text() for path in DASHBOARDS} == make.render()


def test_panel_descriptions():
    for name, dashboard in dashboards().items():
        assert dashboard["description"]
        assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "model", "instance"]
        for panel in panels(dashboard):
            where = f"{name} / {panel['title']}"
            assert len(panel["description"]) > 20, where
            assert panel["fieldConfig"]["defaults"]["unit"], where
            assert panel["datasource"]["uid"] == "${datasource}", where
            legends = [target["legendFormat"] for target in panel["targets"]]
            assert len(set(legends)) == len(legends), where
            assert all(legends), where


def test_panel_layout():
    for name, dashboard in dashboards().items():
        taken = set()
        for panel in panels(dashboard):
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & taken, f"{name} / {panel['title']}"
            assert max(x for x, _ in cells) < 24, f"{name} / {panel['title']}"
            taken |= cells


def test_metrics_exist(exposed):
    queried = [*panel_expressions(), *((rule.get("record") or rule["alert"], rule["expr"]) for rule in rules())]
    assert len(queried) > 60
    for where, expression in queried:
        assert metrics_of(expression) <= exposed.keys(), where
        assert metrics_of(expression) or "instance:" in expression or "up{" in expression, where


def test_recorded_names():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    queried = {name for rule in rules() for name in re.findall(r"\binstance:[\w:]+", rule["expr"])}
    assert queried <= recorded
    assert recorded - queried <= {"instance:slr_loop_iterations:mean_rate5m"}, "recorded for people to look up"


def test_rates_of_counters_only(exposed):
    for where, expression in [*panel_expressions(), *((r.get("record"), r["expr"]) for r in rules())]:
        for name in metrics_of(expression):
            queried_as_rate = re.search(rf"(?:rate|increase)\({name}\b", expression) is not None
            assert queried_as_rate == (exposed[name] in ("counter", "histogram")), f"{where}: {name}"


def test_units():
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            unit = panel["fieldConfig"]["defaults"]["unit"]
            for target in panel["targets"]:
                # A quantile or a mean has the unit of the metric; other expressions are ratios or counts.
                measured = re.match(r"histogram_quantile\(.*?\((\w+)_bucket|.*?\((\w+)_sum.*/.*_count", target["expr"])
                if measured is None or "saved" in target["expr"]:
                    continue
                metric = measured.group(1) or measured.group(2)
                suffix = UNITS.get(unit)
                assert metric.endswith(suffix or metric), f"{name} / {panel['title']}: {metric} as {unit}"
                assert suffix or not metric.endswith(tuple(UNITS.values())), f"{name} / {panel['title']}"


def test_alerts_documented():
    manual = (ROOT / "docs/operations.md").read_text()
    for name, alert in alerts().items():
        paragraph = re.search(rf"^### {name}\n\n(.+?)(?=\n#|\Z)", manual, re.MULTILINE | re.DOTALL)
        assert paragraph, f"{name} has no paragraph in docs/operations.md"
        assert len(paragraph.group(1)) > 150, name
        assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["description"]
        assert alert["labels"]["severity"] in ("page", "ticket")
    assert set(re.findall(r"^### (SLR\w+)$", manual, re.MULTILINE)) == alerts().keys()


def test_alerts_tested():
    tested = (PROMETHEUS / "tests/alerts.test.yml").read_text()
    for name in alerts():
        assert re.search(rf"alertname: {name}\n\s+eval_time: \w+\n\s+exp_alerts:\n\s+- exp_labels", tested), name


def test_scrape_config():
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "slr", "the rules ask for this job"
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


@pytest.fixture(scope="module")
def promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    return found


def test_promtool_config_and_rules(promtool):
    for arguments in (
        ("check", "config", "--lint-fatal", str(PROMETHEUS / "prometheus.yml")),
        ("check", "rules", "--lint-fatal", *map(str, RULES)),
        ("test", "rules", *map(str, sorted((PROMETHEUS / "tests").glob("*.yml")))),
    ):
        run = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


def test_promtool_metric_names(promtool):
    page = generate_latest(Metrics("tiny").registry)
    run = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    assert run.stderr == b""


def test_grafana_version():
    (image,) = re.findall(r"grafana/grafana:(\d+\.\d+)\.", (ROOT / "docker/compose.yaml").read_text())
    assert version("grafana-foundation-sdk").split("!")[1].startswith(f"{image}.")

"""The PromQL expressions of every panel, rule and alert."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
PROMETHEUS = ROOT / "deploy/prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))


def dashboards() -> dict[str, dict]:
    """Every committed dashboard, by the name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in DASHBOARDS}


def panels(dashboard: dict) -> list[dict]:
    """The panels of a dashboard, without its rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def panel_expressions() -> Iterator[tuple[str, str]]:
    """The place of each query of a panel, and the query as Grafana sends it."""
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "20s").replace("$instance", ".+")
                assert "$" not in expression
                yield f"{name} / {panel['title']} / {target['legendFormat']}", expression


def rules() -> list[dict]:
    """Every recording rule and alert."""
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict]:
    """Every alert, by name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def metrics_of(expression: str) -> set[str]:
    """The metrics of the server or the process that an expression names, without recorded ones."""
    return set(re.findall(r"(?<![\w:])(?:slr|process)_\w+\b(?!:)", re.sub(r'"[^"]*"', '""', expression)))

"""The schema of the chart's values. `python -m deploy.kubernetes.make` writes it from the server's settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slr_server.settings import ServerSettings

SCHEMA = Path(__file__).parent / "slr" / "values.schema.json"
CHART_SETS = frozenset(
    {"host", "port", "config", "api_keys", "api_keys_file", "admin_key", "ssl_certfile", "ssl_keyfile"}
)
"""Settings that values cannot give: they are fixed, or secret."""

TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
MAP, LIST, TEXTS = {"type": "object"}, {"type": "array"}, {"type": "object", "additionalProperties": {"type": "string"}}


def main() -> None:
    """Write the schema."""
    SCHEMA.write_text(render(), encoding="utf-8")


def render() -> str:
    """The schema as JSON."""
    # Draft 7 is what both Helm 3 and Helm 4 read.
    return json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", **values()}, indent=2) + "\n"


def values() -> dict[str, Any]:
    """The schema of all values."""
    positive = {"type": "integer", "minimum": 1}
    return _object(
        image=_object(
            repository={"type": "string", "minLength": 1},
            digest={"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
            tag=TEXT,
            pullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
            pullSecrets=LIST,
        ),
        replicas=COUNT,
        settings=settings(),
        apiKeys=_object(secret=TEXT, file=TEXT, metricsKey=TEXT),
        adminKey=_object(secret=TEXT, key=TEXT),
        checkpoints=_object(claim=TEXT),
        resources=MAP,
        preStopSeconds=COUNT,
        startupSeconds=positive,
        service=_object(type={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}, port=positive | {"maximum": 65535}),
        autoscaling=_object(
            enabled=FLAG,
            minReplicas=positive,
            maxReplicas=positive,
            answersPerReplica=positive,
            prometheus={"type": "string", "pattern": "^https?://"},
            scaleDownSeconds=COUNT,
        ),
        disruptionBudget=_object(maxUnavailable={"type": ["integer", "string"]}),
        networkPolicy=_object(enabled=FLAG, egress=LIST, **{"from": LIST}),
        monitoring=_object(
            serviceMonitor=FLAG,
            rules=FLAG,
            dashboards=FLAG,
            labels=TEXTS,
            interval={"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
        ),
        nodeSelector=TEXTS,
        tolerations=LIST,
        affinity=MAP,
        podAnnotations=TEXTS,
        **{"global": MAP},  # Helm adds it to the values of every chart
    )


def settings() -> dict[str, Any]:
    """The schema of the server's settings that values can give."""
    generated = ServerSettings.model_json_schema()
    properties = {
        name: {key: value for key, value in field.items() if key != "title"}
        for name, field in generated["properties"].items()
        if name not in CHART_SETS
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


if __name__ == "__main__":
    main()

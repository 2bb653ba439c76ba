"""The log's lines, and the spans that say the same to a collector."""

import json
import logging
import re
import sys

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from slr_core._install import install_command
from slr_core.errors import ConfigError
from slr_server.app import create_app
from slr_server.observability import access_log as log
from slr_server.observability.tracing import spans
from slr_server.settings import Settings

BODY = {"prompt": ["w1", "w2 w3"], "max_new_tokens": 2}


@pytest.fixture
def lines(capsys):
    """What a logger set up by the settings writes."""
    root, made = logging.getLogger(), []
    level = root.level

    def configure(**settings):
        made.append(log.handler(Settings(**settings)))
        root.addHandler(made[0])
        root.setLevel(logging.INFO)
        return lambda: capsys.readouterr().err.splitlines()

    yield configure
    root.removeHandler(made[0])
    root.setLevel(level)


def test_one_line_of_json_a_request(client, lines):
    read = lines(log_format="json")
    client.post("/generate", json=BODY, headers={"x-request-id": "one"})
    client.post("/generate", json={"prompt": ""}, headers={"x-request-id": "two"})
    client.get("/livez")
    one, two = (entry for line in read() if (entry := json.loads(line))["logger"] == "slr.access")
    assert (one["request_id"], one["status"], one["answers"], one["prompt_tokens"]) == ("one", 200, 2, 3)
    assert len(one["iterations"]) == len(one["exit_reasons"]) == 2
    assert {"queue_s", "prefill_s", "loop_s", "decode_s", "total_s", "duration_s", "time", "level"} <= set(one)
    assert (two["request_id"], two["status"], two["error"]) == ("two", 400, "invalid_value")


def test_one_line_of_text_a_request(client, lines):
    read = lines()
    client.post("/generate", json={**BODY, "stream": True}, headers={"x-request-id": "one"})
    client.get("/a%0Ab%20c")
    one, two = (line for line in read() if "slr.access" in line)
    assert "request_id=one" in one
    assert "method=POST path=/generate status=200" in one
    assert "stream=true" in one
    assert "path=/a%0Ab%20c status=404" in two


def test_an_error_is_one_line_too(lines):
    read = lines(log_format="json")
    try:
        raise ValueError("a\nb")
    except ValueError:
        logging.getLogger("x").exception("failed")
    (line,) = read()
    entry = json.loads(line)
    assert entry["message"] == "failed"
    assert "ValueError" in entry["exception"]


def test_timing_headers(client):
    timing = client.post("/generate", json=BODY).headers["server-timing"]
    assert [part.split(";dur=")[0] for part in timing.split(", ")] == ["queue", "prefill", "loop", "decode", "total"]
    assert all(float(part.split("=")[1]) >= 0 for part in timing.split(", "))
    assert "server-timing" not in client.get("/livez").headers


def test_spans(engine):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(Settings(), engine)
    app.user_middleware[0].kwargs["trace"] = spans(provider, "tiny")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with TestClient(app) as client:
        client.post("/generate", json=BODY, headers={"x-request-id": "one", "traceparent": parent})
        client.get("/livez")
    *stages, request = exporter.get_finished_spans()
    assert [stage.name for stage in stages] == ["queue", "prefill", "loop", "decode"]
    assert request.name == "POST /generate"
    assert f"{request.context.trace_id:032x}" in parent
    assert f"{request.parent.span_id:016x}" in parent
    assert request.attributes["slr.request_id"] == "one"
    assert len(request.attributes["slr.iterations"]) == 2
    assert all(stage.parent.span_id == request.context.span_id for stage in stages)
    assert all(request.start_time <= s.start_time <= s.end_time <= request.end_time + 1_000_000 for s in stages)


def test_spans_need_their_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "slr_server.observability.tracing", None)
    with pytest.raises(ConfigError, match=re.escape(install_command("otel"))):
        create_app(Settings(otel_endpoint="http://localhost:4318/v1/traces"))

"""Log lines and spans."""

import json
import logging
import re
import sys

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.middleware import Middleware

from slr_core._install import install_command
from slr_core.errors import ConfigError
from slr_server.app import create_app
from slr_server.observability import access_log as log
from slr_server.observability.tracing import Tracing
from slr_server.settings import ServerSettings

BODY = {"prompt": ["w1", "w2 w3"], "max_new_tokens": 2}


@pytest.fixture
def lines(capsys):
    """Installs the log handler of some settings; returns what reads its lines."""
    root, made = logging.getLogger(), []
    level = root.level

    def configure(**settings):
        made.append(log.log_handler(ServerSettings(**settings), lambda data: print(data.decode(), file=sys.stderr)))
        root.addHandler(made[0])
        root.setLevel(logging.INFO)

        def read():
            made[0].flush()
            return list(filter(None, capsys.readouterr().err.splitlines()))

        return read

    yield configure
    root.removeHandler(made[0])
    root.setLevel(level)


def test_json_log_line(client, lines):
    read = lines(log_format="json")
    client.post("/generate", json=BODY, headers={"x-request-id": "one"})
    client.post("/generate", json={"prompt": ""}, headers={"x-request-id": "two"})
    client.get("/livez")
    one, two = (entry for line in read() if (entry := json.loads(line))["logger"] == "slr.access")
    assert (one["request_id"], one["status"], one["answers"], one["prompt_tokens"]) == ("one", 200, 2, 3)
    assert len(one["iterations"]) == len(one["exit_reasons"]) == 2
    assert {"queue_s", "prefill_s", "loop_s", "decode_s", "total_s", "duration_s", "time", "level"} <= set(one)
    assert (two["request_id"], two["status"], two["error"]) == ("two", 400, "invalid_value")


def test_text_log_line(client, lines):
    read = lines()
    client.post("/generate", json={**BODY, "stream": True}, headers={"x-request-id": "one"})
    client.get("/a%0Ab%20c")
    one, two = (line for line in read() if "slr.access" in line)
    assert "request_id=one" in one
    assert "method=POST path=/generate status=200" in one
    assert "stream=true" in one
    assert "path=/a%0Ab%20c status=404" in two


def test_error_is_one_line(lines):
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


@pytest.fixture
def traced(engine):
    """A client of a traced application, and its finished spans."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(ServerSettings(), engine)
    app.user_middleware.insert(0, Middleware(Tracing, provider=provider))
    with TestClient(app) as client:
        yield client, exporter.get_finished_spans


@pytest.mark.parametrize("stream", [False, True])
def test_spans(traced, stream):
    client, spans = traced
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {**BODY, "stream": stream}
    client.post("/generate?x=1", json=body, headers={"x-request-id": "one", "traceparent": parent})
    client.get("/livez")
    client.get("/generated")
    (span,) = spans()
    assert span.name == "POST /generate"
    assert f"{span.context.trace_id:032x}" in parent
    assert f"{span.parent.span_id:016x}" in parent
    assert (span.attributes["slr.request_id"], span.attributes["gen_ai.request.model"]) == ("one", "prosqa")
    assert (span.attributes["http.request.method"], span.attributes["http.response.status_code"]) == ("POST", 200)
    assert span.attributes["gen_ai.usage.input_tokens"] == 3
    assert len(span.attributes["slr.iterations"]) == len(span.attributes["slr.exit_reasons"]) == 2
    stages = [span.attributes[f"slr.{stage}_s"] for stage in ("queue", "prefill", "loop", "decode")]
    assert sum(stages) == pytest.approx(span.attributes["slr.total_s"])
    assert 1e9 * span.attributes["slr.total_s"] <= span.end_time - span.start_time


def test_spans_of_errors(traced, monkeypatch):
    client, spans = traced
    client.post("/trace", json={"prompt": ""})
    monkeypatch.setattr("slr_server.routes.common.check_limits", lambda *_: 1 / 0)
    client.post("/v1/completions", json={"prompt": "w1"})
    refused, failed = spans()
    assert (refused.attributes["error.type"], refused.attributes["http.response.status_code"]) == ("invalid_value", 400)
    assert refused.status.is_unset
    assert (failed.attributes["error.type"], failed.attributes["http.response.status_code"]) == ("internal_error", 500)
    assert failed.status.status_code is StatusCode.ERROR


def test_spans_of_failed_streams(traced, engine, caplog):
    client, spans = traced
    calls = 0

    def fail_later(*_):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("fault")

    hook = engine.model.base_model.register_forward_pre_hook(fail_later)
    try:
        client.post("/generate", json={"prompt": "w7 w7", "stream": True, "convergence": {"criterion": "fixed"}})
    finally:
        hook.remove()
    (span,) = spans()
    assert span.attributes["http.response.status_code"] == 500
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "internal_error")


def test_spans_need_their_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "slr_server.observability.tracing", None)
    with pytest.raises(ConfigError, match=re.escape(install_command("otel"))):
        create_app(ServerSettings(otel_endpoint="http://localhost:4318/v1/traces"))

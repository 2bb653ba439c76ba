import pytest
from starlette.exceptions import HTTPException

from slr_core.errors import CheckpointError, ConfigError, DataError, EngineError, RequestError, SLRError
from slr_server import errors


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("m", "seed"), 400, "invalid_value"),
        (errors.InvalidJSON("m"), 400, "invalid_json"),
        (errors.BodyTooLarge("m"), 413, "body_too_large"),
        (errors.UnsupportedMediaType("m"), 415, "unsupported_media_type"),
        (errors.QueueFull("m", 7), 429, "queue_full"),
        (errors.ClientGone("m"), 499, "client_closed_request"),
        (errors.Unavailable("m"), 503, "unavailable"),
        (errors.TimedOut("m"), 504, "timeout"),
    ],
)
def test_errors_for_the_caller(error, status, code):
    problem = errors.to_problem(error)
    assert (problem.status, problem.code, problem.message) == (status, code, "m")
    assert problem.param == ("seed" if isinstance(error, RequestError) else None)
    assert problem.headers == ({"Retry-After": "7"} if status == 429 else {})


@pytest.mark.parametrize(
    "kind", [SLRError, EngineError, ConfigError, CheckpointError, DataError, ValueError, MemoryError]
)
def test_other_errors_say_nothing(kind):
    problem = errors.to_problem(kind("/secret/path"))
    assert (problem.status, problem.type, problem.code) == (500, "server_error", "internal_error")
    assert "secret" not in problem.response().body.decode()


@pytest.mark.parametrize(("status", "code"), [(404, "not_found"), (405, "method_not_allowed"), (418, "http_error")])
def test_http_errors_keep_their_headers(status, code):
    problem = errors.to_problem(HTTPException(status, "m", {"Allow": "POST"}))
    assert (problem.status, problem.code, problem.headers) == (status, code, {"Allow": "POST"})


def test_paths_and_methods(client):
    for response, status, code in (
        (client.get("/nope"), 404, "not_found"),
        (client.post("/generate/", json={"prompt": "w1"}), 404, "not_found"),
        (client.get("/generate"), 405, "method_not_allowed"),
        (client.post("/livez"), 405, "method_not_allowed"),
    ):
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
    assert client.get("/generate").headers["allow"] == "POST"


def test_messages_are_plain(client):
    for body, message in (
        ({"prompt": []}, "prompt: must have at least 1 item"),
        ({"prompt": "w1", "stop": [""]}, "stop.0: must have at least 1 character"),
        ({"prompt": "w1", "convergence": []}, "convergence: must be an object"),
        ({"prompt": "w1", "seed": -1}, "seed: must be greater than or equal to 0"),
    ):
        assert client.post("/generate", json=body).json()["error"]["message"] == message

import pytest

from tests.server.bad_input import CASES


@pytest.fixture
def client(shared_client):
    return shared_client


@pytest.mark.parametrize("path", ["/generate", "/trace"])
@pytest.mark.parametrize(("content", "headers", "status", "param", "code"), CASES)
def test_bad_input_is_refused(client, path, content, headers, status, param, code):
    response = client.post(path, content=content, headers=headers)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"type", "message", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert 0 < len(error["message"]) < 1500
    assert client.post(path, json={"prompt": "w1", "max_new_tokens": 1}).status_code == 200


@pytest.mark.parametrize("value", [True, "3", -1, 2.5, 10**30, 51])
def test_top_tokens(client, value):
    response = client.post("/trace", json={"prompt": "w1", "top_tokens": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "top_tokens"


def test_top_tokens_belong_to_traces(client):
    response = client.post("/generate", json={"prompt": "w1", "top_tokens": 3})
    assert response.json()["error"]["code"] == "unknown_field"


def test_several_faults_are_all_named(client):
    error = client.post("/generate", json={"n": 0, "seed": -1}).json()["error"]
    assert error["param"] == "prompt"
    assert {"prompt: required", "seed: must be greater than or equal to 0"} <= set(error["message"].split("; "))


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_content_types_of_json(client, kind):
    response = client.post("/generate", content=b'{"prompt": "w1"}', headers={"content-type": kind})
    assert response.status_code == 200


def test_null_is_absence(client):
    body = {"prompt": "w1", "max_iterations": None, "convergence": None, "stop": None, "n": None}
    assert client.post("/generate", json=body).status_code == 200

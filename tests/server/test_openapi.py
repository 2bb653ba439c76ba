import re
from html.parser import HTMLParser

import pytest

from slr_core._version import __version__
from slr_server.protocol import native as schemas
from slr_server.protocol.schema import ErrorResponse


@pytest.fixture
def client(shared_client):
    return shared_client


@pytest.fixture
def document(client):
    return client.get("/openapi.json").json()


def references(node):
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)


def test_document(document):
    assert document["openapi"].startswith("3.")
    assert set(document["paths"]) == {
        *("/generate", "/trace", "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model}"),
        *("/", "/livez", "/readyz", "/startupz", "/health", "/version"),
        *("/checkpoint", "/checkpoint/identity", "/grade", "/metrics", "/admin/loop_sets", "/admin/loop_sets/{name}"),
    }
    names = set(document["components"]["schemas"])
    used = set(references(document))
    assert used == {f"#/components/schemas/{name}" for name in names}, "every reference resolves, every schema is used"
    identifiers = [op["operationId"] for path in document["paths"].values() for op in path.values()]
    assert len(set(identifiers)) == len(identifiers)
    for path in document["paths"].values():
        for operation in path.values():
            assert operation["summary"]
            assert operation["description"]


@pytest.mark.parametrize("path", ["/generate", "/trace"])
def test_errors_are_documented(document, path):
    responses = document["paths"][path]["post"]["responses"]
    refusals = {"400", "401", "408", "413", "415", "429", "431", "500", "503", "504", "default"}
    assert set(responses) == {"200", *refusals}
    for status in refusals:
        (content,) = responses[status]["content"].values()
        assert content["schema"]["$ref"].endswith("/ErrorResponse")
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "Retry-After" in responses["429"]["headers"]


def test_requests_are_closed(document):
    for name in ("GenerateRequest", "TraceRequest", "Convergence"):
        schema = document["components"]["schemas"][name]
        assert schema["additionalProperties"] is False
    temperature = document["components"]["schemas"]["GenerateRequest"]["properties"]["temperature"]
    assert temperature["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 10}


@pytest.mark.parametrize("model", [schemas.GenerateRequest, schemas.TraceRequest])
def test_examples_are_valid(model):
    for example in model.model_config["json_schema_extra"]["examples"]:
        model.model_validate(example)


def test_answers_are_as_documented(client):
    body = {"prompt": "w1", "max_new_tokens": 2}
    schemas.GenerateResponse.model_validate_json(client.post("/generate", json=body).content, strict=True)
    schemas.TraceResponse.model_validate_json(client.post("/trace", json=body).content, strict=True)
    ErrorResponse.model_validate_json(client.post("/trace", json={}).content, strict=True)


class Page(HTMLParser):
    """The URLs that a page loads, and its inline scripts."""

    def __init__(self, text):
        super().__init__()
        self.urls, self.inline, self._in_script = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.urls += [attrs[name] for name in ("src", "href") if name in attrs]
        self._in_script = tag == "script"

    def handle_data(self, data):
        if self._in_script and data.strip():
            self.inline.append(data)

    def handle_endtag(self, tag):
        self._in_script = False


def test_docs_page(client):
    response = client.get("/docs")
    assert response.status_code == 200
    assert "text/html" in response.headers["content-type"]
    page = Page(response.text)
    assert page.inline == [], "the content security policy forbids inline scripts"
    assert any(url.endswith("swagger-ui-bundle.js") for url in page.urls)
    for url in page.urls:
        assert "//" not in url
        assert client.get(f"/{url}").status_code == 200, url
    script = client.get("/static/docs.js")
    assert "javascript" in script.headers["content-type"]
    (spec,) = re.findall(r'url: "(.*?)"', script.text)
    assert client.get(f"/{spec}").json()["openapi"].startswith("3.1")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.mark.parametrize("path", ["/static/../settings.py", "/static/%2e%2e/settings.py", "/static/nope", "/static"])
def test_static_files(client, path):
    response = client.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_index(client, document):
    index = client.get("/").json()
    assert (index["name"], index["version"], index["model"]) == ("Stable Latent Reasoning", __version__, "prosqa")
    named = {(endpoint["method"], endpoint["path"]) for endpoint in index["endpoints"]}
    assert named == {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert all(endpoint["summary"] for endpoint in index["endpoints"])
    assert client.get(index["docs"]).status_code == 200

"""Any JSON gets an answer or a client error, never a server error."""

import json

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from slr_server.app import create_app
from slr_server.protocol.schema import ErrorResponse
from slr_server.settings import ServerSettings

# Lone surrogates cannot be encoded; tests/server/bad_input.py has them.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
sensible = {
    "prompt": text | st.lists(text, min_size=1, max_size=3) | st.just("w1 w2 w3"),
    "max_iterations": st.integers(0, 6),
    "min_iterations": st.integers(0, 6),
    "convergence": st.fixed_dictionaries(
        {},
        optional={
            "criterion": st.sampled_from(
                ["relative_change", "cosine", "kl", "entropy_change", "argmax_stable", "learned", "fixed"]
            ),
            "threshold": st.floats(0, 1e6),
            "patience": st.integers(1, 64),
        },
    ),
    "initial_noise": st.fixed_dictionaries({"scale": st.floats(0, 100)}, optional={"seed": st.integers(0, 2**63 - 1)}),
    "temperature": st.just(0) | st.floats(1e-3, 10),
    "top_p": st.floats(1e-6, 1),
    "top_k": st.integers(0, 2**31 - 1),
    "seed": st.integers(0, 2**63 - 1),
    "stop": st.lists(text.filter(bool), max_size=3),
    "n": st.integers(1, 3),
}
bodies = st.fixed_dictionaries(
    {"prompt": sensible["prompt"], "max_new_tokens": st.integers(1, 4)},
    optional={name: value for name, value in sensible.items() if name != "prompt"},
)
spoiled = st.builds(
    lambda body, name, value: {**body, name: value},
    bodies,
    st.sampled_from([*sensible, "stream", "include_states"]) | text,
    junk,
)


@pytest.fixture(scope="module")
def served(engine):
    with TestClient(create_app(ServerSettings(), engine)) as client:
        yield client


@settings(max_examples=150)
@given(body=bodies | spoiled | junk, path=st.sampled_from(["/generate", "/trace"]))
def test_any_body(served, body, path):
    response = served.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        ErrorResponse.model_validate_json(response.content, strict=True)


@settings(max_examples=100)
@given(content=st.binary(max_size=64))
def test_any_bytes(served, content):
    response = served.post("/generate", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400

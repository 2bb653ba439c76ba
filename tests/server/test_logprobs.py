"""Tokens of log-probabilities: their bytes form the text, and their labels are unique."""

import pytest
from fastapi.testclient import TestClient

from slr_core.engine import Engine
from slr_core.generation.logprobs import score
from slr_core.types import TokenScore
from slr_server.app import create_app
from slr_server.protocol.completions import CompletionFormatter, CompletionRequest
from slr_server.protocol.vocabulary import Offsets, Vocabulary
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server import events

TEXT = "aé😀b€"
CHAT = {"messages": [{"role": "user", "content": "abc"}], "logprobs": True, "top_logprobs": 3, "temperature": 0}


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(tiny.byte_tokenizer())


@pytest.fixture(scope="module")
def ids():
    return tiny.byte_tokenizer()(TEXT).input_ids


@pytest.fixture(scope="module")
def client(ids):
    """Always answers with TEXT, whose characters are split over tokens."""
    made = tiny.reasoner(text={"chat_template": "{{ messages[0].content }}"})
    made.tokenizer = tiny.byte_tokenizer()
    with (
        Engine(made, threads=1) as engine,
        TestClient(create_app(ServerSettings(), engine)) as client,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("slr_core.generation.decoding.DecodeState.choose_token", write(ids))
        yield client


def write(ids):
    """``DecodeState.choose_token`` that writes these tokens."""

    def choose_token(self, logits, most_likely=None):
        token = [*self.request.forced_ids, *ids][len(self.tokens)]
        if self.request.logprobs is not None:
            self.scores += score(logits[None], (token,), self.request.logprobs)
        self.add_token(token)
        return token

    return choose_token


def test_chat(client, ids):
    choice = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": len(ids)}).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert choice["message"]["content"] == TEXT
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == TEXT
    assert [entry["token"] for entry in content[:3]] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    for entry in content:
        for top in entry["top_logprobs"]:
            assert (top["token"] == entry["token"]) == (top["bytes"] == entry["bytes"])


def test_streamed_chat(client, ids):
    response = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": len(ids), "stream": True})
    told = [event.data["choices"][0] for event in events.of(response.text)[:-1]]
    content = [entry for choice in told if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == TEXT
    assert "".join(choice["delta"].get("content", "") for choice in told) == TEXT


@pytest.mark.parametrize("options", [{}, {"echo": True}, {"echo": True, "slr": {"loop_at": 3}}])
def test_completion(client, ids, options):
    prompt = "dé€f"
    body = {"prompt": prompt, "max_tokens": len(ids), "logprobs": 2, "temperature": 0, **options}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    text = (prompt if "echo" in options else "") + TEXT
    assert choice["text"] == text
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert b"".join(map(raw, tokens)).decode() == text
    before = b""
    for token, offset in zip(tokens, offsets, strict=True):
        assert offset == len(before.decode(errors="ignore"))
        before += raw(token)
    for token, top in zip(tokens[1:], choice["logprobs"]["top_logprobs"][1:], strict=True):
        assert token in top


def raw(label):
    """The bytes that a label stands for."""
    if not label.startswith("bytes:"):
        return label.encode()
    return bytes(int(byte, 16) for byte in label.removeprefix("bytes:").split("\\x")[1:])


def test_labels_are_unique():
    # Tokens 1 and 2 are special: neither adds text. Tokens 5 and 6 read the same.
    class Twins(Vocabulary):
        def label(self, token_id, raw):
            return "x" if token_id in (5, 6) else super().label(token_id, raw)

    formatter = CompletionFormatter(CompletionRequest(prompt="w1", logprobs=4), "tiny", Twins(tiny.tokenizer()))
    top = ((6, -0.5), (1, -1.0), (2, -2.0), (5, -3.0))
    for chosen, labels in ((5, ["token_id:6", "<eos>", "<unk>", "x"]), (6, ["x", "<eos>", "<unk>", "token_id:5"])):
        logprob = dict(top)[chosen]
        shown = formatter.logprobs([TokenScore(chosen, logprob, top)], [7], Offsets(0))
        assert list(shown.top_logprobs[0].items()) == list(zip(labels, [-0.5, -1.0, -2.0, -3.0], strict=True))
        assert shown.tokens == ["x"]
    unlisted = formatter.logprobs([TokenScore(5, -9.0, top[:3])], [7], Offsets(0))
    assert unlisted.top_logprobs[0] == {"token_id:6": -0.5, "<eos>": -1.0, "<unk>": -2.0, "x": -9.0}


def test_labels_differ(vocabulary):
    ids = range(len(tiny.WORDS))
    labels = {vocabulary.label(i, vocabulary.unchosen_bytes(i, [3], 1)) for i in ids}
    assert len(labels) == len(ids)

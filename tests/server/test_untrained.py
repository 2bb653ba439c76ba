"""A checkpoint with an untrained loop answers as its base model."""

import time

import pytest
import torch
from fastapi.testclient import TestClient

from slr_core.engine import Engine
from slr_server.app import create_app
from slr_server.settings import ServerSettings
from tests import tiny

CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}"
NEW = 6


def greedy(made, prompt):
    """What transformers' own ``generate`` writes."""
    ids = torch.tensor([tiny.ids(prompt)])
    with torch.inference_mode():
        output = tiny.base(made).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=tiny.PAD
        )
    return tiny.tokenizer().decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("kind", "workspace"),
    [("llama", "append"), ("llama", "block"), ("llama", "prompt"), ("qwen2", "append"), ("gpt2", "block")],
)
def test_greedy_as_base(kind, workspace):
    """Unless the request sets a loop parameter, although these adapters do change the output."""
    made = tiny.reasoner(kind, tiny.WORKSPACES[workspace], trained=False, text={"chat_template": CHAT})
    with Engine(made, threads=1, slots=2) as engine, TestClient(create_app(ServerSettings(), engine)) as client:
        for prompt in tiny.PROMPTS[:3]:
            expected = greedy(kind, prompt)
            body = {"model": "prosqa", "max_tokens": NEW, "temperature": 0}
            completion = client.post("/v1/completions", json={**body, "prompt": prompt}).json()
            messages = [{"role": "user", "content": prompt}]
            chat = client.post("/v1/chat/completions", json={**body, "messages": messages}).json()
            assert completion["choices"][0]["text"] == expected
            assert chat["choices"][0]["message"]["content"] == expected
        (result,) = client.post("/generate", json={"prompt": prompt, "convergence": {"criterion": "fixed"}}).json()[
            "results"
        ]
        assert result["iterations"] == made.config.loop.max_iterations


def test_served_with_a_warning(tmp_path, caplog):
    tiny.reasoner(trained=False).save_pretrained(str(tmp_path / "fresh"))
    with TestClient(create_app(ServerSettings(model=str(tmp_path / "fresh"), threads=1))) as client:
        while client.get("/readyz").status_code == 503:
            time.sleep(0.01)
        result = client.post("/generate", json={"prompt": "w1"}).json()["results"][0]
    assert result["iterations"] == 0
    assert "the loop of fresh is untrained" in caplog.text

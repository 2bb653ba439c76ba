"""An imported checkpoint, as a new user runs it: `slr import`, `slr-serve`, requests over HTTP."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests import tiny
from tests.checkpoint.importers import plain, published
from tests.server.process import Server


def slr(*arguments):
    command = [Path(sys.executable).with_name("slr"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["coconut", "pccot"])
def test_served(peer, tmp_path):
    """Its answers are the published loop's, and `/trace` shows its thoughts."""
    made = getattr(published, peer)(tmp_path)
    options = {"coconut": ["--latents", 3], "pccot": []}[peer]
    done = slr("import", peer, made.checkpoint, "--base", made.base, "--out", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    server = Server(tmp_path / "out", tmp_path / "log")
    try:
        body = {"prompt": tiny.PROMPTS[1], "max_new_tokens": 6}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()["results"][0]
        trace = httpx.post(
            f"{server.url}/trace", json={**body, "include_states": True, "top_tokens": 2}, timeout=60
        ).json()["results"][0]
        assert server.stop() == 0
    finally:
        server.kill()
    assert (answer["iterations"], answer["exit_reason"]) == (3, "max_iterations")
    assert trace["text"] == answer["text"]
    assert [len(record["top_tokens"]) for record in trace["trace"]] == [2, 2, 2]
    model, prompt = made.model.double(), made.prompt(tiny.PROMPTS[1], 0)
    if peer == "coconut":
        embeds, prefix = plain.chain(model, prompt, 3), [made.vocab + 1]
        thoughts = plain.states(model, embeds)[-3:, None]
    else:
        vector = model.get_input_embeddings().weight[made.vocab + 2]
        embeds, passes = plain.parallel(model, prompt, vector, 4, 3)
        thoughts, prefix = passes[:-1], [made.vocab + 1, *tiny.ids("w7 w8")]
    tokens = plain.write(model, embeds, prefix, 6, tiny.EOS)
    decoded = tiny.tokenizer().__class__.from_pretrained(tmp_path / "out").decode(tokens, skip_special_tokens=True)
    assert answer["text"] == decoded
    for record, thought in zip(trace["trace"], thoughts, strict=True):
        assert record["state"] == [pytest.approx(position.tolist(), abs=1e-3) for position in thought]

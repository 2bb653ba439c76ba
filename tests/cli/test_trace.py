import json

import pytest
import torch
from safetensors.torch import load_file

from slr_core.generation.reference import generate
from tests import tiny
from tests.cli.questions import LOOP, QUESTION, expected


def traced(made, prompt=tiny.PROMPTS[1]):
    loop = {"max_iterations": 3, "criterion": "fixed"}
    return generate(made, [tiny.request(made, prompt, loop, trace=True, include_states=True)])[0]


def test_one_line_per_iteration(run, made, folder):
    code, out, _ = run("trace", "--model", folder, *LOOP, "--top-tokens", 2, QUESTION)
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert expected(made).text in out
    for line, record in zip(lines[1:4], expected(made).records, strict=True):
        assert f"{record.relative_change:.3f}" in line
        assert record.adapter in line


def test_json(run, made, folder):
    found = json.loads(run("trace", "--model", folder, *LOOP, "--top-tokens", 2, "--json", QUESTION)[1])
    assert [record["t"] for record in found["trace"]] == [1, 2, 3]
    assert all(len(record["top_tokens"]) == 2 for record in found["trace"])
    assert found["stability"]["converged"] is False
    assert found["text"] == expected(made).text


def test_thoughts(run, thinking, block, folder):
    _, out, _ = run("trace", "--model", block, *LOOP, tiny.PROMPTS[1])
    lines = out.splitlines()
    assert lines[0].split()[-1] == "thought"
    for line, record in zip(lines[1:4], traced(thinking).records, strict=True):
        assert record.thought in line
    # Nothing compares with the learned vectors that the block starts from.
    assert lines[1].split()[:4] == ["1", "-", "-", "-"]
    assert lines[2].split()[3] == "-"
    assert "thought" not in run("trace", "--model", folder, *LOOP, QUESTION)[1]


def test_thoughts_as_json(run, thinking, block, folder):
    found = json.loads(run("trace", "--model", block, *LOOP, "--json", tiny.PROMPTS[1])[1])
    assert [record["thought"] for record in found["trace"]] == [r.thought for r in traced(thinking).records]
    assert found["trace"][0]["relative_change"] is None
    plain = json.loads(run("trace", "--model", folder, *LOOP, "--json", QUESTION)[1])
    assert all("thought" not in record for record in plain["trace"])


def test_states_file(run, thinking, block, tmp_path):
    code, out, _ = run("trace", "--model", block, *LOOP, "--states", tmp_path / "h.safetensors", tiny.PROMPTS[1])
    states = load_file(tmp_path / "h.safetensors")["states"]
    assert code == 0
    assert "states" not in out
    assert states.shape == (4, 3, 32)
    torch.testing.assert_close(states, traced(thinking).states)


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_chat_template(run, thinking, block, command):
    found = json.loads(run(command, "--model", block, *LOOP, "--json", "--chat", tiny.PROMPTS[1])[1])
    expected = traced(thinking, f"w1 {tiny.PROMPTS[1]} w2")
    assert found["usage"]["prompt_tokens"] == expected.prompt_tokens == 7
    assert found["final_change"] == pytest.approx(expected.final_change, rel=1e-4)
    assert found["final_change"] != pytest.approx(traced(thinking).final_change, rel=1e-3)

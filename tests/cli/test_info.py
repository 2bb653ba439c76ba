import json

import pytest

from slr_core.checkpoint.info import describe_model


def test_info(run, made, folder):
    code, out, _ = run("info", "--model", folder)
    sizes = describe_model(made)
    assert code == 0
    assert "LlamaForCausalLM" in out
    assert f"{sizes.added_parameters:,} parameters, {sizes.added_share:.1%} of the base" in out
    rows = {line[:12].strip(): line[12:].strip() for line in out.splitlines()}
    assert rows["workspace"] == "append"
    assert rows["weights"] == "float32 on cpu"
    assert rows["iterations"] == "1 to 4"
    assert rows["stops when"].endswith("for 1 iteration(s)")
    assert rows["loop LoRA"] == "per_iteration, rank 2, trained for 4 iterations, then last"
    assert rows["cache"].startswith("128 bytes per position; 33.2 KiB for a prompt of 256 tokens and an answer of 6")
    assert rows["cache"].endswith("of which the loop takes 512 bytes")
    found = json.loads(run("info", "--model", folder, "--json")[1])
    assert found["config"]["loop"] == made.config.loop.model_dump(mode="json")
    assert found["added_parameters"] == sizes.added_parameters
    assert found["added_share"] == pytest.approx(sizes.added_share)


def test_block_with_decoder(run, block):
    out = run("info", "--model", block)[1]
    rows = {line[:12].strip(): line[12:].strip() for line in out.splitlines()}
    assert rows["workspace"] == "block of 3"
    assert rows["decoder"] == "lm_head (latent decoder: 2 layers)"
    assert rows["loop LoRA"] == "per_iteration, rank 2, trained for 3 iterations, then last"


def test_dtype(run, folder):
    out = run("info", "--model", folder, "--device", "cpu", "--dtype", "bfloat16")[1]
    assert "bfloat16 on cpu" in out
    assert "64 bytes per position" in out

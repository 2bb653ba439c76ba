"""Linear layers with reordered and with quantized weights."""

import copy

import pytest
import torch
from torch.nn import functional as F

from slr_core.engine import Engine
from slr_core.engine.adapter_set import share_base
from slr_core.engine.runner import linear
from slr_core.engine.runner.device import load_reasoner
from slr_core.engine.runner.linear import (
    PackedLinear,
    QuantizedLinear,
    check_quantization,
    pack_linears,
    quantize_int4,
    quantize_int8,
)
from slr_core.errors import ConfigError
from slr_core.generation.reference import generate
from tests import tiny

NATIVE = torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not NATIVE, reason="needs bf16"))]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def layer(dtype=torch.float32, bias=True, outputs=48, inputs=64):
    torch.manual_seed(3)
    made = torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    return made.weight.detach(), made.bias


def packed(made):
    return {name: x for name, x in made.base.named_modules() if isinstance(x, PackedLinear)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_product(dtype):
    weight, bias = layer(dtype)
    made = PackedLinear(weight, bias)
    for shape in ((1, 64), (3, 2, 64), (0, 64)):
        x = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(made(x), F.linear(x, weight, bias), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(made.weight.to_dense(), weight)
    assert copy.deepcopy(made) is made, "weights are shared"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_product_is_that_of_its_values(quantization, dtype):
    weight, bias = layer(dtype)
    made = QuantizedLinear(weight, bias, quantization)
    values = made.round(weight)
    assert torch.equal(made.weight.to_dense(), values)
    for rows in (1, made.max_rows, made.max_rows + 1):
        x = torch.randn(rows, 64, dtype=dtype)
        expected = F.linear(x, values, bias)
        # Inputs are rounded to bf16 where the quantized weights are read.
        torch.testing.assert_close(made(x), expected, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(made(x[:, None]), made(x)[:, None])


def test_rounding():
    weight, _ = layer()
    integers, scales, values = quantize_int4(weight)
    assert (integers.min(), integers.max()) == (0, 15)
    step = scales[..., 0].float().T.repeat_interleave(linear.GROUP, dim=1)
    assert ((values - weight).abs() <= 0.55 * step).all(), "scales are rounded to bf16"
    integers, scale, values = quantize_int8(weight)
    assert integers.abs().max() == 127
    assert ((values - weight).abs() <= 0.55 * scale.float()[:, None]).all()
    for quantize in (quantize_int4, quantize_int8):
        assert not quantize(torch.zeros(16, 32))[2].any()


def test_only_large_layers_are_reordered(monkeypatch):
    made = tiny.reasoner()
    pack_linears(made.base)
    assert not packed(made)
    monkeypatch.setattr(linear, "MIN_PACKED", 0)
    pack_linears(made.base)
    assert len(packed(made)) == 15, "7 of each layer, and the head"
    for other in (torch.float64, torch.float16):
        made = tiny.reasoner().to(other)
        pack_linears(made.base)
        assert not packed(made)


def test_tied_heads_and_odd_shapes_stay(monkeypatch):
    made = tiny.reasoner("qwen3")
    pack_linears(made.base, "int4")
    # Of 48 inputs, `down_proj` cannot be cut into groups; the head shares the embeddings' weights.
    names = {name.split(".")[-2] for name in packed(made)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert type(made.base.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_engine_equals_reference(kind, quantization, monkeypatch):
    monkeypatch.setattr(linear, "MIN_PACKED", 0)
    made = tiny.reasoner(kind)
    pack_linears(made.base, quantization)
    assert packed(made)
    requests = [tiny.request(made, prompt, {"max_iterations": 1 + i % 4}) for i, prompt in enumerate(tiny.PROMPTS)]
    expected = [generate(made, [request])[0] for request in requests]
    for slots in (1, 4):
        with Engine(made, slots=slots, threads=1, capacity=40) as engine:
            futures = [engine.submit(request) for request in requests]
            results = [future.result() for future in futures]
        for ours, theirs in zip(results, expected, strict=True):
            changes = [[record.relative_change for record in result.records] for result in (ours, theirs)]
            # More rows than a quantized kernel takes are multiplied in fp32, not in bf16.
            exact = slots == 1 or quantization == "none"
            # Quantized kernels round their inputs to bf16, where a difference of fp32 rounding may become one of bf16.
            tolerance = 1e-4 if quantization == "none" else 5e-3 if exact else 0.1
            assert changes[0] == pytest.approx(changes[1], rel=tolerance)
            assert not exact or ours.token_ids == theirs.token_ids


def test_second_loop_set(monkeypatch):
    monkeypatch.setattr(linear, "MIN_PACKED", 0)
    for quantization in ("none", "int4"):
        owner, other, stranger = tiny.reasoner(), tiny.reasoner(), tiny.reasoner(seed=5)
        pack_linears(owner.base, quantization)
        share_base(owner, other)
        assert {id(x) for x in packed(owner).values()} == {id(x) for x in packed(other).values()}
        with pytest.raises(ConfigError, match="not the one that is served"):
            share_base(owner, stranger)


def test_refused():
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="quantization must be one of none, int8, int4, got int2"):
        check_quantization("int2", cpu, torch.float32)
    for device, dtype in ((torch.device("cuda"), torch.float32), (cpu, torch.float16)):
        with pytest.raises(ConfigError, match="quantization int4 needs a CPU and dtype float32 or bfloat16"):
            check_quantization("int4", device, dtype)
        assert check_quantization("none", device, dtype) == "none"
    with pytest.raises(ConfigError, match="quantization int8 needs a CPU"):
        load_reasoner(dtype="float16", quantization="int8")


def test_from_pretrained():
    made = load_reasoner(device="cpu", quantization="int8")
    assert {layer.quantization for layer in packed(made).values()} == {"int8"}
    assert not packed(load_reasoner(device="cpu")), "the layers of the bundled checkpoint are small"

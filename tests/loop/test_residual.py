import pytest
import torch

from slr_core.config import ResidualConfig
from slr_core.loop.residual import Residual

G, PREVIOUS, INITIAL = (torch.tensor([x, 2 * x, -x, 4.0]) for x in (1.0, 3.0, 5.0))


def residual(**config):
    return Residual(ResidualConfig(**config), 4)


def test_no_source_passes_the_output_on():
    assert residual(source="none")(G, PREVIOUS, INITIAL) is G
    assert list(residual(source="none").parameters()) == []


@pytest.mark.parametrize(("source", "s"), [("previous", PREVIOUS), ("initial", INITIAL)])
def test_each_mix(source, s):
    add = residual(source=source, mix="add", scale=-0.5)
    torch.testing.assert_close(add(G, PREVIOUS, INITIAL), G - 0.5 * s)
    convex = residual(source=source, mix="convex", alpha=0.25)
    torch.testing.assert_close(convex(G, PREVIOUS, INITIAL), 0.25 * G + 0.75 * s)
    gated = residual(source=source, mix="gated", alpha=0.8)
    torch.testing.assert_close(gated(G, PREVIOUS, INITIAL), 0.8 * G + 0.2 * s)


def test_the_gate_is_per_channel():
    made = residual(mix="gated")
    with torch.no_grad():
        made.gate.copy_(torch.tensor([-50.0, 50.0, -50.0, 50.0]))
    mixed = made(G, PREVIOUS, INITIAL)
    torch.testing.assert_close(mixed[[0, 2]], PREVIOUS[[0, 2]])
    torch.testing.assert_close(mixed[[1, 3]], G[[1, 3]])


def test_convex_with_alpha_1_is_no_residual():
    torch.testing.assert_close(residual(mix="convex", alpha=1.0)(G, PREVIOUS, INITIAL), G)


@pytest.mark.parametrize("source", ["none", "previous", "initial"])
def test_the_norm_comes_after_the_mix(source):
    made = residual(source=source, mix="convex", alpha=0.5, norm=True)
    plain = residual(source=source, mix="convex", alpha=0.5)(G, PREVIOUS, INITIAL)
    h = made(G, PREVIOUS, INITIAL)
    torch.testing.assert_close(h.pow(2).mean().sqrt(), torch.tensor(1.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(h, plain / plain.pow(2).mean().sqrt(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 0.0]))
    torch.testing.assert_close(made(G, PREVIOUS, INITIAL), h * made.weight)


@pytest.mark.parametrize("mix", ["add", "convex", "gated"])
def test_the_state_keeps_its_dtype(mix):
    made = residual(mix=mix, norm=True)
    assert made(G.bfloat16(), PREVIOUS.bfloat16(), INITIAL.bfloat16()).dtype == torch.bfloat16

import pytest
import torch

from slr_core.config import ProjectionConfig
from slr_core.loop.projection import Projection, rms_normalize

RMS = torch.tensor(0.02)


def projection(kind, size=16, **others):
    torch.manual_seed(0)
    return Projection(ProjectionConfig(kind=kind, **others), size)


def states(scale=5.0):
    return scale * torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))


def test_identity_changes_nothing():
    h = states()
    assert torch.equal(projection("identity")(h, RMS), h)


@pytest.mark.parametrize("scale", [0.1, 5.0, 1e3])
def test_rms_match_keeps_the_direction_and_takes_the_tables_rms(scale):
    h = states(scale)
    u = projection("rms_match")(h, RMS)
    torch.testing.assert_close(u.pow(2).mean(-1).sqrt(), RMS.expand(2, 3), rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(u, h, dim=-1), torch.ones(2, 3))


def test_linear_starts_near_the_identity():
    h = states(1.0)
    torch.testing.assert_close(projection("linear")(h, RMS), h, rtol=0, atol=0.02)
    assert not torch.equal(projection("linear")(h, RMS), h)


def test_mlp_ends_in_a_layer_norm():
    u = projection("mlp")(states(), RMS)
    torch.testing.assert_close(u.mean(-1), torch.zeros(2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(u.var(-1, correction=0), torch.ones(2, 3), rtol=1e-2, atol=1e-3)


def test_mlp_width_and_norm():
    made = projection("mlp", inner_size=5, norm=False)
    assert [list(x.shape) for x in made.parameters()] == [[5, 16], [5], [16, 5], [16]]
    first, _, second = made.layers
    h = states()
    torch.testing.assert_close(made(h, RMS), second(torch.nn.functional.gelu(first(h))))
    assert len(list(projection("mlp", inner_size=5).parameters())) == 6


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_embedding_table_matters_to_rms_match_alone(kind):
    made, h = projection(kind), states()
    assert torch.equal(made(h, RMS), made(h, 100 * RMS))


def test_a_zero_state_stays_finite():
    assert torch.equal(rms_normalize(torch.zeros(4)), torch.zeros(4))
    assert torch.equal(projection("rms_match")(torch.zeros(1, 16), RMS), torch.zeros(1, 16))


@pytest.mark.parametrize("kind", ["identity", "rms_match"])
def test_the_input_keeps_the_states_dtype(kind):
    assert projection(kind)(states().bfloat16(), RMS).dtype == torch.bfloat16


def test_a_pause_is_the_same_whatever_the_state():
    made = Projection(ProjectionConfig(kind="pause"), 8)
    one, other = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)
    assert torch.equal(made(one, torch.ones(())), made(other, torch.ones(())))
    made(one, torch.ones(())).sum().backward()
    assert one.grad is None
    assert made.vector.grad.abs().sum() > 0

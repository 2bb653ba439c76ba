from math import cos, sin

import pytest
import torch

from slr_core.config import TimestepConfig
from slr_core.loop.timestep import Timestep


def timestep(trained=4, size=8, **config):
    torch.manual_seed(0)
    return Timestep(TimestepConfig(**config), size, trained)


def test_none_is_the_identity_and_has_no_weights():
    made = timestep(kind="none")
    x = torch.randn(3, 8)
    assert made(x, 1) is x
    assert list(made.parameters()) == []


def test_add_adds_the_embedding():
    made = timestep(kind="learned")
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(made(x, 3), x + made.table[2])


def test_concat_starts_as_the_sum_and_maps_both():
    made = timestep(kind="learned", combine="concat")
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(made(x, 2), x + made.table[1])
    with torch.no_grad():
        made.merge.weight[:, 8:] = 0
        made.merge.bias.fill_(1.0)
    torch.testing.assert_close(made(x, 2), x + 1)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_iterations_are_told_apart(kind):
    made = timestep(kind=kind)
    embeddings = torch.stack([made.embedding(t) for t in range(1, 5)])
    assert embeddings.shape == (4, 8)
    assert torch.cdist(embeddings, embeddings).fill_diagonal_(1).min() > 0


def test_sinusoidal_features_are_sines_and_cosines_of_geometric_frequencies():
    made = timestep(kind="sinusoidal")
    seen = []
    made.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    made.embedding(5)
    angles = [5 * 10_000 ** (-i / 4) for i in range(4)]
    expected = [sin(a) for a in angles] + [cos(a) for a in angles]
    torch.testing.assert_close(seen[0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_sinusoidal_is_defined_far_past_the_trained_iterations():
    made = timestep(kind="sinusoidal", trained=1)
    assert made.embedding(256).isfinite().all()


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
@pytest.mark.parametrize("combine", ["add", "concat"])
def test_the_embedding_starts_small_beside_token_embeddings(kind, combine):
    made = timestep(kind=kind, combine=combine, size=64)
    assert made.embedding(1).pow(2).mean().sqrt() < 0.05


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_the_result_has_the_dtype_of_its_input(kind):
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert timestep(kind=kind)(x, 1).dtype == torch.bfloat16


def test_frequencies_are_not_saved():
    assert "frequencies" not in timestep(kind="sinusoidal").state_dict()

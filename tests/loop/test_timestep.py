from math import cos, inf, log, nan, sin

import pytest
import torch

from slr_core.config import TimestepConfig
from slr_core.loop.timestep import LEAST_CHANGE, Timestep
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams
from tests import tiny


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


def test_sinusoidal_features():
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


@pytest.mark.parametrize("noise_level", [False, True])
@pytest.mark.parametrize("combine", ["add", "concat"])
@pytest.mark.parametrize("kind", ["none", "learned", "sinusoidal"])
def test_rows_at_different_iterations_are_combined_as_each_alone(kind, combine, noise_level):
    if kind == "none" and not noise_level:
        pytest.skip("nothing is combined")
    made, x = timestep(kind=kind, combine=combine, noise_level=noise_level), torch.randn(3, 2, 8)
    iterations, change = (3, 1, 4), torch.tensor([[0.5], [nan], [0.01]])
    e_t = None if kind == "none" else torch.stack([made.embedding(t) for t in iterations])[:, None]
    found = made.combined(x, e_t, change)
    for row, t in enumerate(iterations):
        torch.testing.assert_close(found[row], made(x[row], t, change[row]))
    assert found.shape == x.shape
    torch.testing.assert_close(made.combined(x, e_t, None), made.combined(x, e_t, torch.full((3, 1), nan)))


def test_embeddings_are_combined_in_the_dtype_of_the_inputs():
    made = timestep(kind="learned", noise_level=True)
    x = torch.randn(2, 1, 8, dtype=torch.bfloat16)
    found = made.combined(x, made.table[:2, None], torch.tensor([[0.5], [0.1]]))
    assert found.dtype == torch.bfloat16


# -- the noise level -------------------------------------------------------------------------------------


def by_hand(made, *levels):
    """What the small MLP gives for logarithms of relative changes."""
    return made.level_mlp(torch.tensor(levels)[:, None])


@pytest.mark.parametrize("kind", ["none", "learned", "sinusoidal"])
def test_the_log_of_the_last_change_is_part_of_the_embedding(kind):
    made = timestep(kind=kind, noise_level=True)
    x = torch.randn(2, 3, 8)
    e_t = 0 if kind == "none" else made.embedding(2)
    expected = x + e_t + by_hand(made, log(0.5), log(0.01))[:, None]
    torch.testing.assert_close(made(x, 2, torch.tensor([[0.5], [0.01]])), expected)
    assert (made(x, 2, torch.tensor([[0.5], [0.5]])) - expected)[1].abs().max() > 1e-4


def test_where_there_is_no_change_yet_a_learned_level_stands_in():
    made = timestep(kind="learned", noise_level=True)
    with torch.no_grad():
        made.first_level.fill_(-3.0)
    x = torch.zeros(2, 1, 8)
    expected = made.table[0] + by_hand(made, -3.0, log(0.2))[:, None]
    torch.testing.assert_close(made(x, 1, torch.tensor([[nan], [0.2]])), expected)
    torch.testing.assert_close(made(x, 1), made(x, 1, torch.full((2, 1), nan)))
    made(x, 1, torch.tensor([[nan], [0.2]])).sum().backward()
    assert made.first_level.grad.isfinite()
    assert made.first_level.grad != 0


def test_the_logarithm_has_two_ends():
    made = timestep(kind="none", noise_level=True)
    ends = made.level(torch.tensor([0.0, LEAST_CHANGE, inf, 1 / LEAST_CHANGE]))
    torch.testing.assert_close(ends, by_hand(made, *[log(LEAST_CHANGE)] * 2, *[-log(LEAST_CHANGE)] * 2))


def test_no_gradient_flows_through_the_change():
    made = timestep(kind="learned", noise_level=True)
    change = torch.tensor([[0.5]], requires_grad=True)
    made(torch.zeros(1, 2, 8), 1, change).sum().backward()
    assert change.grad is None
    assert made.level_mlp[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["none", "learned"])
def test_the_noise_level_is_concatenated_too(kind):
    made = timestep(kind=kind, combine="concat", noise_level=True)
    x, change = torch.randn(2, 3, 8), torch.tensor([[0.5], [0.01]])
    e_t = by_hand(made, log(0.5), log(0.01))[:, None] + (0 if kind == "none" else made.table[2])
    torch.testing.assert_close(made(x, 3, change), x + e_t)
    assert made(x, 3).shape == x.shape
    with torch.no_grad():
        made.merge.weight[:, :8] = 0
    torch.testing.assert_close(made(x, 3, change), e_t.expand(2, 3, 8))


def test_without_a_noise_level_the_change_is_not_read():
    made, x = timestep(kind="learned"), torch.randn(1, 1, 8)
    assert torch.equal(made(x, 1, torch.tensor([[0.5]])), made(x, 1))


@pytest.mark.parametrize(("workspace", "first"), [("append", 2), ("block", 3), ("prompt", 3)])
@pytest.mark.parametrize("source", ["previous", "none"])
def test_each_iteration_reads_the_change_of_the_one_before(workspace, first, source):
    # In `block` and `prompt` the first step starts from an input: it has no relative change.
    loop = {"workspace": workspace, "timestep": {"noise_level": True}, "residual": {"source": source}}
    made = tiny.reasoner(loop=loop)
    seen = []
    made.timestep.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2].flatten().tolist()))
    depths = (4, 2)
    settings = [LoopParams(max_iterations=n, criterion="fixed").resolve(made.config) for n in depths]
    with torch.no_grad():
        output = loop_until_exit(made, made.encode(*tiny.batch(tiny.PROMPTS[:2])), settings)
    assert len(seen) == 4
    for row, depth in enumerate(depths):
        changes = [record.relative_change for record in output.records[row]]
        for t in range(1, depth + 1):
            if t < first:
                assert seen[t - 1][row] != seen[t - 1][row]
            else:
                assert seen[t - 1][row] == pytest.approx(changes[t - 2], rel=1e-4)

"""Noise in h_0."""

import pytest
import torch

from slr_core.errors import RequestError
from slr_core.generation.reference import generate
from slr_core.loop.noise import perturb, perturb_start
from slr_core.params import LoopParams
from tests import tiny

FIXED = {"max_iterations": 2, "criterion": "fixed"}


def test_scale_is_relative_to_each_position():
    hidden = torch.tensor([[1.0], [100.0]]).expand(2, 4096)
    noise = perturb(hidden, 0.5, torch.Generator().manual_seed(0)) - hidden
    torch.testing.assert_close(noise.std(-1), torch.tensor([0.5, 50.0]), rtol=0.05, atol=0)


def test_seed():
    config = tiny.config()
    hidden = torch.ones(3, 8)
    first, again, other = (
        perturb_start(hidden, LoopParams(noise_scale=0.5, noise_seed=seed).resolve(config)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_token_workspace_refuses_it():
    config = tiny.config({"workspace": "token"})
    with pytest.raises(RequestError, match="workspace token"):
        LoopParams(noise_scale=0.5).resolve(config)


@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_only_rows_that_request_it(workspace):
    made = tiny.reasoner(loop=tiny.WORKSPACES[workspace])
    options = {"include_states": True, "trace": True}
    plain, noisy, off, base = (
        tiny.request(made, tiny.PROMPTS[1], loop, **options)
        for loop in (
            FIXED,
            {**FIXED, "noise_scale": 0.5},
            {"max_iterations": 0, "noise_scale": 0.5},
            {"max_iterations": 0},
        )
    )
    alone = [generate(made, [request])[0] for request in (plain, noisy, off, base)]
    together = generate(made, [tiny.request(made, tiny.PROMPTS[3], FIXED, **options), plain, noisy, off])[1:]
    for one, row in zip(alone[:3], together, strict=True):
        torch.testing.assert_close(row.states, one.states, rtol=1e-4, atol=1e-4)
        assert row.token_ids == one.token_ids
    change = (alone[1].states[0] - alone[0].states[0]).norm() / alone[0].states[0].norm()
    assert 0.3 < change < 0.7
    assert not torch.allclose(alone[1].states[2], alone[0].states[2], rtol=1e-3)
    assert torch.equal(alone[2].states, alone[3].states), "without a loop there is no noise"


@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_loop_that_keeps_nothing_is_the_base_model(workspace):
    made = tiny.reasoner(loop=tiny.WORKSPACES[workspace])
    expected = generate(made, [tiny.request(made, tiny.PROMPTS[1], {"max_iterations": 0})])[0]
    made.residual.register_forward_hook(lambda _module, _inputs, h: h * torch.nan)
    (found,) = generate(made, [tiny.request(made, tiny.PROMPTS[1], {**FIXED, "noise_scale": 0.5})])
    assert found.exit_reason == "diverged"
    assert found.token_ids == expected.token_ids

"""A row that breaks down: it decodes its last good state, and its neighbours never notice."""

import pytest
import torch

from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.contract.mix import MEASURES, facts

FIXED = {"max_iterations": 5, "criterion": "fixed"}
ROW = 2


def broken_into(made, t_bad, where, bad, monkeypatch):
    """Make the state of one row, or what its first layer gives, ``bad`` at one iteration."""
    now = {"t": 0}
    plain_update = LatentReasoner.update

    def update(self, hidden, initial, t, *rest):
        now["t"] = t
        g, h = plain_update(self, hidden, initial, t, *rest)
        now["t"] = 0
        if t == t_bad and where == "state":
            g, h = g.clone(), h.clone()
            g[ROW, 0], h[ROW, 0] = bad, bad  # one position is enough
        return g, h

    def layer(_module, _inputs, output):
        if now["t"] == t_bad and where == "layer":
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[ROW] = bad
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        return None

    monkeypatch.setattr(LatentReasoner, "update", update)
    # The first layer's output is the second one's keys and values: they stay in the cache of `append`.
    inner = made.base.base_model
    (inner.h if hasattr(inner, "h") else inner.layers)[0].register_forward_hook(layer)


@pytest.mark.parametrize(
    ("at", "where", "bad"), [(1, "state", float("inf")), (3, "layer", float("nan"))], ids=["state", "layer"]
)
def test_divergence_of_one_row(kind, loop, at, where, bad, monkeypatch):
    # The noise level reads the change of the broken step, too.
    made = tiny.reasoner(kind, {**loop, "timestep": {"kind": "learned", "noise_level": True}}, decode=True)
    prompts = (tiny.PROMPTS[5], *tiny.PROMPTS[1:4])  # the third, of four tokens, is padded
    requests = [tiny.request(made, prompt, FIXED, trace=True, include_states=True) for prompt in prompts]
    expected = generate(made, requests)
    (last_good,) = generate(made, [tiny.request(made, prompts[ROW], {**FIXED, "max_iterations": at - 1})])

    broken_into(made, at, where, bad, monkeypatch)
    results = generate(made, requests)

    broken = results.pop(ROW)
    expected.pop(ROW)
    assert [facts(result) for result in results] == [facts(result) for result in expected]
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result.states, other.states, rtol=1e-5, atol=1e-5)
    assert (broken.exit_reason, broken.iterations) == ("diverged", at)
    assert broken.token_ids == last_good.token_ids
    assert broken.stability.converged is False
    assert [record.norm is None for record in broken.records] == [False] * (at - 1) + [True]
    values = [getattr(record, name) for record in broken.records for name in MEASURES]
    assert all(value is None or abs(value) < float("inf") for value in values)


@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_a_latent_decoder_reads_the_last_good_states_alone(workspace, monkeypatch):
    decoder = {"answers": "latent_decoder", "latent_decoder": tiny.LATENT_DECODER}
    made = tiny.reasoner(loop={**tiny.WORKSPACES[workspace], "decoder": decoder})
    prompts = tiny.PROMPTS[:4]
    (last_good,) = generate(made, [tiny.request(made, prompts[ROW], {**FIXED, "max_iterations": 2}, trace=True)])
    broken_into(made, 3, "state", float("nan"), monkeypatch)
    broken = generate(made, [tiny.request(made, prompt, FIXED, trace=True) for prompt in prompts])[ROW]
    assert (broken.exit_reason, broken.iterations) == ("diverged", 3)
    assert broken.token_ids == last_good.token_ids
    assert [r.thought for r in broken.records] == [*(r.thought for r in last_good.records), None]

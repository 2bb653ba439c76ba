"""fixed_point, contraction, shortcut, halting."""

import math

import pytest
import torch
import torch.nn.functional as F

from slr_core.training.data import LoopPlan
from slr_core.training.objectives.contraction import expansion_penalty
from slr_core.training.objectives.fixed_point import settled_change
from slr_core.training.objectives.halting import MARGIN, SHARPNESS, stop_targets
from tests.training.objectives.conftest import Setup

BLOCK = {"workspace": "block", "block_size": 3}


# -- fixed point -----------------------------------------------------------------------------------------


def test_only_steps_after_the_work_count():
    # h_0 ... h_4; with 1 hop the work is done at t = 2, so that t = 3 and 4 count; with 2 hops t = 4.
    states = torch.tensor([[9.0, 5.0, 1.0, 2.0, 2.0], [9.0, 7.0, 5.0, 4.0, 5.0]])[..., None]
    expected = (1.0 + 0.0 + (1 / 4) ** 2) / 3
    assert float(settled_change(states, torch.tensor([1, 2])).value) == pytest.approx(expected)


def test_fixed_point_costs_nothing_at_rest():
    assert float(settled_change(torch.ones(2, 5, 3), torch.tensor([1, 1])).value) == 0
    assert float(settled_change(torch.randn(2, 5, 3), torch.tensor([4, 9])).value) == 0


def test_the_earlier_state_is_not_pulled_towards_the_later():
    states = torch.randn(1, 4, 3, requires_grad=True)
    settled_change(states, torch.tensor([1])).value.backward()
    assert states.grad[0, 3].abs().sum() > 0
    assert states.grad[0, :3].abs().sum() == 0


def test_a_loop_learns_to_rest():
    history = Setup({"fixed_point": 1.0}).learn()
    assert history[-1]["fixed_point"] < 0.2 * history[0]["fixed_point"]


# -- contraction -----------------------------------------------------------------------------------------


def test_the_excess_of_a_step_over_a_share_of_the_one_before():
    # Steps of 4, 2 and 3: ratios 0.5 and 1.5.
    states = torch.tensor([[0.0, 4.0, 6.0, 9.0]])[..., None]
    assert float(expansion_penalty(states, 0.9).value) == pytest.approx((0 + 0.6**2) / 2)
    assert float(expansion_penalty(states, 0.4).value) == pytest.approx((0.1**2 + 1.1**2) / 2)


def test_steps_too_short_to_measure_do_not_count():
    states = torch.tensor([[1.0, 1.0 + 1e-6, 3.0, 4.0]])[..., None]
    # Only the ratio of the last step to the one before is left.
    assert float(expansion_penalty(states, 0.1).value) == pytest.approx(0.4**2, rel=1e-3)


@pytest.mark.parametrize("loop", [{}, BLOCK], ids=["append", "block"])
def test_the_penalty_reads_the_whole_workspace(loop):
    made = Setup({"contraction": 1.0}, loop, contraction=0.5)
    states = made.rollout().workspace
    first = 0 if not loop else 1
    ratios = []
    for t in range(first + 2, 5):
        step, before = ((states[:, i] - states[:, i - 1]).flatten(1).norm(dim=-1) for i in (t, t - 1))
        ratios.append((step / before - 0.5).clamp_min(0) ** 2)
    torch.testing.assert_close(made.terms()["contraction"], torch.stack(ratios).mean(), rtol=1e-3, atol=1e-5)


def test_a_loop_learns_to_contract():
    history = Setup({"contraction": 1.0}, contraction=0.5).learn()
    assert history[-1]["contraction"] < 0.3 * history[0]["contraction"]


# -- shortcut --------------------------------------------------------------------------------------------


def test_a_shorter_loop_is_compared_to_the_full_one():
    made = Setup({"shortcut": 1.0})
    reasoner, short = made.reasoner, torch.tensor([1, 3, 2, 1])
    states = made.rollout().states
    expected = []
    for row, s in enumerate(short.tolist()):
        early, late = states[row, s], states[row, 4]
        p, q = (reasoner.head(h).softmax(-1) for h in (late, early))
        expected.append(((early - late).norm() / late.norm()) ** 2 + (p * (p / q).log()).sum())
    torch.testing.assert_close(made.terms(short=short)["shortcut"], torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    # States that no gradient reaches are left out.
    kept = torch.stack([expected[1]]).mean()
    cut = made.terms(short=short, plan=LoopPlan(4, 2))["shortcut"]
    torch.testing.assert_close(cut, kept, rtol=1e-4, atol=1e-5)


def test_shorter_loops_learn_to_agree_with_the_full_one():
    history = Setup({"shortcut": 1.0, "answer": 1.0}).learn()
    assert history[-1]["shortcut"] < 0.5 * history[0]["shortcut"]
    assert history[-1]["answer"] < 0.8 * history[0]["answer"]


# -- halting ---------------------------------------------------------------------------------------------


def test_stopping_is_worth_it_when_nothing_is_left_to_gain():
    losses = torch.tensor([[3.0, 1.0, 0.5, 0.6]])
    gains = [2.5, 0.5, 0.0, 0.0]
    expected = [1 / (1 + math.exp(-SHARPNESS * (MARGIN - gain))) for gain in gains]
    assert stop_targets(losses)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_head_is_scored_on_what_more_iterations_would_gain():
    made = Setup({"halting": 1.0}, {"halting_head": True})
    with torch.no_grad():
        run = made.rollout()
        first = made.batch["first"]
        losses = torch.stack(
            [F.cross_entropy(made.reasoner.head(run.states[:, t]), first, reduction="none") for t in range(1, 5)], dim=1
        )
        halted = torch.stack([made.reasoner.halting(run.workspace[:, t], run.valid_mask) for t in range(1, 5)], dim=1)
        expected = F.binary_cross_entropy(halted, stop_targets(losses))
    torch.testing.assert_close(made.terms()["halting"].detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_head_learns_when_to_stop_and_moves_nothing_else():
    made = Setup({"halting": 1.0}, {"halting_head": True})
    made.terms()["halting"].backward()
    touched = {name for name, p in made.reasoner.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {"halting.probe.weight", "halting.probe.bias"}
    history = made.learn(steps=60, rate=0.05)
    assert history[-1]["halting"] < 0.6 * history[0]["halting"]

import pytest
import torch

from slr_core.loop.halting import HaltingHead
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams
from tests import tiny

WORKSPACES = ("append", "block", "prompt")


def head(size=4):
    made = HaltingHead(size)
    with torch.no_grad():
        made.probe.weight.copy_(torch.linspace(-1, 1, size))
        made.probe.bias.fill_(0.5)
    return made


def test_an_untrained_head_does_not_stop_a_loop():
    p_halt = HaltingHead(4)(100 * torch.randn(5, 2, 4), torch.ones(5, 2, dtype=torch.bool))
    torch.testing.assert_close(p_halt, torch.full((5,), 0.1))
    made = tiny.reasoner(loop={"halting_head": True, "convergence": {"criterion": "learned"}})
    made.halting = HaltingHead(32)
    assert run(made, max_iterations=4).exit_reasons == ["max_iterations"] * 3


def test_the_probability_by_hand():
    hidden = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [3.0, 0.0, 1.0, 2.0]]])
    logit = sum(w * x for w, x in zip((-1, -1 / 3, 1 / 3, 1), (2, 1, 2, 3), strict=True)) + 0.5
    expected = torch.sigmoid(torch.tensor([logit]))
    torch.testing.assert_close(head()(hidden, torch.ones(1, 2, dtype=torch.bool)), expected)


@pytest.mark.parametrize("filler", [0.0, 1e4, float("nan")])
def test_padding_is_no_part_of_the_mean(filler):
    hidden, valid_mask = torch.full((2, 5, 4), filler), torch.zeros(2, 5, dtype=torch.bool)
    valid_mask[0, :3], valid_mask[1, 3:] = True, True
    states = [torch.randn(3, 4), torch.randn(2, 4)]
    hidden[valid_mask] = torch.cat(states)
    bare = [head()(x[None], torch.ones(1, len(x), dtype=torch.bool)) for x in states]
    torch.testing.assert_close(head()(hidden, valid_mask), torch.cat(bare))


def test_any_leading_dimensions_and_precisions():
    hidden, valid_mask = torch.randn(2, 3, 5, 4), torch.ones(2, 3, 5, dtype=torch.bool)
    p_halt = head().bfloat16()(hidden.bfloat16(), valid_mask)
    assert (p_halt.shape, p_halt.dtype) == ((2, 3), torch.float32)


def run(made, prompts=tiny.PROMPTS[1:4], **loop):
    settings = [LoopParams(**loop).resolve(made.config)] * len(prompts)
    with torch.no_grad():
        return loop_until_exit(made, made.encode(*tiny.batch(list(prompts))), settings)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_the_loop_stops_when_the_head_says_so(workspace):
    made = tiny.reasoner(loop={"workspace": workspace, "block_size": 3, "halting_head": True})
    everything = run(made, max_iterations=8, criterion="fixed")
    reasons = set()
    for row, prompt in enumerate(tiny.PROMPTS[1:4]):
        states = everything.states[row][1:]
        with torch.no_grad():
            p_halt = made.halting(states, torch.ones(states.shape[:2], dtype=torch.bool)).tolist()
        first = 1 if made.workspace.starts_from_state else 2
        # Between the head's values, so that rounding decides nothing.
        ordered = sorted(p_halt[first - 1 :])
        threshold = 1 - (ordered[-2] + ordered[-1]) / 2
        output = run(made, [prompt], max_iterations=8, criterion="learned", threshold=threshold)
        expected = next(t for t in range(first, 9) if 1 - p_halt[t - 1] < threshold)
        assert (output.iterations, output.exit_reasons) == ([expected], ["converged"])
        reasons.add(expected)
    assert reasons != {first}


@pytest.mark.parametrize("workspace", ["block", "prompt"])
@pytest.mark.parametrize("criterion", ["relative_change", "cosine", "kl", "entropy_change", "argmax_stable", "learned"])
def test_no_exit_where_h0_is_an_input(workspace, criterion):
    made = tiny.reasoner(loop={"workspace": workspace, "halting_head": True})
    with torch.no_grad():
        made.halting.probe.bias.fill_(50.0)
    free = {"criterion": criterion, "threshold": 1e6}
    assert run(made, max_iterations=5, **free).iterations == [2, 2, 2]
    assert run(made, max_iterations=5, patience=2, **free).iterations == [3, 3, 3]
    assert run(made, max_iterations=1, **free).exit_reasons == ["max_iterations"] * 3


@pytest.mark.parametrize("criterion", ["relative_change", "learned"])
def test_a_chain_starts_from_a_state_and_may_stop_at_once(criterion):
    made = tiny.reasoner(loop={"halting_head": True})
    assert run(made, max_iterations=5, criterion=criterion, threshold=1e6).iterations == [1, 1, 1]

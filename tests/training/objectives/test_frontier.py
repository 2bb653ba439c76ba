import math

import pytest
import torch
import torch.nn.functional as F

from slr_core.loop.projection import rms_normalize
from slr_core.training.data import IGNORE, LoopPlan
from slr_core.training.objectives.fixed_point import settled_change
from slr_core.training.objectives.frontier import chain_divergence
from slr_core.training.objectives.frontier import set_divergence as divergence_of
from tests import tiny
from tests.training.objectives.conftest import GRAPHS, Setup


def set_divergence(logits, targets):
    return divergence_of(logits, targets).value


def spread(sets, size=6, inside=0.0, outside=-50.0):
    logits = torch.full((len(sets), size), outside)
    for row, members in enumerate(sets):
        logits[row, list(members)] = inside
    return logits


TARGETS = torch.tensor([[1, 4, IGNORE], [2, IGNORE, IGNORE], [0, 3, 5]])
SETS = [{1, 4}, {2}, {0, 3, 5}]


# -- set_divergence --------------------------------------------------------------------------------------


def test_a_head_that_spreads_evenly_over_the_set_has_no_divergence():
    assert float(set_divergence(spread(SETS), TARGETS)) == pytest.approx(0, abs=1e-6)
    assert float(set_divergence(spread(SETS, inside=7.0), TARGETS)) == pytest.approx(0, abs=1e-6)


def test_the_divergence_by_hand():
    # A uniform head: KL(uniform over n || uniform over 6) = log(6 / n).
    expected = (math.log(3) + math.log(6) + math.log(2)) / 3
    assert float(set_divergence(torch.zeros(3, 6), TARGETS)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("row", range(3))
def test_any_other_head_has_some(row):
    logits = spread(SETS)
    logits[row, 0] += 60.0
    assert float(set_divergence(logits, TARGETS)) > 0.1


def test_empty_sets_do_not_count():
    logits = torch.randn(3, 6)
    padded = torch.cat([TARGETS, torch.full((2, 3), IGNORE)])
    more = torch.cat([logits, torch.randn(2, 6)])
    torch.testing.assert_close(set_divergence(more, padded), set_divergence(logits, TARGETS))
    assert float(set_divergence(torch.randn(2, 6), torch.full((2, 3), IGNORE))) == 0


def test_padding_gets_no_gradient():
    logits = torch.zeros(2, 6, requires_grad=True)
    set_divergence(logits, torch.tensor([[1, IGNORE], [IGNORE, IGNORE]])).backward()
    assert logits.grad[1].abs().sum() == 0
    assert logits.grad[0, 1] < 0


# -- on a model ------------------------------------------------------------------------------------------


def test_every_term_is_there_and_is_what_its_parts_say(graphs):
    terms = graphs.terms()
    assert set(terms) == set(GRAPHS)
    assert all(term.shape == () and term.isfinite() and term > 0 for term in terms.values())
    reasoner, batch = graphs.reasoner, graphs.batch
    states = reasoner.unroll(reasoner.encode(batch["input_ids"], batch["attention_mask"]), 4)[:, :, 0]
    expected = {
        "start": F.cross_entropy(reasoner.head(states[:, 0]), batch["answer_ids"][:, 0]),
        "frontier": set_divergence(reasoner.head(states[:, 1:]), batch["targets"]),
        "fixed_point": settled_change(states, batch["work"]).value,
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_chains_side_by_side_are_chains_one_by_one(graphs):
    reasoner, batch = graphs.reasoner, graphs.batch
    starts, targets = batch["chain_starts"], batch["chain_targets"]
    with torch.no_grad():
        prompt = reasoner.encode(batch["input_ids"], batch["attention_mask"])
        together = chain_divergence(reasoner, prompt.fork(), starts, targets).value
        states = []
        for q in range(starts.shape[1]):
            alone = prompt.fork()
            alone.hidden = alone.initial = rms_normalize(reasoner.embed(starts[:, q]).mean(1, keepdim=True))
            states.append(reasoner.unroll(alone, targets.shape[2])[:, 1:, 0])
        expected = set_divergence(reasoner.head(torch.stack(states, dim=1)), targets)
    assert starts.shape[1] == 2
    assert targets.shape[2] > 1
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def test_chains_can_begin_as_if_iterations_had_gone_before(graphs):
    reasoner, batch = graphs.reasoner, graphs.batch
    starts, targets = batch["chain_starts"], batch["chain_targets"]
    prompt = reasoner.encode(batch["input_ids"], batch["attention_mask"])
    with tiny.passes(reasoner) as seen:
        later = chain_divergence(reasoner, prompt.fork(), starts, targets, after=2).value
    lengths = batch["attention_mask"].sum(-1)
    # Four iterations have adapters, and the last one's serves whatever comes after.
    assert [adapter for adapter, _ in seen] == ["loop_03", "loop_04", "loop_04", "loop_04"][: targets.shape[2]]
    for i, (_, positions) in enumerate(seen):
        assert positions == (lengths + 2 + i)[:, None].expand(-1, starts.shape[1]).tolist()
    assert not torch.isclose(later, chain_divergence(reasoner, prompt.fork(), starts, targets).value, rtol=1e-3)


def test_states_without_a_gradient_do_not_thin_out_the_means(graphs):
    reasoner, batch = graphs.reasoner, graphs.batch
    terms = graphs.terms(plan=LoopPlan(4, 2))
    states = reasoner.unroll(reasoner.encode(batch["input_ids"], batch["attention_mask"]), 4)[:, :, 0]
    expected = set_divergence(reasoner.head(states[:, 3:]), batch["targets"][:, 2:])
    torch.testing.assert_close(terms["frontier"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workspace", ["block", "prompt"])
def test_states_are_read_at_the_last_position_of_a_workspace(workspace):
    made = Setup({"frontier": 1.0, "fixed_point": 1.0}, {"workspace": workspace, "block_size": 3})
    reasoner, batch = made.reasoner, made.batch
    with torch.no_grad():
        context = reasoner.encode(batch["input_ids"], batch["attention_mask"])
        states = reasoner.unroll(context, 4)
        last = states[:, :, -1]
        if workspace == "prompt":
            lengths = batch["attention_mask"].sum(-1).tolist()
            assert len(set(lengths)) > 1
            at = [int(mask.nonzero()[-1]) for mask in batch["attention_mask"]]
            last = torch.stack([states[row, :, position] for row, position in enumerate(at)])
    expected = {
        "frontier": set_divergence(reasoner.head(last[:, 1:]), batch["targets"]),
        "fixed_point": settled_change(last, batch["work"]).value,
    }
    for name, value in made.terms().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_thirty_steps_on_one_batch_lower_every_term():
    history = Setup(GRAPHS, shake=False).learn()
    for name in ("answer", "frontier", "start", "chains"):
        assert history[-1][name] < 0.8 * history[0][name], name
    assert sum(history[-1].values()) < 0.7 * sum(history[0].values())

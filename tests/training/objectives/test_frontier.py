import math

import pytest
import torch
import torch.nn.functional as F

from slr_core.loop.projection import rms_normalize
from slr_core.training.config import ObjectiveWeights
from slr_core.training.data import IGNORE, Collator, LoopPlan, StageStream
from slr_core.training.objectives import answer_loss, chains, fixed_point, losses, set_divergence
from slr_core.training.trainer import build
from tests import tiny
from tests.training.recipe import DATA, recipe


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


# -- fixed_point -----------------------------------------------------------------------------------------


def test_only_steps_after_the_work_count():
    # h_0 ... h_4; with 1 hop the work is done at t = 2, so that t = 3 and 4 count; with 2 hops t = 4.
    states = torch.tensor([[9.0, 5.0, 1.0, 2.0, 2.0], [9.0, 7.0, 5.0, 4.0, 5.0]])[..., None]
    expected = (1.0 + 0.0 + (1 / 4) ** 2) / 3
    assert float(fixed_point(states, torch.tensor([1, 2]))) == pytest.approx(expected)


def test_a_state_at_rest_and_a_loop_that_is_still_at_work_cost_nothing():
    assert float(fixed_point(torch.ones(2, 5, 3), torch.tensor([1, 1]))) == 0
    assert float(fixed_point(torch.randn(2, 5, 3), torch.tensor([4, 9]))) == 0


def test_the_earlier_state_is_not_pulled_towards_the_later():
    states = torch.randn(1, 4, 3, requires_grad=True)
    fixed_point(states, torch.tensor([1])).backward()
    assert states.grad[0, 3].abs().sum() > 0
    assert states.grad[0, :3].abs().sum() == 0


# -- on a model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup():
    config = recipe()
    reasoner = build(config)
    tiny.shake(reasoner)
    items = list(StageStream(config))[8:12]  # a batch of the second stage: 4 iterations
    return reasoner, Collator(reasoner.tokenizer, "", "")(items)


def test_every_term_is_there_and_is_what_its_parts_say(setup):
    reasoner, batch = setup
    terms = losses(reasoner.train(), batch, ObjectiveWeights())
    assert set(terms) == {"start", "frontier", "fixed_point", "chains", "answer"}
    assert all(term.shape == () and term.isfinite() and term > 0 for term in terms.values())
    states = reasoner.unroll(reasoner.encode(batch["input_ids"], batch["attention_mask"]), 4)[:, :, 0]
    expected = {
        "start": F.cross_entropy(reasoner.head(states[:, 0]), batch["answer_ids"][:, 0]),
        "frontier": set_divergence(reasoner.head(states[:, 1:]), batch["targets"]),
        "fixed_point": fixed_point(states, batch["hops"]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("off", ["start", "frontier", "fixed_point", "chains", "answer"])
def test_a_weight_of_zero_switches_a_term_off(setup, off):
    reasoner, batch = setup
    terms = losses(reasoner.train(), batch, ObjectiveWeights(**{off: 0.0}))
    assert set(terms) == {"start", "frontier", "fixed_point", "chains", "answer"} - {off}


def test_without_a_loop_the_state_of_the_prompt_is_trained(setup):
    reasoner, batch = setup
    terms = losses(reasoner.train(), {**batch, "plan": LoopPlan(0), "targets": None}, ObjectiveWeights(start=0.0))
    assert {"start", "answer"} <= set(terms)
    assert {"frontier", "fixed_point"}.isdisjoint(terms)
    terms["answer"].backward()
    touched = {name for name, p in reasoner.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    reasoner.zero_grad()
    assert not any("lora" in name or not name.startswith("base.") for name in touched)
    assert touched


def test_the_answer_is_scored_token_by_token(setup):
    reasoner, batch = setup
    reasoner.eval()
    answer = batch["answer_ids"].clone()
    answer[0, -1] = IGNORE
    looped = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        context = reasoner.encode(batch["input_ids"], batch["attention_mask"])
        reasoner.close(context, reasoner.unroll(context, 3), torch.full((4,), 3))
        total = count = 0.0
        for row in range(4):
            alone = reasoner.encode(batch["input_ids"][[row]], batch["attention_mask"][[row]])
            reasoner.close(alone, reasoner.unroll(alone, 3), torch.tensor([3]))
            logits = reasoner.head(alone.state)
            for target in answer[row]:
                if target != IGNORE:
                    total += float(-logits.log_softmax(-1)[0, target])
                    count += 1
                    logits = reasoner.answer(alone, target.view(1, 1), torch.tensor([[True]]), looped[:1])[:, 0]
        assert float(answer_loss(reasoner, context, answer, looped)) == pytest.approx(total / count, rel=1e-4)
    assert count == 11


def test_chains_side_by_side_are_chains_one_by_one(setup):
    reasoner, batch = setup
    reasoner.eval()
    starts, targets = batch["chain_starts"], batch["chain_targets"]
    with torch.no_grad():
        prompt = reasoner.encode(batch["input_ids"], batch["attention_mask"])
        together = chains(reasoner, prompt.fork(), starts, targets)
        states = []
        for q in range(starts.shape[1]):
            alone = prompt.fork()
            alone.hidden = alone.initial = rms_normalize(reasoner.embed(starts[:, q]).mean(1, keepdim=True))
            states.append(reasoner.unroll(alone, targets.shape[2])[:, 1:, 0])
        expected = set_divergence(reasoner.head(torch.stack(states, dim=1)), targets)
    assert starts.shape[1] == 2
    assert targets.shape[2] > 1
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def test_chains_can_begin_as_if_iterations_had_gone_before(setup):
    reasoner, batch = setup
    reasoner.eval()
    starts, targets = batch["chain_starts"], batch["chain_targets"]
    prompt = reasoner.encode(batch["input_ids"], batch["attention_mask"])
    with tiny.passes(reasoner) as seen:
        later = chains(reasoner, prompt.fork(), starts, targets, after=2)
    lengths = batch["attention_mask"].sum(-1)
    # Four iterations have adapters, and the last one's serves whatever comes after.
    assert [adapter for adapter, _ in seen] == ["loop_03", "loop_04", "loop_04", "loop_04"][: targets.shape[2]]
    for i, (_, positions) in enumerate(seen):
        assert positions == (lengths + 2 + i)[:, None].expand(-1, starts.shape[1]).tolist()
    assert not torch.isclose(later, chains(reasoner, prompt.fork(), starts, targets), rtol=1e-3)


@pytest.mark.parametrize("workspace", ["append", "block", "prompt"])
@pytest.mark.parametrize("backprop", [1, 2, 9])
def test_truncated_backpropagation_computes_the_same(workspace, backprop, setup):
    reasoner, batch = other(workspace, setup)
    tiny.shake(reasoner)
    weights = TERMS[workspace].model_copy(update={"frontier": 0.0, "fixed_point": 0.0})
    whole, cut = ({**batch, "plan": LoopPlan(4, k)} for k in (None, backprop))
    expected = losses(reasoner.eval(), whole, weights)
    actual = losses(reasoner, cut, weights)
    assert actual.keys() == expected.keys() == {"answer", "start"} - ({"start"} if workspace == "prompt" else set())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("workspace", ["append", "block", "prompt"])
def test_truncated_backpropagation_reaches_the_last_iterations_and_the_prompt(workspace, setup):
    reasoner, batch = other(workspace, setup)
    tiny.shake(reasoner)
    context = reasoner.encode(batch["input_ids"], batch["attention_mask"])
    prompt = None if workspace == "prompt" else next(context.layers())[1]
    states = reasoner.unroll(context, 4, backprop=2)
    if prompt is not None:
        prompt.retain_grad()
    reasoner.close(context, states, torch.full((4,), 4))
    reasoner.head(context.state).logsumexp(-1).sum().backward()
    touched = {name for name, p in reasoner.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    adapters = {name.rpartition("loop_")[2][:2] for name in touched if "loop_" in name}
    assert adapters == {"03", "04"}
    assert prompt is None or prompt.grad.abs().sum() > 0


def test_states_without_a_gradient_do_not_thin_out_the_means(setup):
    reasoner, batch = setup
    cut = {**batch, "plan": LoopPlan(4, 2)}
    terms = losses(reasoner.eval(), cut, ObjectiveWeights(chains=0.0))
    states = reasoner.unroll(reasoner.encode(batch["input_ids"], batch["attention_mask"]), 4)[:, :, 0]
    expected = set_divergence(reasoner.head(states[:, 3:]), batch["targets"][:, 2:])
    torch.testing.assert_close(terms["frontier"], expected, rtol=1e-4, atol=1e-5)


def test_thirty_steps_on_one_batch_lower_every_term(setup):
    _, batch = setup
    reasoner = build(recipe()).train()
    optimizer = torch.optim.AdamW(reasoner.parameters(), lr=1e-2)
    history = []
    for _ in range(30):
        terms = losses(reasoner, batch, ObjectiveWeights())
        history.append({name: float(term.detach()) for name, term in terms.items()})
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    for name in ("answer", "frontier", "start", "chains"):
        assert history[-1][name] < 0.8 * history[0][name], name
    assert sum(history[-1].values()) < 0.7 * sum(history[0].values())


def test_every_part_is_trained(setup):
    reasoner, batch = setup
    reasoner.train().zero_grad()
    sum(losses(reasoner, batch, ObjectiveWeights()).values()).backward()
    still = [name for name, p in reasoner.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    reasoner.zero_grad()
    assert still == []


# -- in the other workspaces -----------------------------------------------------------------------------

OTHERS = ("block", "prompt")
TERMS = {
    "append": ObjectiveWeights(chains=0.0),
    "block": ObjectiveWeights(chains=0.0),
    "prompt": ObjectiveWeights(chains=0.0, start=0.0),
}


def other(workspace, setup, **loop):
    """An untrained reasoner with this workspace and a batch for it."""
    loop = {**DATA["loop"], "workspace": workspace, "block_size": 3, **loop}
    objectives = TERMS[workspace].model_dump()
    return build(recipe(loop=loop, objectives=objectives)), setup[1]


@pytest.mark.parametrize("workspace", OTHERS)
def test_terms_are_read_at_the_last_position_of_a_workspace(workspace, setup):
    reasoner, batch = other(workspace, setup)
    tiny.shake(reasoner)
    terms = losses(reasoner.eval(), batch, TERMS[workspace])
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
            "fixed_point": fixed_point(last, batch["hops"]),
        }
        if workspace == "block":
            start = reasoner.encode(batch["input_ids"], batch["attention_mask"]).state
            expected["start"] = F.cross_entropy(reasoner.head(start), batch["answer_ids"][:, 0])
    assert set(terms) == {*expected, "answer"}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("workspace", TERMS)
def test_without_a_loop_the_terms_are_the_base_models(workspace, setup):
    reasoner, batch = other(workspace, setup)
    with torch.no_grad():
        for parameter in reasoner.base.parameters():
            parameter.mul_(8)  # fresh weights hardly look at their context
    weights = ObjectiveWeights(chains=0.0)
    terms = losses(reasoner.eval(), {**batch, "plan": LoopPlan(0), "targets": None}, weights)
    answer, total, count = batch["answer_ids"], 0.0, 0
    with torch.no_grad():
        for row in range(4):
            prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            tokens = answer[row][answer[row] != IGNORE]
            logits = reasoner.base(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
            total += float(F.cross_entropy(logits, tokens, reduction="sum"))
            count += len(tokens)
    assert set(terms) == {"start", "answer"}
    assert float(terms["answer"].detach()) == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("workspace", OTHERS)
def test_thirty_steps_on_one_batch_lower_the_terms_of_other_workspaces(workspace, setup):
    reasoner, batch = other(workspace, setup, timestep={"kind": "learned", "noise_level": True})
    reasoner.train()
    optimizer = torch.optim.AdamW(reasoner.parameters(), lr=1e-2)
    history = []
    for _ in range(30):
        terms = losses(reasoner, batch, TERMS[workspace])
        history.append({name: float(term.detach()) for name, term in terms.items()})
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    for name in ("answer", "frontier"):
        assert history[-1][name] < 0.8 * history[0][name], name


@pytest.mark.parametrize("workspace", OTHERS)
def test_every_part_of_other_workspaces_is_trained(workspace, setup):
    loop = {"lora": {"rank": 2, "decode_rank": 2}, "timestep": {"kind": "learned", "noise_level": True}}
    reasoner, batch = other(workspace, setup, **loop)
    tiny.shake(reasoner)
    sum(losses(reasoner.train(), batch, TERMS[workspace]).values()).backward()
    still = [name for name, p in reasoner.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []

"""What holds for all objectives: which are computed, what is trained, workspaces, truncated backpropagation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from slr_core.errors import ConfigError
from slr_core.training.config import ObjectiveWeights
from slr_core.training.data import IGNORE, LoopPlan
from slr_core.training.objectives import OBJECTIVES, check_defined, losses
from slr_core.training.objectives.token_loss import mean_of, token_loss
from tests import tiny
from tests.training.objectives.conftest import GRAPHS, Setup
from tests.training.recipe import DATA, recipe

WORKSPACES = {"append": {}, "block": {"workspace": "block", "block_size": 3}, "prompt": {"workspace": "prompt"}}


def test_every_weight_of_a_recipe_has_its_objective():
    assert list(ObjectiveWeights.model_fields) == list(OBJECTIVES)


@pytest.mark.parametrize("off", GRAPHS)
def test_a_weight_of_zero_switches_a_term_off(off):
    assert set(Setup({**GRAPHS, off: 0.0}).terms()) == set(GRAPHS) - {off}


def test_a_mean_leaves_out_what_does_not_count():
    values, counts = torch.tensor([1.0, float("inf"), 3.0]), torch.tensor([True, False, True])
    assert float(mean_of(values, counts).value) == 2
    assert float(mean_of(values, torch.zeros(3, dtype=torch.bool)).value) == 0


def test_a_token_loss_is_cross_entropy_per_token():
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[1, 2, IGNORE], [IGNORE, 0, 6]])
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(token_loss(logits, labels).value, expected)
    assert int(token_loss(logits, labels).divisor) == 4


def test_parts_of_a_batch_add_up_to_the_whole(graphs):
    whole = losses(graphs.rollout())
    parts = [losses(graphs.rollout(**graphs.collator(part))) for part in (graphs.items[::2], graphs.items[1::2])]
    for name, term in whole.items():
        total = sum(part[name].total for part in parts) / sum(part[name].divisor for part in parts)
        torch.testing.assert_close(total, term.value, rtol=1e-4, atol=1e-5, msg=name)


def test_stage_leaves_objectives_out(graphs):
    plan = replace(graphs.batch["plan"], without=("frontier", "chains"))
    assert graphs.terms().keys() - graphs.terms(plan=plan).keys() == {"frontier", "chains"}


def test_the_answer_is_scored_token_by_token(graphs):
    reasoner, batch = graphs.reasoner, graphs.batch
    labels = batch["labels"].clone()
    labels[0, -1] = IGNORE
    exits = torch.tensor([1, 3, 4, 2])
    with torch.no_grad():
        total = count = 0.0
        for row in range(4):
            alone = reasoner.encode(batch["input_ids"][[row]], batch["attention_mask"][[row]])
            reasoner.close(alone, reasoner.unroll(alone, int(exits[row])), exits[[row]])
            logits = reasoner.head(alone.state)
            for target in labels[row]:
                if target != IGNORE:
                    total += float(-logits.log_softmax(-1)[0, target])
                    count += 1
                    token, yes = target.view(1, 1), torch.tensor([True])
                    logits = reasoner.answer_logits(alone, token, yes[:, None], yes)[:, 0]
        scored = graphs.terms(labels=labels, exits=exits)["answer"]
    assert float(scored.detach()) == pytest.approx(total / count, rel=1e-4)
    assert count == 11


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_without_a_loop_the_terms_are_the_base_models(workspace):
    made = Setup({"answer": 1.0}, WORKSPACES[workspace], shake=False)
    with torch.no_grad():
        for parameter in made.reasoner.base.parameters():
            parameter.mul_(8)  # fresh weights hardly look at their context
    terms = made.terms(**made.plan(0))
    answer, total, count = made.batch["answer_ids"], 0.0, 0
    with torch.no_grad():
        for row in range(4):
            prompt = made.batch["input_ids"][row][made.batch["attention_mask"][row].bool()]
            tokens = answer[row][answer[row] != IGNORE]
            logits = made.reasoner.base(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
            total += float(F.cross_entropy(logits, tokens, reduction="sum"))
            count += len(tokens)
    assert set(terms) == {"answer"}
    assert float(terms["answer"].detach()) == pytest.approx(total / count, rel=1e-4)
    terms["answer"].backward()
    touched = {name for name, p in made.reasoner.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched
    assert not any("lora" in name or not name.startswith("base.") for name in touched)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_every_part_is_trained(workspace):
    loop = {"timestep": {"kind": "learned", "noise_level": workspace != "append"}, **WORKSPACES[workspace]}
    loop["lora"] = {"rank": 2, "decode_rank": 2}
    weights = {"answer": 1.0, "frontier": 1.0, "fixed_point": 1.0}
    made = Setup(weights, loop)
    torch.stack(list(made.terms().values())).sum().backward()
    still = [name for name, p in made.reasoner.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("backprop", [1, 2, 9])
def test_truncated_backpropagation_computes_the_same(workspace, backprop):
    weights = {"answer": 1.0, "start": 0.0 if workspace == "prompt" else 1.0}
    made = Setup(weights, WORKSPACES[workspace])
    expected, actual = made.terms(plan=LoopPlan(4)), made.terms(plan=LoopPlan(4, backprop))
    assert actual.keys() == expected.keys() == {name for name, weight in weights.items() if weight}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_truncated_backpropagation(workspace):
    made = Setup({"answer": 1.0}, WORKSPACES[workspace])
    reasoner, batch = made.reasoner, made.batch
    context = reasoner.encode(batch["input_ids"], batch["attention_mask"])
    prompt = None if workspace == "prompt" else next(context.layers())[1]
    if prompt is not None:
        prompt.retain_grad()
    states = reasoner.unroll(context, 4, backprop=2)
    reasoner.close(context, states, torch.full((4,), 4))
    reasoner.head(context.state).logsumexp(-1).sum().backward()
    touched = {name for name, p in reasoner.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.rpartition("loop_")[2][:2] for name in touched if "loop_" in name} == {"03", "04"}
    assert prompt is None or prompt.grad.abs().sum() > 0


@pytest.mark.parametrize("workspace", ["block", "prompt"])
def test_terms_fall_in_other_workspaces(workspace):
    loop = {**WORKSPACES[workspace], "timestep": {"kind": "learned", "noise_level": True}}
    history = Setup({"answer": 1.0, "frontier": 1.0}, loop, shake=False).learn()
    for name in ("answer", "frontier"):
        assert history[-1][name] < 0.8 * history[0][name], name


def test_an_answer_prefix_is_fed_before_the_answer_is_read():
    made = Setup({"answer": 1.0}, text={"answer_prefix": "Every impus", "max_new_tokens": 6})
    reasoner, batch = made.reasoner, made.batch
    with torch.no_grad():
        context = reasoner.encode(batch["input_ids"], batch["attention_mask"])
        reasoner.close(context, reasoner.unroll(context, 4), batch["exits"])
        looped = torch.ones(4, dtype=torch.bool)
        present = torch.ones(batch["answer_ids"][:, :-1].shape, dtype=torch.bool)
        logits = reasoner.answer_logits(context, batch["answer_ids"][:, :-1], present, looped)
        expected = F.cross_entropy(logits.flatten(0, 1), batch["answer_ids"][:, 1:].flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(made.terms()["answer"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_latent_decoder_learns_to_write_the_answers():
    decoder = {"answers": "latent_decoder", "latent_decoder": tiny.LATENT_DECODER}
    for workspace in WORKSPACES.values():
        made = Setup({"answer": 1.0}, {**workspace, "decoder": decoder}, shake=False)
        history = made.learn()
        assert history[-1]["answer"] < 0.5 * history[0]["answer"]


def test_written_steps_have_no_second_first_token():
    """Without a loop, no term asks for the answer's first token where the chain's first token stands."""
    made = Setup({"answer": 1.0, "start": 1.0}, WORKSPACES["append"])
    assert set(made.terms(**made.plan(0))) == {"answer"}
    assert set(made.terms()) == {"answer", "start"}


STAGE = DATA["stages"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_iterations": 0}, r"stages\.0 has batches of 0 iterations, .*: start 1$"),
        ({"stages": [STAGE, {**STAGE, "iterations": 0}]}, r"stages\.1 has batches of 0 iterations"),
        ({"objectives": {"answer": 0, "fixed_point": 1}, "stages": [{**STAGE, "iterations": 1}]}, "fixed_point 2"),
        (
            {"objectives": {"answer": 1, "start": 1}, "stages": [{**STAGE, "iterations": 0, "without": ["answer"]}]},
            "start 1",
        ),
    ],
)
def test_a_batch_without_a_loss_term_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_defined(recipe(**{"objectives": {"answer": 0, "start": 1}, **changes}))

"""Objectives that read the chain of thought: steps, thoughts, cot, cot_states, codi."""

import pytest
import torch
import torch.nn.functional as F

from slr_core.training.data import IGNORE
from slr_core.training.objectives.codi import layer_distance
from slr_core.training.objectives.thoughts import append_end
from tests import tiny
from tests.training.objectives.conftest import Setup
from tests.training.recipe import DATA

BLOCK = {"workspace": "block", "block_size": 6}
DECODER = {"decoder": {"latent_decoder": tiny.LATENT_DECODER}}


def base_states(made, ids):
    """Every layer's states of plain token ids, through the base model alone."""
    with torch.no_grad():
        return made.reasoner.base(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states


def prompt_ids(made, row):
    return made.batch["input_ids"][row][made.batch["attention_mask"][row].bool()].tolist()


def real(ids):
    return [i for i in ids.tolist() if i != IGNORE]


def last_states(made):
    with torch.no_grad():
        context = made.reasoner.encode(made.batch["input_ids"], made.batch["attention_mask"])
        return made.reasoner.unroll(context, 4)


# -- steps (LOTUS) ---------------------------------------------------------------------------------------


def test_a_block_position_is_scored_on_its_own_token_of_the_chain():
    made = Setup({"steps": 1.0}, BLOCK, thoughts_per_step=2)
    states, losses = last_states(made)[:, -1], []
    for row, item in enumerate(made.items):
        for k, step in enumerate(item.example.steps):
            ids = made.reasoner.tokenizer(step).input_ids
            assert len(ids) == 2
            for j, token in enumerate(ids):
                losses.append(float(-made.reasoner.head(states[row, 2 * k + j]).log_softmax(-1)[token].detach()))
    assert float(made.terms()["steps"].detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_step_is_scored_in_every_iteration_from_its_own_on():
    made = Setup({"steps": 1.0}, BLOCK, thoughts_per_step=2, supervised="every")
    states, losses = last_states(made), []
    for row, item in enumerate(made.items):
        for k, step in enumerate(item.example.steps):
            for j, token in enumerate(made.reasoner.tokenizer(step).input_ids):
                for t in range(k + 1, 5):
                    logits = made.reasoner.head(states[row, t, 2 * k + j])
                    losses.append(float(-logits.log_softmax(-1)[token].detach()))
    assert float(made.terms()["steps"].detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_supervised_in_every_iteration_a_step_needs_one():
    made = Setup({"steps": 1.0}, BLOCK, thoughts_per_step=2, supervised="every")
    assert made.batch["work"].tolist() == [len(item.example.steps) for item in made.items]
    assert Setup({"steps": 1.0}, BLOCK, thoughts_per_step=2).batch["work"].tolist() == [
        2 * len(item.example.steps) for item in made.items
    ]


JACOBI = {**BLOCK, "block_size": 12, "feedback": "shifted", "projection": {"kind": "expected_embedding"}}


def test_positions_of_a_chain_are_asked_for_the_next_token_of_the_chain():
    made = Setup({"steps": 1.0}, JACOBI, supervised="chain")
    states, losses = last_states(made), []
    for row, item in enumerate(made.items):
        steps = [made.reasoner.tokenizer(step).input_ids for step in item.example.steps]
        written = [*(token for step in steps for token in step), *made.reasoner.tokenizer("#").input_ids]
        for t in range(1, 5):
            for p, token in enumerate(written[1:13]):
                losses.append(float(-made.reasoner.head(states[row, t, p]).log_softmax(-1)[token].detach()))
    assert float(made.terms()["steps"].detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_only_iterations_with_gradients_are_supervised():
    made = Setup({"steps": 1.0}, JACOBI, supervised="chain")
    all_four, last = (float(made.terms(**made.plan(4, backprop))["steps"].detach()) for backprop in (None, 1))
    assert all_four != pytest.approx(last, rel=1e-3)
    assert float(made.terms(**made.plan(1))["steps"].detach()) != pytest.approx(last, rel=1e-3)


SOFT = {"projection": {"kind": "expected_embedding"}}


def test_thoughts_of_a_chain_are_asked_for_its_next_token_and_then_for_its_end():
    stages = [{**DATA["stages"][0], "iterations": 4, "exit": "own"}]
    made = Setup({"steps": 1.0}, SOFT, supervised="chain", stages=stages)
    states, losses = last_states(made)[:, 1:, 0], []
    for row, item in enumerate(made.items):
        steps = [made.reasoner.tokenizer(step).input_ids for step in item.example.steps]
        chain = [token for step in steps for token in step]
        (mark,) = made.reasoner.tokenizer("#").input_ids
        written = [*chain, mark][1:5]
        for t, token in enumerate(written):
            losses.append(float(-made.reasoner.head(states[row, t]).log_softmax(-1)[token].detach()))
        assert real(made.batch["cot_ids"][row])[: len(chain) + 1] == [*chain, mark]
        assert made.batch["work"][row] == len(chain)
        assert made.batch["exits"][row] == min(4, len(chain))
    assert float(made.terms()["steps"].detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_longer_steps_are_cut():
    made = Setup({"steps": 1.0}, thoughts_per_step=1)
    states, losses = last_states(made)[:, 1:, 0], []
    for row, item in enumerate(made.items):
        for k, step in enumerate(item.example.steps):
            token = made.reasoner.tokenizer(step).input_ids[0]
            losses.append(float(-made.reasoner.head(states[row, k]).log_softmax(-1)[token].detach()))
    assert float(made.terms()["steps"].detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_steps_left_in_words_are_not_asked_of_the_loop():
    stages = [
        {
            "steps": 1,
            "iterations": 4,
            "replaced": 1,
            "data": [{"task": "prosqa", "generator_options": {"nodes": 8, "min_hops": 2, "max_hops": 3}}],
        }
    ]
    made = Setup({"steps": 1.0, "answer": 1.0}, stages=stages)
    states = last_states(made)[:, 1:, 0]
    first = [made.reasoner.tokenizer(item.example.steps[0]).input_ids[0] for item in made.items]
    expected = F.cross_entropy(made.reasoner.head(states[:, 0]), torch.tensor(first))
    torch.testing.assert_close(made.terms()["steps"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loop", [{}, BLOCK], ids=["append", "block"])
def test_states_learn_the_tokens_of_their_steps(loop):
    history = Setup({"steps": 1.0}, loop, shake=False, thoughts_per_step=2).learn()
    assert history[-1]["steps"] < 0.5 * history[0]["steps"]


# -- thoughts (SIM-CoT) ----------------------------------------------------------------------------------


def test_a_thought_is_scored_on_its_step_through_the_decoder():
    made = Setup({"thoughts": 1.0}, DECODER)
    states, losses = last_states(made)[:, 1:], []
    end = made.reasoner.tokenizer.eos_token_id
    for row, item in enumerate(made.items):
        for k, step in enumerate(item.example.steps):
            ids = torch.tensor([[*made.reasoner.tokenizer(step).input_ids, end]])
            seen = torch.ones(1, 1, dtype=torch.bool)
            logits = made.reasoner.decode_latent(states[row, k][None], seen, ids[:, :-1])
            losses.append(F.cross_entropy(logits[0], ids[0], reduction="none"))
    torch.testing.assert_close(made.terms()["thoughts"], torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)


def test_the_states_of_a_block_say_the_whole_chain():
    made = Setup({"thoughts": 1.0}, {**DECODER, **BLOCK})
    states, losses = last_states(made)[:, -1], []
    for row, item in enumerate(made.items):
        ids = [*made.reasoner.tokenizer(" ".join(item.example.steps)).input_ids, made.reasoner.tokenizer.eos_token_id]
        seen = torch.ones(1, 6, dtype=torch.bool)
        logits = made.reasoner.decode_latent(states[[row]], seen, torch.tensor([ids[:-1]]))
        losses.append(F.cross_entropy(logits[0], torch.tensor(ids), reduction="none"))
    torch.testing.assert_close(made.terms()["thoughts"], torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)


def test_gaps_between_steps_are_closed():
    ids = torch.tensor([[4, IGNORE, 5, 6], [IGNORE] * 4, [1, 2, 3, 4]])
    assert append_end(ids, 9).tolist() == [[4, 5, 6, 9, IGNORE], [9, *[IGNORE] * 4], [1, 2, 3, 4, 9]]


@pytest.mark.slow
@pytest.mark.parametrize("loop", [{}, BLOCK, {"workspace": "prompt"}], ids=["append", "block", "prompt"])
def test_the_decoder_learns_to_put_thoughts_into_words(loop):
    history = Setup({"thoughts": 1.0}, {**DECODER, **loop}, shake=False).learn()
    assert history[-1]["thoughts"] < 0.5 * history[0]["thoughts"]


# -- the chain in words ----------------------------------------------------------------------------------


def test_the_chain_in_words_is_scored_as_the_base_model_writes_it():
    made = Setup({"cot": 1.0})
    total = count = 0.0
    for row in range(4):
        prompt, chain = prompt_ids(made, row), real(made.batch["cot_ids"][row])
        with torch.no_grad():
            logits = made.reasoner.base(input_ids=torch.tensor([prompt + chain])).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(chain), reduction="sum"))
        count += len(chain)
    assert float(made.terms()["cot"].detach()) == pytest.approx(total / count, rel=1e-4)


def test_the_base_model_learns_the_chain_in_words():
    history = Setup({"cot": 1.0}, shake=False).learn()
    assert history[-1]["cot"] < 0.5 * history[0]["cot"]


@pytest.mark.parametrize("loop", [{}, {**BLOCK, "block_size": 3}], ids=["append", "block"])
def test_states_are_compared_to_those_after_the_steps_in_words(loop):
    made = Setup({"cot_states": 1.0}, loop)
    states = last_states(made)
    own = states[:, 1:, 0] if not loop else states[:, -1]
    expected = []
    for row, item in enumerate(made.items):
        prompt, chain = prompt_ids(made, row), real(made.batch["cot_ids"][row])
        words = base_states(made, prompt + chain)[-1][0, len(prompt) :]
        for k in range(len(item.example.steps)):
            target = words[2 * k + 1]
            expected.append(float((own[row, k] - target).pow(2).sum() / target.pow(2).sum()))
    assert float(made.terms()["cot_states"].detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_the_states_move_towards_the_words_and_not_the_other_way():
    history = Setup({"cot_states": 1.0}, shake=False).learn()
    assert history[-1]["cot_states"] < 0.6 * history[0]["cot_states"]
    made = Setup({"cot_states": 1.0})
    words = made.rollout().chain_outputs
    assert words.states.requires_grad
    made.terms()["cot_states"].backward()
    # What only the un-looped model's words pass through: the embedding of the mark.
    mark = made.collator.tokenizer("#").input_ids[0]
    assert made.reasoner.base.get_input_embeddings().weight.grad[mark].abs().sum() == 0


# -- CODI ------------------------------------------------------------------------------------------------


def test_layers_are_scaled_by_the_teachers_deviation():
    student, teacher = [torch.randn(4, 5) for _ in range(3)], [3 * torch.randn(4, 5) for _ in range(3)]
    parts = [F.smooth_l1_loss(s, t) / t.std() for s, t in zip(student, teacher, strict=True)]
    everyone = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(layer_distance(student, teacher, everyone).value, torch.stack(parts).mean())
    two = torch.tensor([True, False, True, False])
    parts = [F.smooth_l1_loss(s[two], t[two]) / t.std() for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(layer_distance(student, teacher, two).value, torch.stack(parts).mean())


@pytest.mark.parametrize("loop", [{}, BLOCK], ids=["append", "block"])
def test_codi_distance(loop):
    made = Setup({"codi": 1.0}, loop)
    reasoner, batch = made.reasoner, made.batch
    teacher, student = [], []
    for row in range(4):
        prompt, chain = prompt_ids(made, row), real(batch["cot_ids"][row])
        at = len(prompt) + int(batch["mark_at"][row])
        assert reasoner.tokenizer.decode([(prompt + chain)[at]]).strip() == "#"
        teacher.append([layer[0, at] for layer in base_states(made, prompt + chain)])
        with torch.no_grad():
            exit = int(batch["exits"][row])
            context = reasoner.encode(batch["input_ids"][[row]], batch["attention_mask"][[row]])
            context.passes = []
            reasoner.close(context, reasoner.unroll(context, exit), torch.tensor([exit]))
            student.append([layer[0, -1] for layer in context.passes[-1]])
    layers = len(teacher[0])
    assert layers == 2  # embeddings and one layer
    parts = []
    for layer in range(layers):
        s, t = (torch.stack([row[layer] for row in rows]) for rows in (student, teacher))
        parts.append(F.smooth_l1_loss(s, t) / t.std())
    torch.testing.assert_close(made.terms()["codi"], torch.stack(parts).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loop", [{}, BLOCK], ids=["append", "block"])
def test_self_distillation_brings_both_together(loop):
    history = Setup({"codi": 1.0, "cot": 0.1}, loop, shake=False).learn()
    assert history[-1]["codi"] < 0.6 * history[0]["codi"]

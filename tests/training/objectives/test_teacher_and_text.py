"""A latent reasoner distilled into a smaller one, and pre-training with loops."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from slr_core.checkpoint.init import Recursive, init_checkpoint
from slr_core.errors import ConfigError
from slr_core.training.build import build, load_teacher
from slr_core.training.config import ObjectiveWeights, TrainConfig
from slr_core.training.data import IGNORE, Collator, LoopPlan, StageStream
from slr_core.training.loss_module import LossModule
from slr_core.training.objectives import Rollout, losses
from slr_core.training.objectives.teacher import teacher_logits
from slr_core.validation import validated
from tests import tiny
from tests.training.objectives.conftest import Setup
from tests.training.recipe import DATA, recipe

WIDE = {**DATA["base"], "hidden_size": 32, "num_hidden_layers": 2}
WEIGHTS = {"teacher_states": 1.0, "teacher_logits": 1.0}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A student's setup, its objective with a teacher twice as wide."""
    folder = str(tmp_path_factory.mktemp("teacher") / "checkpoint")
    teacher = build(recipe(base=WIDE, seed=5))
    tiny.shake(teacher)
    teacher.save_pretrained(folder)
    setup = Setup(WEIGHTS, teacher=folder, shake=False)
    return setup, LossModule(setup.reasoner, setup.config, load_teacher(setup.config, setup.reasoner))


def test_teacher_losses(distilled):
    setup, objective = distilled
    batch = setup.batch
    run = Rollout(objective.reasoner, batch, setup.config, objective.teacher, objective.bridge)
    terms = {name: term.value.detach() for name, term in losses(run).items()}
    sides = []
    with torch.no_grad():
        for model in (objective.teacher, objective.reasoner):
            context = model.encode(batch["input_ids"], batch["attention_mask"])
            states = model.unroll(context, 4)
            model.close(context, states, batch["exits"])
            first = model.head(context.state)[:, None]
            ids = batch["answer_ids"][:, :-1]
            rest = model.answer_logits(context, ids.clamp_min(0), ids != IGNORE, torch.ones(4, dtype=torch.bool))
            sides.append((states[:, 1:, 0], torch.cat([first, rest], dim=1).softmax(-1)))
        (wide, p), (own, q) = sides
        moved = own @ objective.bridge.weight.T
        assert moved.shape == wide.shape
        states = ((moved - wide).norm(dim=-1) / wide.norm(dim=-1)).pow(2).mean()
        logits = (p * (p / q).log()).sum(-1)[batch["labels"] != IGNORE].mean()
    torch.testing.assert_close(terms["teacher_states"], states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["teacher_logits"], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_student_learns_and_the_teacher_stays(distilled):
    setup, objective = distilled
    before = copy.deepcopy(objective.teacher.state_dict())
    objective.train()
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer, history = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(40):
        terms = {name: term.value for name, term in objective(setup.batch)[0].items()}
        history.append({name: float(value.detach()) for name, value in terms.items()})
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    for name in WEIGHTS:
        assert history[-1][name] < 0.7 * history[0][name], name
    assert all(torch.equal(value, before[key]) for key, value in objective.teacher.state_dict().items())


def test_a_teacher_with_other_tokens_is_refused(tmp_path):
    tiny.reasoner().save_pretrained(str(tmp_path / "other"))
    config = recipe(objectives=WEIGHTS, teacher=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="different vocabularies"):
        load_teacher(config, build(config))


def test_a_language_model_teaches_without_a_loop(tmp_path):
    """A recursive model of full rank has nothing to learn from its original, at full depth."""
    plain = tiny.base()
    plain.save_pretrained(tmp_path / "plain")
    tiny.tokenizer().save_pretrained(tmp_path / "plain")
    init_checkpoint(str(tmp_path / "plain"), tmp_path / "recursive", recursive=Recursive(2))
    data = [{"task": "text", "file": str(tmp_path / "questions.jsonl")}]
    lines = [{"question": f"w{i} w3", "answer": f"w{i + 2} w5"} for i in range(8)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({**line, "steps": []}) + "\n" for line in lines))
    config = validated(
        TrainConfig,
        {
            "output_dir": "unused",
            "base": {"from": str(tmp_path / "recursive")},
            "teacher": str(tmp_path / "plain"),
            "optimizer": {"batch_size": 4},
            "objectives": {"answer": 1.0, "teacher_logits": 1.0},
            "stages": [{"steps": 1, "iterations": 2, "data": data}],
        },
    )
    student = build(config)
    teacher = load_teacher(config, student)
    batch = Collator(student.tokenizer, config, student.config.text)(list(StageStream(config))[-1])
    for iterations, least, most in ((2, -1e-6, 1e-6), (1, 1e-3, 1e3)):
        changes = {"plan": LoopPlan(iterations), "exits": torch.full_like(batch["exits"], iterations)}
        rollout = Rollout(student, {**batch, **changes}, config, teacher)
        assert least < float(teacher_logits(rollout).value.detach()) < most
    with pytest.raises(ConfigError, match="has no trained loop"):
        load_teacher(config.model_copy(update={"objectives": ObjectiveWeights(teacher_states=1)}), student)


# -- plain text ------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    """Text with a rule: every word is followed by the next of its row, and each row comes again and again."""
    rows = [["red", "green", "blue"], ["one", "two", "three", "four"]]
    words = [word for i in range(120) for word in rows[i % 2]]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words))
    return str(path)


def plain(path, workspace, steps=1, **weights):
    stage = {
        "steps": steps,
        "data": [{"text": path, "characters": 90}],
        "iterations": {"mean": 3, "least": 1, "most": 4},
    }
    base = {**DATA["base"], "tokenizer": "words"}
    return Setup(weights, {"workspace": workspace}, shake=False, stages=[stage], base=base, seed=2)


def test_next_tokens_are_read_from_the_closing_pass(text):
    made = plain(text, "prompt", text=1.0)
    tiny.shake(made.reasoner)
    batch, total, count = made.batch, 0.0, 0
    for row in range(4):
        with torch.no_grad():
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
            context = made.reasoner.encode(ids, torch.ones_like(ids))
            context.passes = []
            exit = int(batch["exits"][row])
            made.reasoner.close(context, made.reasoner.unroll(context, exit), torch.tensor([exit]))
            logits = made.reasoner.head(context.passes[-1][-1])[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert float(made.terms()["text"].detach()) == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("workspace", ["prompt", "append", "token"])
def test_a_looped_model_learns_plain_text(workspace, text):
    weights = {"answer": 1.0} if workspace == "append" else {"answer": 1.0, "text": 1.0}
    made = plain(text, workspace, steps=90, **weights)
    reasoner = made.reasoner.train()
    optimizer = torch.optim.AdamW(reasoner.parameters(), lr=1e-2)
    lengths = set()
    for items in StageStream(made.config):
        terms = made.terms(**made.collator(items))
        lengths.add(items[0].plan.iterations)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    assert lengths == {1, 2, 3, 4}
    # Seven words: guessing costs log 7 nats, the rule next to nothing, however long the loop.
    for iterations in (1, 2, 4):
        for name, value in made.terms(plan=LoopPlan(iterations), exits=torch.full((4,), iterations)).items():
            assert float(value.detach()) < 0.5, (name, iterations)


def test_a_piece_of_text_has_no_end(text):
    made = plain(text, "append", answer=1.0)
    assert made.reasoner.tokenizer.eos_token_id not in made.batch["answer_ids"]
    for item in made.items:
        piece = item.example.question + item.example.answer
        assert 75 < len(piece) <= 88
        assert set(piece.split()) <= {"red", "green", "blue", "one", "two", "three", "four"}
        assert item.example.answer.startswith(" ")

"""The workspace ``token``: answers and text are scored at every exit."""

import pytest
import torch
import torch.nn.functional as F

from slr_core.training.data import IGNORE
from tests.training.objectives.conftest import Setup


@pytest.fixture(scope="module")
def made():
    loop = {"workspace": "token", "feedback": "raw", "projection": {"kind": "identity"}, "halting_head": True}
    return Setup({"answer": 1.0, "text": 1.0, "halting": 1.0}, loop)


def test_every_exit_is_scored(made):
    """Each iteration of prompt and answer, as one sequence alone and without caches of rows beside it."""
    batch, total, counted = made.batch, {"answer": 0.0, "text": 0.0}, {"answer": 0, "text": 0}
    iterations = batch["plan"].iterations
    assert iterations > 1
    for row in range(len(batch["input_ids"])):
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        answer = batch["labels"][row][batch["labels"][row] != IGNORE]
        ids = torch.cat([prompt, answer])[None]
        with torch.no_grad():
            context = made.reasoner.encode(ids, torch.ones_like(ids))
            states = made.reasoner.unroll(context, iterations)[0, 1:]
            losses = torch.stack(
                [F.cross_entropy(made.reasoner.head(h)[:-1], ids[0, 1:], reduction="none") for h in states]
            )
        split = len(prompt) - 1
        for name, part in (("text", losses[:, :split]), ("answer", losses[:, split:])):
            total[name] += float(part.sum())
            counted[name] += part.numel()
    terms = made.terms()
    for name in total:
        assert float(terms[name].detach()) == pytest.approx(total[name] / counted[name], rel=1e-4)


def test_without_gradients_exits_are_left_out(made):
    kept = made.terms(**made.plan(3, backprop=1))
    last = made.rollout(**made.plan(3)).states_per_token[:, -1]
    expected = F.cross_entropy(
        made.reasoner.head(last).flatten(0, 1), made.batch["labels"].flatten(), ignore_index=IGNORE
    )
    torch.testing.assert_close(kept["answer"], expected, rtol=1e-4, atol=1e-5)


def test_without_a_loop_it_is_the_base(made):
    terms = made.terms(**made.plan(0))
    assert set(terms) == {"answer", "text"}
    batch = made.batch
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    with torch.no_grad(), made.reasoner.adapters.use(None):
        logits = made.reasoner.base(input_ids=ids, attention_mask=mask.long()).logits
    labels = ids.masked_fill(~mask, IGNORE)[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    if bool(mask[:, 0].all()):  # padded on the right, where position ids do not matter
        torch.testing.assert_close(terms["text"], expected, rtol=1e-4, atol=1e-5)


def test_only_the_head_learns_from_halting(made):
    made.reasoner.zero_grad()
    made.terms()["halting"].backward()
    assert {name.split(".")[0] for name, p in made.reasoner.named_parameters() if p.grad is not None} == {"halting"}

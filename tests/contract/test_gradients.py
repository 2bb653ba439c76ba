"""Gradients: they reach every part that trains and nothing that is frozen, and are those of the function."""

import pytest
import torch

from tests import tiny

# Every part that has weights.
WHOLE = {
    "projection": {"kind": "mlp"},
    "timestep": {"kind": "learned", "combine": "concat", "noise_level": True},
    "residual": {"norm": True},
    "lora": {"rank": [1, 2, 3], "decode_rank": 2},
    "halting_head": True,
    "decoder": {"latent_decoder": tiny.LATENT_DECODER},
}


def backward(made):
    """One backward pass through states, answer, halting head and latent decoder."""
    context = made.encode(*tiny.batch(tiny.PROMPTS[:4]))
    own = context.valid_mask
    states = made.unroll(context, 3)
    assert not context.change.requires_grad  # the noise level is read, not trained through
    made.close(context, states, torch.full((4,), 3))
    tokens, present = tiny.batch([tiny.words(1, 2)] * 4)
    answer = made.answer_logits(context, tokens, present.bool(), torch.ones(4, dtype=torch.bool))
    loss = made.head(states).logsumexp(-1).sum() + made.head(context.state).logsumexp(-1).sum()
    loss = loss + answer.logsumexp(-1).sum()
    if made.halting is not None:
        loss = loss + made.halting(states, own[:, None]).sum()
    if made.decoder is not None:
        memory = states[:, 1:].flatten(1, 2)  # a single state would leave attention nothing to choose
        loss = loss + made.decode_latent(memory, own.repeat(1, 3), tokens).logsumexp(-1).sum()
    loss.backward()
    return states


def without_dropout(made):
    made = tiny.twin(made).train()
    for module in made.modules():  # GPT-2's
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made


@pytest.mark.parametrize("parts", [{}, WHOLE], ids=["default", "whole"])
def test_gradients_reach_every_part(kind, loop, parts):
    made = without_dropout(tiny.reasoner(kind, {**parts, **loop}, decode=True))
    states = backward(made)
    assert states.shape[:2] + states.shape[3:] == (4, 4, 32)
    without = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert all(p.grad.isfinite().all() for p in made.parameters())


def test_gradients_reach_nothing_that_is_frozen(kind, loop):
    plain = tiny.base(kind).requires_grad_(False)
    made = without_dropout(tiny.reasoner(kind, {**WHOLE, **loop}, plain=plain))
    backward(made)
    frozen = {name for name, p in made.named_parameters() if p.grad is None}
    base = {name for name, _ in made.named_parameters() if name.startswith("base.") and ".lora_" not in name}
    assert frozen == base
    assert base


@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_gradients_are_those_of_the_function(workspace):
    # Finite differences in double precision, through adapters, timestep, gate and block (of the tiny models GPT-2
    # alone computes in double throughout).
    made = tiny.reasoner("gpt2", tiny.WORKSPACES[workspace], decode=True).double()
    parameters = {name: p for name, p in made.named_parameters() if p.requires_grad}
    chosen = [name for name in parameters if "lora_B.loop_02" in name or "lora_B.decode" in name][:3]
    chosen += [name for name in parameters if name.endswith(("gate", "timestep.table", "vectors"))]
    assert len(chosen) == (6 if workspace == "block" else 5)
    input_ids, mask = tiny.batch(tiny.PROMPTS[:2])
    tokens, present = tiny.batch([tiny.words(1, 2)] * 2)

    def value():
        context = made.encode(input_ids, mask)
        states = made.unroll(context, 3)
        made.close(context, states, torch.tensor([3, 2]))
        answer = made.answer_logits(context, tokens, present.bool(), torch.ones(2, dtype=torch.bool))
        return states.sin().sum() + context.state.sin().sum() + answer.sin().sum()

    value().backward()
    for name in chosen:
        parameter, step = parameters[name], 1e-6
        with torch.no_grad():
            at = int(parameter.grad.abs().argmax())
            flat = parameter.view(-1)
            flat[at] += step
            up = value()
            flat[at] -= 2 * step
            down = value()
            flat[at] += step
        slope = parameter.grad.view(-1)[at]
        assert float((up - down) / (2 * step)) == pytest.approx(float(slope), rel=1e-4), name

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from slr_core.training.data import LoopPlan
from slr_core.training.frozen import FrozenCopies, prefers_bfloat16
from slr_core.training.loss_module import LossModule
from slr_core.training.objectives import Rollout, losses
from slr_core.training.objectives.token_loss import state_loss, token_loss
from slr_core.training.split_cache import attend_split, is_split, split_attention
from tests import tiny
from tests.training.recipe import recipe

IGNORE = -100
OBJECTIVES = {"answer": 1.0, "start": 0.3, "cot": 0.5, "codi": 1.0, "fixed_point": 1.0}


def batch(iterations, backprop=None):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 6 + [0]])
    answers = torch.tensor([[5, 6, 7], [8, 9, IGNORE], [4, IGNORE, IGNORE]])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "answer_ids": answers,
        "labels": answers,
        "first": answers[:, 0],
        "work": torch.tensor([1, 2, 1]),
        "exits": torch.tensor([iterations, max(0, iterations - 1), iterations]),
        "cot_ids": torch.tensor([[10, 11, 12, 5], [13, 14, 8, 9], [15, 4, IGNORE, IGNORE]]),
        "mark_at": torch.tensor([2, 1, 0]),
        "plan": LoopPlan(iterations, backprop),
    }


def gradients(made, terms):
    made.zero_grad()
    sum(term.value for term in terms.values()).backward()
    return {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("kind", "workspace", "iterations", "backprop"),
    [
        *((kind, "append", 3, None) for kind in tiny.KINDS),
        ("llama", "append", 3, 1),
        ("qwen3", "append", 0, None),
        ("qwen2", "block", 3, None),
        ("gpt2", "block", 3, 1),
    ],
)
def test_same_gradients(kind, workspace, iterations, backprop):
    """As over an ordinary cache, in fp32, whether the base is trained or frozen."""
    made = tiny.reasoner(kind, tiny.WORKSPACES[workspace]).eval()  # no dropout: GPT-2 has some
    config = recipe(objectives=OBJECTIVES, chains=0)
    for frozen in (False, True):
        for name, parameter in made.base.named_parameters():
            parameter.requires_grad_(".lora_" in name or not frozen)
        plain = losses(Rollout(made, batch(iterations, backprop), config))
        expected = gradients(made, plain) if iterations or not frozen else {}
        with split_attention(made.base):
            assert is_split(made.base)
            found = losses(Rollout(made, batch(iterations, backprop), config))
        assert found.keys() == plain.keys()
        for name, term in found.items():
            torch.testing.assert_close(term.value, plain[name].value, rtol=1e-5, atol=1e-6)
        if expected:
            torch.testing.assert_close(gradients(made, found), expected, rtol=1e-5, atol=1e-5)
    assert not is_split(made.base)


def test_head_loss():
    """The loss read at states, and its gradients, are those of the logits; states without a label get none."""
    made = tiny.reasoner("llama").train()
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(300, 2, made.base.config.hidden_size, generator=generator)
    labels = torch.randint(0, 40, (300, 2), generator=generator)
    labels[::3] = IGNORE
    found = []
    for loss in (lambda x: state_loss(made, x, labels), lambda x: token_loss(made.head(x), labels)):
        made.zero_grad()
        x = states.clone().requires_grad_()
        mean = loss(x)
        (3 * mean.value).backward()
        found.append((mean.total.detach(), mean.divisor, x.grad, made.base.get_output_embeddings().weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][2][::3].abs().sum() == 0


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a CPU with bf16")
def test_frozen_weights_are_reordered():
    """Products of large frozen layers, and the gradients of their inputs, are those of the weights in bfloat16."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 320, bias=False), torch.nn.Linear(320, 8, bias=False))
    model.requires_grad_(False)
    copies, found = FrozenCopies(model), []
    for reordered, context in ((True, copies.use()), (False, nullcontext())):
        x = torch.randn(5, 3, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16), context:
            assert ("forward" in vars(model[0])) == reordered
            assert "forward" not in vars(model[1]), "a small layer"
            y = model(x)
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad))
    assert "forward" not in vars(model[0])
    torch.testing.assert_close(*found, rtol=0.03, atol=0.03)


def test_attention_in_bfloat16():
    """Without gradients, short texts take the path in parts; its result is that of fused attention."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 16, generator=generator).bfloat16() for heads in (6, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    module = SimpleNamespace(num_key_value_groups=3, training=True, is_causal=True)
    with torch.no_grad():
        found, _ = attend_split(module, query, key, value, mask)
        expected, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_frozen_weights_in_bfloat16():
    """They are used inside the block alone, and the gradients of the adapters stay close to those in fp32."""
    made = tiny.reasoner("llama").train()
    for name, parameter in made.base.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    config, data = recipe(objectives={"answer": 1.0}, chains=0), batch(3)
    expected = gradients(made, LossModule(made, config)(data)[0])
    half = LossModule(made, config.model_copy(update={"bf16": True}))
    terms, _ = half(data)
    found = gradients(made, terms)
    assert terms["answer"].total.dtype == torch.float32
    assert found.keys() == expected.keys()
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert any(not torch.equal(found[name], expected[name]) for name in found)
    for name, gradient in found.items():
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0) > 0.98, name
    copies = FrozenCopies(made.base)
    layer = made.base.model.layers[0].mlp.up_proj
    with copies.use():
        assert {p.dtype for p in layer.parameters() if not p.requires_grad} == {torch.bfloat16}
    after = dict(made.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())
    assert not prefers_bfloat16(made.base)

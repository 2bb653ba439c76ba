import pytest
import torch
from torch import nn

from slr_core.training.last_layer import last_positions_alone
from tests import tiny


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_what_is_read_stays_the_same(kind):
    """The state at the last real position and the cache are those of the whole pass, padded on either side."""
    made = tiny.reasoner(kind, {"workspace": "append"}).requires_grad_(False)
    ids = torch.tensor([[5, 9, 4, 11], [7, 3, 6, 6]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for present in (mask, mask.flip(1)):
        whole = made.encode(ids, present)
        with last_positions_alone(made.base, present.bool()):
            part = made.encode(ids, present)
        torch.testing.assert_close(part.state, whole.state)
        for (_, keys, values), (_, other_keys, other_values) in zip(part.layers(), whole.layers(), strict=True):
            torch.testing.assert_close(keys, other_keys)
            torch.testing.assert_close(values, other_values)


def test_the_last_layer_computes_one_position_of_a_row():
    made = tiny.reasoner(loop={"workspace": "append"}).requires_grad_(False)
    first, last = (layer.mlp for layer in (made.base.base_model.layers[0], made.base.base_model.layers[-1]))
    sizes = {}
    for name, mlp in (("first", first), ("last", last)):
        inner = next(module for module in mlp.modules() if isinstance(module, nn.Linear))
        inner.register_forward_hook(lambda _, args, output, name=name: sizes.update({name: output.shape[:-1].numel()}))
    ids = torch.tensor([[5, 9, 4, 11], [7, 3, 6, 6]])
    with last_positions_alone(made.base, torch.ones_like(ids).bool()):
        made.encode(ids, torch.ones_like(ids))
    assert sizes == {"first": 8, "last": 2}
    made.encode(ids, torch.ones_like(ids))
    assert sizes == {"first": 8, "last": 8}


def test_a_pass_that_keeps_a_graph_computes_everything():
    """Gradients of the last layer's weights are those of the whole pass."""
    found = []
    for alone in (False, True):
        made = tiny.reasoner(loop={"workspace": "append"})
        ids = torch.tensor([[5, 9, 4, 11]])
        if alone:
            with last_positions_alone(made.base, torch.ones_like(ids).bool()):
                context = made.encode(ids, torch.ones_like(ids))
        else:
            context = made.encode(ids, torch.ones_like(ids))
        made.unroll(context, 2).square().sum().backward()
        found.append({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)

import pytest
import torch

from tests import tiny


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner()


def encoded(made):
    with torch.no_grad():
        return made.encode(*tiny.batch(tiny.PROMPTS[1:3]))


def step(made, context, token):
    one = torch.ones(2, 1, dtype=torch.bool)
    with torch.no_grad():
        return made.answer_logits(context, torch.full((2, 1), token), one, torch.zeros(2, dtype=torch.bool))


def test_a_fork_shares_what_has_run_and_copies_none_of_it(made):
    context = encoded(made)
    fork = context.fork()
    assert fork.cache is not context.cache
    for (layer, keys, values), (other, same_keys, same_values) in zip(context.layers(), fork.layers(), strict=True):
        assert layer is not other
        assert keys.data_ptr() == same_keys.data_ptr()
        assert values.data_ptr() == same_values.data_ptr()


def test_either_goes_on_as_if_the_other_were_not_there(made):
    context, fresh = encoded(made), encoded(made)
    fork = context.fork()
    step(made, fork, 7)
    step(made, fork, 8)
    assert (context.cache.get_seq_length(), fork.cache.get_seq_length()) == (5, 7)
    assert (context.visible.shape[1], fork.visible.shape[1]) == (5, 7)
    assert context.next_position.tolist() == [5, 4]
    assert fork.next_position.tolist() == [7, 6]
    assert torch.equal(step(made, context, 9), step(made, fresh, 9))


def test_a_fork_of_nothing_is_nothing():
    prompt = tiny.reasoner(loop={"workspace": "prompt"})
    fork = encoded(prompt).fork()
    assert list(fork.layers()) == []
    assert fork.cache.get_seq_length() == 0


def test_every_layer_is_told_with_its_keys_and_values(made):
    layers = list(encoded(made).layers())
    assert len(layers) == 2
    for layer, keys, values in layers:
        assert keys is layer.keys
        assert values is layer.values
        assert keys.shape == values.shape == (2, 2, 5, 8)

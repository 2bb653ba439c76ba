import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from slr_core.sampling import SamplingSettings, choose

seeds = st.integers(0, 2**31)
scores = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30).map(torch.tensor)


def draw(logits, count=1, **options):
    settings = SamplingSettings(**options)
    generator = settings.generator()
    return [choose(logits, settings, generator) for _ in range(count)]


@given(scores, st.integers(0, 5), st.floats(0.1, 1), seeds)
def test_temperature_zero_is_greedy(logits, top_k, top_p, seed):
    assert SamplingSettings().generator() is None
    assert draw(logits, temperature=0.0, top_k=top_k, top_p=top_p, seed=seed) == [int(logits.argmax())]


@given(scores, st.floats(0.05, 5), st.integers(0, 10), st.floats(0.05, 1), seeds)
def test_the_same_seed_gives_the_same_tokens(logits, temperature, top_k, top_p, seed):
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    assert draw(logits, 5, **options) == draw(logits, 5, **options)


def test_different_seeds_and_no_seed_differ():
    logits = torch.zeros(1000)
    assert len({tuple(draw(logits, 5, temperature=1.0, seed=seed)) for seed in range(10)}) == 10
    assert draw(logits, 5, temperature=1.0) != draw(logits, 5, temperature=1.0)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    draw(torch.zeros(10), 7, temperature=1.0, seed=0)
    draw(torch.zeros(10), 7, temperature=1.0)
    assert torch.equal(torch.rand(4), expected)


@given(scores, st.integers(1, 40), st.floats(0.1, 3), seeds)
def test_top_k_draws_from_the_k_likeliest(logits, k, temperature, seed):
    drawn = draw(logits, 10, temperature=temperature, top_k=k, seed=seed)
    least = logits.sort(descending=True).values[min(k, len(logits)) - 1]
    assert all(logits[token] >= least for token in drawn)


@given(scores, seeds)
def test_top_k_of_one_is_greedy(logits, seed):
    assume((logits == logits.max()).sum() == 1)
    assert draw(logits, 5, temperature=2.0, top_k=1, seed=seed) == [int(logits.argmax())] * 5


@given(scores, st.floats(1e-6, 0.999), seeds)
def test_top_p_draws_from_the_smallest_set_that_reaches_it(logits, top_p, seed):
    probabilities, order = logits.double().softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    assume(((before - top_p).abs() > 1e-5).all())
    allowed = {float(logits[i]) for i in order[before < top_p]}
    drawn = draw(logits, 10, temperature=1.0, top_p=top_p, seed=seed)
    assert {float(logits[token]) for token in drawn} <= allowed


@given(scores, seeds)
def test_a_tiny_top_p_keeps_the_likeliest(logits, seed):
    drawn = draw(logits, 3, temperature=1.0, top_p=1e-9, seed=seed)
    assert all(logits[token] == logits.max() for token in drawn)


def test_top_k_comes_before_top_p():
    # Of the two kept by top_k the first alone holds 0.5 / 0.9 of the mass.
    logits = torch.tensor([0.5, 0.4, 0.1]).log()
    assert set(draw(logits, 50, temperature=1.0, top_k=2, top_p=0.54, seed=0)) == {0}
    assert set(draw(logits, 50, temperature=1.0, top_k=2, top_p=0.57, seed=0)) == {0, 1}


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    drawn = torch.tensor(draw(probabilities.log(), 4000, temperature=1.0, seed=1)).bincount(minlength=3) / 4000
    torch.testing.assert_close(drawn, probabilities, rtol=0, atol=0.03)


def test_temperature_flattens_and_sharpens():
    logits = torch.tensor([1.0, 0.0])
    share = {t: draw(logits, 2000, temperature=t, seed=2).count(0) / 2000 for t in (0.25, 1.0, 4.0)}
    for t, got in share.items():
        assert got == pytest.approx(float(torch.sigmoid(torch.tensor(1 / t))), abs=0.04)


@given(scores, st.floats(1e-4, 100), seeds)
def test_any_reasonable_temperature_works(logits, temperature, seed):
    (token,) = draw(logits, temperature=temperature, seed=seed)
    assert 0 <= token < len(logits)


@pytest.mark.parametrize("options", [{"temperature": 1e-30}, {"temperature": 1.0, "top_p": 5e-324}])
def test_the_limits_of_the_settings_are_greedy_not_an_error(options):
    logits = torch.tensor([0.0, 1e9, 3.0])
    assert draw(logits, seed=0, **options) == [1]


def test_the_logits_are_not_changed():
    logits = torch.randn(20)
    before = logits.clone()
    draw(logits, 3, temperature=1.0, top_k=3, top_p=0.5, seed=0)
    assert torch.equal(logits, before)

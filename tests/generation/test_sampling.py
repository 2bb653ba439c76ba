import sys

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from slr_core.errors import EngineError
from slr_core.generation import sampling
from slr_core.generation.sampling import sample_token
from slr_core.params import SamplingParams

seeds = st.integers(0, 2**31)
scores = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30).map(torch.tensor)
options = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.05, 5),
        "top_k": st.integers(0, 40),
        "top_p": st.just(1.0) | st.floats(1e-6, 1),
    }
)
# How many top_p tries: as they are, and so few that small vocabularies go through them all.
sizes = st.sampled_from([sampling._SIZES, (1,), (2, 5), (1, 3, 9)])
ALMOST_ONE = 1 - 2**-53  # the highest random number


def draw(logits, count=1, **options):
    settings = SamplingParams(**options)
    generator = settings.generator()
    return [sample_token(logits, settings, generator) for _ in range(count)]


def draw_at(number, logits, sizes=sampling._SIZES, **options):
    """The token that a random number leads to."""
    settings = SamplingParams(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: torch.tensor(number, dtype=torch.float64))
        patch.setattr(sampling, "_SIZES", sizes)
        return sample_token(logits, settings, settings.generator())


def possible(logits, sizes=sampling._SIZES, **options):
    """Every token that some random number leads to; those rarer than 1e-9 may be missed."""
    found = {number: draw_at(number, logits, sizes, **options) for number in (0.0, ALMOST_ONE)}
    gaps = [(0.0, ALMOST_ONE)]
    while gaps:
        low, high = gaps.pop()
        if found[low] != found[high] and high - low > 1e-9:  # a token's numbers lie together
            middle = (low + high) / 2
            found[middle] = draw_at(middle, logits, sizes, **options)
            gaps += [(low, middle), (middle, high)]
    return set(found.values())


def expected(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The tokens that may be drawn, likeliest first, and their probabilities: everything sorted, in float64."""
    ordered, order = (logits.double() / temperature).sort(descending=True, stable=True)
    if top_k:
        ordered, order = ordered[:top_k], order[:top_k]
    probabilities = ordered.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        count = max(1, int((before < top_p).sum()))
        order, probabilities = order[:count], probabilities[:count]
    return order, probabilities / probabilities.sum()


@given(scores, st.integers(0, 5), st.floats(0.1, 1), seeds)
def test_temperature_zero_is_greedy(logits, top_k, top_p, seed):
    assert SamplingParams().generator() is None
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


@given(options, st.booleans(), seeds)
def test_a_draw_takes_one_random_number(options, flat, seed):
    logits = torch.zeros(300) if flat else torch.arange(300.0)
    settings = SamplingParams(seed=seed, **options)
    generator, other = settings.generator(), settings.generator()
    for _ in range(3):
        sample_token(logits, settings, generator)
        torch.rand((), dtype=torch.float64, generator=other)
        assert torch.equal(generator.get_state(), other.get_state())


@given(scores, options, sizes)
def test_the_tokens_that_may_be_drawn_are_those_of_a_full_sort(logits, options, sizes):
    order, probabilities = expected(logits, **options)
    if options["top_p"] < 1:  # rounding decides nothing
        for near in (options["top_p"] * (1 - 1e-9), options["top_p"] * (1 + 1e-9)):
            assume(len(expected(logits, **{**options, "top_p": near})[0]) == len(order))
    drawn = possible(logits, sizes, **options)
    # Of equal logits at the edge either may be kept. What is rare the search may miss, but nothing else is drawn.
    assert {float(logits[token]) for token in drawn} <= set(logits[order].tolist())
    common = logits[order[probabilities > 1e-8]]
    found = logits[sorted(drawn)].sort(descending=True).values
    assert torch.equal(found[found >= common[-1]], common)


@pytest.mark.parametrize(("spread", "path"), [(9, 0), (3, 1), (0.5, 2)])
def test_top_p_of_a_large_vocabulary_is_that_of_a_full_sort(spread, path):
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * spread
    order, _ = expected(logits, top_p=0.9)
    bounds = (0, *sampling._SIZES, len(logits))
    assert bounds[path] < len(order) <= bounds[path + 1]
    ends = [draw_at(number, logits, temperature=1.0, top_p=0.9) for number in (0.0, ALMOST_ONE)]
    assert ends == [order[0], order[-1]]


def test_of_equal_logits_no_more_than_needed_are_kept():
    logits = torch.zeros(10)
    assert len(possible(logits, temperature=1.0)) == 10
    assert len(possible(logits, temperature=1.0, top_k=3)) == 3
    assert len(possible(logits, temperature=1.0, top_p=0.35)) == 4
    assert len(possible(logits, temperature=1.0, top_p=0.5)) == 5
    assert len(possible(logits, temperature=1.0, top_k=8, top_p=0.45)) == 4


@given(scores, seeds)
def test_top_k_of_one_is_greedy(logits, seed):
    assume((logits == logits.max()).sum() == 1)
    assert draw(logits, 5, temperature=2.0, top_k=1, seed=seed) == [int(logits.argmax())] * 5


@given(scores, seeds)
def test_a_tiny_top_p_keeps_the_likeliest(logits, seed):
    drawn = draw(logits, 3, temperature=1.0, top_p=1e-9, seed=seed)
    assert all(logits[token] == logits.max() for token in drawn)


def test_top_k_comes_before_top_p():
    # Of the two kept by top_k the first alone holds 0.5 / 0.9 of the mass.
    logits = torch.tensor([0.5, 0.4, 0.1]).log()
    assert set(draw(logits, 50, temperature=1.0, top_k=2, top_p=0.54, seed=0)) == {0}
    assert set(draw(logits, 50, temperature=1.0, top_k=2, top_p=0.57, seed=0)) == {0, 1}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 6},
        {"top_k": 50},
        {"top_p": 0.8},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.85},
    ],
)
def test_draws_follow_the_distribution(options):
    options = {"temperature": 1.0, **options}
    logits = torch.randn(12, generator=torch.Generator().manual_seed(4)) * 0.5
    order, probabilities = expected(logits, **options)
    counts = torch.tensor(draw(logits, 5000, seed=1, **options)).bincount(minlength=len(logits))[order]
    assert counts.sum() == 5000
    means = 5000 * probabilities
    assert means.min() > 20
    # Chi-square: how likely draws from these probabilities are to fit them worse than this.
    distance, freedom = ((counts - means) ** 2 / means).sum(), torch.tensor(len(order) - 1.0)
    assert torch.special.gammaincc(freedom.double() / 2, distance / 2) > 0.001


def test_temperature_flattens_and_sharpens():
    logits = torch.tensor([1.0, 0.0])
    share = {t: draw(logits, 2000, temperature=t, seed=2).count(0) / 2000 for t in (0.25, 1.0, 4.0)}
    for t, got in share.items():
        assert got == pytest.approx(float(torch.sigmoid(torch.tensor(1 / t))), abs=0.04)


@given(scores, st.floats(1e-4, 100), seeds)
def test_any_reasonable_temperature_works(logits, temperature, seed):
    (token,) = draw(logits, temperature=temperature, seed=seed)
    assert 0 <= token < len(logits)


@pytest.mark.parametrize(
    "options", [*({"temperature": t} for t in (5e-324, 1e-310, 1e-50, 1e-30)), {"temperature": 1.0, "top_p": 5e-324}]
)
def test_the_limits_of_the_settings_are_greedy_not_an_error(options):
    logits = torch.tensor([0.0, 1e9, -3e38, 3.0, -torch.inf])
    assert possible(logits, **options) == {1}
    assert possible(logits, top_k=3, **options) == {1}


@pytest.mark.parametrize("temperature", [1e30, sys.float_info.max])
def test_an_endless_temperature_draws_what_is_possible_at_all(temperature):
    logits = torch.tensor([0.0, 1e9, -3e9, -torch.inf])
    assert possible(logits, temperature=temperature) == {0, 1, 2}
    assert possible(logits, temperature=temperature, top_k=2) == {0, 1}
    order, probabilities = expected(logits, temperature)
    assert probabilities[order != 3].tolist() == pytest.approx([1 / 3] * 3)


@given(scores, options, sizes, st.sampled_from([0.0, ALMOST_ONE, 1.0]))
def test_the_ends_of_the_random_numbers_draw_nothing_impossible(logits, options, sizes, number):
    # Not even 1, which a product may round to.
    never = torch.tensor([-torch.inf, -3e38])
    token = draw_at(number, torch.cat([never, logits, never]), sizes, **options)
    assert 2 <= token < 2 + len(logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_does_not_matter(dtype):
    logits = torch.randn(50).bfloat16().float()
    for options in ({}, {"top_k": 7}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.7}):
        drawn = draw(logits, 20, temperature=0.8, seed=5, **options)
        assert draw(logits.to(dtype), 20, temperature=0.8, seed=5, **options) == drawn


@pytest.mark.parametrize("logits", [[0.0, torch.nan], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.5}])
def test_what_is_no_distribution_is_an_error(logits, options):
    with pytest.raises(EngineError, match="not finite"):
        draw(torch.tensor(logits), temperature=1.0, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logits_are_not_changed(dtype):
    logits = torch.randn(20, dtype=dtype)
    before = logits.clone()
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}):
        draw(logits, 3, temperature=0.9, seed=0, **options)
        assert torch.equal(logits, before)

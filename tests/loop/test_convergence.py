import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slr_core.config import (
    DEFAULT_THRESHOLDS,
    ConvergenceConfig,
    GuardConfig,
    LoopConfig,
    LoopLoraConfig,
    SLRConfig,
)
from slr_core.errors import RequestError
from slr_core.loop.convergence import ExitRule, measure, measure_step
from slr_core.params import LoopParams, ResolvedLoopParams

CRITERIA = tuple(DEFAULT_THRESHOLDS)
positive = st.floats(0, 1e6, allow_nan=False)
maybe_distance = st.none() | st.floats(0, 10, allow_nan=False)


def settings_of(max_iterations=5, min_iterations=0, criterion="relative_change", threshold=0.1, patience=1):
    return ResolvedLoopParams(max_iterations, min_iterations, criterion, threshold, patience)


@st.composite
def any_settings(draw):
    most = draw(st.integers(1, 20))
    return ResolvedLoopParams(
        most,
        draw(st.integers(0, most)),
        draw(st.sampled_from(CRITERIA)),
        draw(st.floats(0, 10)),
        draw(st.integers(1, 5)),
    )


def play(rule, distances, changes=None, norms=None, finite=None):
    """Feed a loop until it ends: its last iteration and reason."""
    for t, distance in enumerate(distances, start=1):
        reason = rule.update(
            t,
            distance=distance,
            change=changes[t - 1] if changes else 1.0,
            norm=norms[t - 1] if norms else 1.0,
            finite=finite[t - 1] if finite else True,
        )
        if reason is not None:
            return t, reason
    return len(distances), None


# -- the rule --------------------------------------------------------------------------------------------


@given(any_settings(), st.lists(maybe_distance, min_size=20, max_size=20), st.data())
def test_a_loop_ends_within_its_bounds_and_for_its_reason(settings, distances, data):
    changes = data.draw(st.lists(positive, min_size=20, max_size=20))
    t, reason = play(ExitRule(settings, GuardConfig()), distances, changes)
    assert 1 <= t <= settings.max_iterations
    assert reason in ("converged", "max_iterations")
    if reason == "max_iterations":
        assert t == settings.max_iterations
    else:
        assert t >= settings.min_iterations
        tail = distances[t - settings.patience : t]
        assert len(tail) == settings.patience
        assert all(x is not None and x < settings.threshold for x in tail)
    # It ends at the first chance: no earlier iteration satisfied everything.
    for earlier in range(max(settings.patience, settings.min_iterations, 1), t):
        tail = distances[earlier - settings.patience : earlier]
        assert settings.criterion == "fixed" or not all(x is not None and x < settings.threshold for x in tail)


@given(st.integers(1, 20), st.lists(maybe_distance, min_size=20, max_size=20), st.floats(0, 1e6))
def test_fixed_never_converges(most, distances, threshold):
    settings = settings_of(most, criterion="fixed", threshold=threshold)
    assert play(ExitRule(settings, GuardConfig()), distances) == (most, "max_iterations")


@given(any_settings(), st.integers(1, 20), st.floats(0, 10), st.booleans())
def test_a_state_that_is_not_finite_always_diverges(settings, at, distance, at_once):
    rule = ExitRule(settings, GuardConfig())
    distances = [1e9] * (at - 1) + [distance]
    finite = [True] * (at - 1) + [False]
    t, reason = play(rule, distances, finite=finite)
    if at <= settings.max_iterations:
        assert (t, reason) == (at, "diverged")
        assert rule.last_good_iteration(t, finite=False) == at - 1
    else:
        assert (t, reason) == (settings.max_iterations, "max_iterations")


def test_patience_counts_consecutive_iterations():
    rule = ExitRule(settings_of(10, patience=3), GuardConfig())
    assert play(rule, [0.05, 0.05, 0.2, 0.05, None, 0.05, 0.05, 0.05, 0.05]) == (8, "converged")


def test_patience_before_the_minimum():
    assert play(ExitRule(settings_of(10, 4, patience=3), GuardConfig()), [0.0] * 9) == (4, "converged")


def test_the_threshold_itself_is_not_below_the_threshold():
    assert play(ExitRule(settings_of(3, threshold=0.1), GuardConfig()), [0.1, 0.1, 0.1]) == (3, "max_iterations")


def test_convergence_at_the_last_iteration_is_convergence():
    assert play(ExitRule(settings_of(2), GuardConfig()), [1.0, 0.0]) == (2, "converged")


# -- divergence ------------------------------------------------------------------------------------------


def test_expanding_and_far_away_is_divergence():
    rule = ExitRule(settings_of(10), GuardConfig(expanding_iterations=3, norm_factor=10))
    changes, norms = [1, 2, 4, 8, 16], [1.0, 5.0, 9.0, 10.5, 99.0]
    assert play(rule, [1.0] * 5, changes, norms) == (4, "diverged")
    assert rule.contraction == 2
    assert rule.last_good_iteration(4, finite=True) == 1


@pytest.mark.parametrize(
    ("changes", "norms"),
    [
        ([1, 2, 4, 8, 16], [1.0, 5.0, 9.0, 9.9, 10.0]),  # expanding, never past the multiple
        ([1, 2, 4, 3, 6, 12], [1.0, 50, 50, 50, 50, 50]),  # far, never expanding for three in a row
        ([4, 2, 1, 1, 1], [1.0, 50, 50, 50, 50]),  # contraction of 1 is not above 1
        ([1, 2, 0, 2, 4, 8], [1.0, 50, 50, 50, 50, 50]),  # undefined after a step of zero
        ([1, 2, None, 2, 4, 8], [1.0, 50, 50, 50, 50, 50]),
    ],
)
def test_one_of_both_is_not_divergence(changes, norms):
    rule = ExitRule(settings_of(len(changes)), GuardConfig(expanding_iterations=3, norm_factor=10))
    assert play(rule, [1.0] * len(changes), changes, norms) == (len(changes), "max_iterations")


def test_divergence_outranks_convergence():
    rule = ExitRule(settings_of(10, threshold=1e6), GuardConfig())
    assert rule.update(1, distance=0.0, change=1.0, norm=math.nan, finite=False) == "diverged"


def test_early_expansion_keeps_first_state():
    rule = ExitRule(settings_of(10), GuardConfig(expanding_iterations=2, norm_factor=2))
    assert play(rule, [1.0] * 3, [1, 2, 4], [1.0, 3.0, 9.0]) == (3, "diverged")
    assert rule.last_good_iteration(3, finite=True) == 1


# -- settings --------------------------------------------------------------------------------------------

maybe_count = st.none() | st.integers(0, 30)


@given(
    st.integers(0, 20),
    st.integers(0, 20),
    st.sampled_from(CRITERIA),
    st.none() | st.floats(0, 5),
    maybe_count,
    maybe_count,
    st.none() | st.sampled_from(CRITERIA),
    st.none() | st.floats(0, 5),
    st.none() | st.integers(1, 9),
)
def test_requests_override_defaults(t_max, t_min, criterion, threshold, most, least, asked, asked_threshold, patience):
    loop = LoopConfig(
        max_iterations=t_max,
        min_iterations=t_min,
        convergence=ConvergenceConfig(criterion=criterion, threshold=threshold, patience=2, end_token_id=7),
        halting_head=True,
    )
    options = {"max_iterations": most, "min_iterations": least, "criterion": asked, "threshold": asked_threshold}
    if most is not None and least is not None and least > most:
        with pytest.raises(RequestError, match="min_iterations must be at most") as caught:
            LoopParams(**options).resolve(SLRConfig(loop=loop))
        assert caught.value.param == "min_iterations"
        return
    made = LoopParams(**options, patience=patience).resolve(SLRConfig(loop=loop))
    assert made.min_iterations <= made.max_iterations
    assert made.max_iterations == (max(t_max, least or 0) if most is None else most)
    assert made.min_iterations == (min(t_min, made.max_iterations) if least is None else least)
    assert made.criterion == (asked or criterion)
    assert made.patience == (2 if patience is None else patience)
    if asked_threshold is not None:
        assert made.threshold == asked_threshold
    elif made.criterion == criterion and threshold is not None:
        assert made.threshold == threshold
    else:
        assert made.threshold == DEFAULT_THRESHOLDS[made.criterion]


def test_untrained_loop_runs_on_request_alone():
    config = SLRConfig(trained=False)
    assert LoopParams().resolve(config).max_iterations == config.default_iterations == 0
    assert LoopParams(min_iterations=2).resolve(config).max_iterations == config.loop.max_iterations
    assert LoopParams(threshold=0.5).resolve(config).max_iterations == config.loop.max_iterations
    assert LoopParams(max_iterations=3).resolve(config).max_iterations == 3


def test_a_threshold_of_zero_is_kept():
    assert LoopParams(threshold=0.0).resolve(SLRConfig()).threshold == 0.0
    assert LoopParams(max_iterations=0).resolve(SLRConfig()).max_iterations == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("max_iterations", -1),
            ("min_iterations", -1),
            ("patience", 0),
            ("threshold", math.nan),
            ("threshold", -1.0),
        ),
        *(("noise_scale", -0.1), ("noise_scale", math.nan), ("noise_scale", math.inf), ("noise_seed", -1)),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(field, value):
    with pytest.raises(RequestError) as caught:
        LoopParams(**{field: value}).resolve(SLRConfig())
    assert caught.value.param == field


def test_an_unknown_criterion_is_a_request_error():
    with pytest.raises(RequestError):
        LoopParams(criterion="vibes").resolve(SLRConfig())


def test_the_policy_error_bounds_the_maximum():
    loop = LoopConfig(trained_iterations=4, max_iterations=4, lora=LoopLoraConfig(past_end="error"))
    assert LoopParams(max_iterations=4).resolve(SLRConfig(loop=loop)).max_iterations == 4
    for options in ({"max_iterations": 5}, {"min_iterations": 5}):
        with pytest.raises(RequestError, match="at most 4, the last trained iteration, got 5"):
            LoopParams(**options).resolve(SLRConfig(loop=loop))


def test_the_head_is_read_only_where_it_is_needed():
    loop = LoopConfig(halting_head=True, convergence=ConvergenceConfig(end_token_id=7))
    reading = {c for c in CRITERIA if LoopParams(criterion=c).resolve(SLRConfig(loop=loop)).reads_head}
    assert reading == {"kl", "entropy_change", "argmax_stable", "end_token"}


@pytest.mark.parametrize(
    ("criterion", "needed"),
    [
        ("learned", "halting_head: true"),
        ("survival", "halting_head: true"),
        ("end_token", "convergence.end_token_id"),
    ],
)
def test_criteria_that_need_more_than_states(criterion, needed):
    with pytest.raises(RequestError, match=f"{criterion} needs a checkpoint whose loop config has {needed}") as caught:
        LoopParams(criterion=criterion).resolve(SLRConfig())
    assert caught.value.param == "criterion"


def test_a_halting_head_allows_its_criteria():
    loop = LoopConfig(halting_head=True, convergence=ConvergenceConfig(criterion="learned", threshold=0.2))
    assert LoopParams().resolve(SLRConfig(loop=loop)).threshold == 0.2
    assert LoopParams(criterion="fixed").resolve(SLRConfig(loop=loop)).threshold == DEFAULT_THRESHOLDS["fixed"]


# -- distances -------------------------------------------------------------------------------------------

ONE = torch.tensor([[True]])


def one_each(*states):
    """Workspaces of a single position, ``[B, 1, d]``, and their mask."""
    made = torch.tensor(states)[:, None]
    return made, torch.ones(made.shape[:2], dtype=torch.bool)


def test_distances_by_hand():
    previous, valid_mask = one_each([3.0, 4.0], [1.0, 0.0])
    h, _ = one_each([3.0, 5.0], [0.0, 2.0])
    d = measure(h, valid_mask, previous=previous)
    torch.testing.assert_close(d.change, torch.tensor([1.0, math.sqrt(5)]))
    torch.testing.assert_close(d.norm, torch.tensor([math.sqrt(34), 2.0]))
    torch.testing.assert_close(d.relative_change, torch.tensor([0.2, math.sqrt(5)]))
    torch.testing.assert_close(d.cosine, torch.tensor([1 - 29 / (5 * math.sqrt(34)), 1.0]))
    assert d.kl is d.entropy is d.entropy_change is d.argmax_stable is d.learned is None


def test_over_several_positions_the_norm_is_frobenius():
    previous, h = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), torch.tensor([[[3.0, 1.0], [2.0, 6.0]]])
    valid_mask = torch.ones(1, 2, dtype=torch.bool)
    d = measure(h, valid_mask, previous=previous)
    assert d.norm.item() == pytest.approx(math.sqrt(9 + 1 + 4 + 36))
    assert d.change.item() == pytest.approx(3.0)
    assert d.relative_change.item() == pytest.approx(3 / 5)
    assert d.cosine.item() == pytest.approx(1 - (9 + 24) / (5 * math.sqrt(50)))
    torch.testing.assert_close(measure_step(h, previous, valid_mask), (d.change, d.relative_change))


@pytest.mark.parametrize("filler", [0.0, 1e4, math.nan, math.inf])
@pytest.mark.parametrize("left", [0, 2])
def test_padding_is_no_part_of_a_distance(filler, left):
    generator = torch.Generator().manual_seed(0)
    h, previous, moved = (torch.randn(1, 3, 5, generator=generator) for _ in range(3))
    valid_mask = torch.zeros(1, 5, dtype=torch.bool)
    valid_mask[:, left : left + 3] = True

    def padded(x):
        return torch.full((1, 5, 5), filler).masked_scatter(valid_mask[..., None], x)

    bare = measure(h, torch.ones(1, 3, dtype=torch.bool), previous=previous, compared=moved)
    d = measure(padded(h), valid_mask, previous=padded(previous), compared=padded(moved))
    for name in ("norm", "change", "relative_change", "cosine"):
        torch.testing.assert_close(getattr(d, name), getattr(bare, name), msg=name)


def test_the_step_is_taken_from_what_moved():
    (previous, valid_mask), (h, _), (g, _) = one_each([1.0, 0.0]), one_each([1.0, 0.1]), one_each([1.0, 1.0])
    d = measure(h, valid_mask, previous=previous, compared=g)
    assert d.relative_change.item() == pytest.approx(1.0)
    assert d.norm.item() == pytest.approx(math.hypot(1, 0.1))
    assert d.cosine.item() == pytest.approx(1 - 1 / math.sqrt(2))


def test_the_heads_distances_by_hand():
    now, before = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.3, 0.5, 0.2]])
    h, valid_mask = one_each([1.0, 1.0])
    d = measure(h, valid_mask, previous=h, head=now.log(), head_before=before.log())

    def entropy(p):
        return -sum(x * math.log(x) for x in p[0].tolist())

    kl = sum(p * math.log(p / q) for p, q in zip(before[0].tolist(), now[0].tolist(), strict=True))
    assert d.kl.item() == pytest.approx(kl, rel=1e-5)
    assert d.entropy.item() == pytest.approx(entropy(now), rel=1e-5)
    assert d.entropy_change.item() == pytest.approx(abs(entropy(now) - entropy(before)), rel=1e-5)
    assert d.argmax_stable.item() == 1.0


def test_learned_is_the_probability_of_going_on():
    h, valid_mask = one_each([1.0, 1.0], [0.0, 2.0])
    d = measure(h, valid_mask, previous=h, p_halt=torch.tensor([0.9, 0.25]))
    torch.testing.assert_close(d.learned, torch.tensor([0.1, 0.75]))


def test_survival_is_the_product_of_going_on():
    h, valid_mask = one_each([1.0, 1.0], [0.0, 2.0])
    first = measure(h, valid_mask, p_halt=torch.tensor([0.9, 0.25]))
    then = measure(h, valid_mask, previous=h, p_halt=torch.tensor([0.5, 0.5]), survival_before=first.survival)
    torch.testing.assert_close(first.survival, torch.tensor([0.1, 0.75]))
    torch.testing.assert_close(then.survival, torch.tensor([0.05, 0.375]))


def test_the_end_token_is_a_distance_of_one_state():
    h, valid_mask = one_each([1.0, 1.0], [0.0, 2.0])
    head = torch.tensor([[0.9, 0.1], [0.25, 0.75]]).log()
    for previous in (None, h):
        d = measure(h, valid_mask, previous=previous, head=head, end_token_id=1)
        torch.testing.assert_close(d.end_token, torch.tensor([0.9, 0.25]))
    assert measure(h, valid_mask, previous=h, head=head).end_token is None
    assert measure(h, valid_mask, previous=h, end_token_id=1).end_token is None


def test_without_an_earlier_state_only_the_new_one_is_measured():
    h, valid_mask = one_each([3.0, 4.0])
    logits = torch.tensor([[0.5, 0.5]]).log()
    d = measure(
        h,
        valid_mask,
        compared=h + 1,
        head=logits.log_softmax(-1),
        head_before=logits.log_softmax(-1),
        p_halt=torch.tensor([0.9]),
    )
    assert {name for name, value in vars(d).items() if value is not None} == {"norm", "entropy", "survival"}
    assert d.norm.item() == pytest.approx(5.0)
    assert d.entropy.item() == pytest.approx(math.log(2))


def test_without_earlier_logits():
    h, valid_mask = one_each([3.0, 4.0])
    d = measure(h, valid_mask, previous=2 * h, head=torch.zeros(1, 4).log_softmax(-1))
    assert d.entropy.item() == pytest.approx(math.log(4))
    assert d.relative_change.item() == pytest.approx(0.5)
    assert d.kl is d.entropy_change is d.argmax_stable is None


def test_equal_states_have_no_distance():
    h, logits = torch.randn(3, 2, 8), torch.randn(3, 11)
    d = measure(
        h,
        torch.ones(3, 2, dtype=torch.bool),
        previous=h,
        head=logits.log_softmax(-1),
        head_before=logits.log_softmax(-1),
    )
    for name in ("change", "relative_change", "cosine", "kl", "entropy_change", "argmax_stable"):
        torch.testing.assert_close(getattr(d, name), torch.zeros(3), rtol=0, atol=1e-6, msg=name)


def test_distances_are_taken_in_fp32():
    # In bfloat16 the sum of squares and the difference would both be lost.
    previous = torch.full((1, 1, 4096), 8.0, dtype=torch.bfloat16)
    d = measure(previous + 0.0625, ONE, previous=previous)
    assert d.relative_change.dtype == torch.float32
    assert d.relative_change.item() == pytest.approx(0.0625 / 8, rel=1e-6)


@given(st.integers(0, 10_000))
def test_divergences_are_not_negative(seed):
    generator = torch.Generator().manual_seed(seed)
    now, before = (6 * torch.randn(4, 9, generator=generator) for _ in range(2))
    h = torch.randn(4, 3, 5, generator=generator)
    valid_mask = torch.ones(4, 3, dtype=torch.bool)
    d = measure(h, valid_mask, previous=h.flip(0), head=now.log_softmax(-1), head_before=before.log_softmax(-1))
    assert (d.kl >= -1e-6).all()
    assert (d.entropy >= -1e-6).all()
    assert (d.entropy <= math.log(9) + 1e-5).all()
    assert ((d.cosine >= -1e-6) & (d.cosine <= 2 + 1e-6)).all()

"""Interfering with thoughts: with an edit that changes nothing, nothing changes; and every edit does what it says."""

from functools import partial

import pytest
import torch

from slr_core.errors import ConfigError, RequestError
from slr_core.evaluation.interventions import (
    add_noise,
    randomize_thoughts,
    replace_states,
    shuffle_thoughts,
    swap_thoughts,
)
from slr_core.generation.reference import generate
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams
from tests import tiny

SEEDS = list(range(len(tiny.PROMPTS)))
SPOKEN = {"answers": "latent_decoder", "latent_decoder": tiny.LATENT_DECODER}
GROWING = {"source": "previous", "mix": "add", "scale": 3.0}
MODELS = {
    "plain": {},
    "adapter for writing": {"decode": True},
    "latent decoder": {"loop": {"decoder": SPOKEN}},
    "answer prefix": {"text": {"answer_prefix": "w1 w2"}},
    "noise level": {"loop": {"timestep": {"kind": "learned", "noise_level": True}}},
    # States grow threefold at every step: a long loop is stopped, and its last states are dropped.
    "guard": {"loop": {"guard": {"expanding_iterations": 1, "norm_factor": 2.0}, "residual": GROWING}},
}
DEPTHS = [{"criterion": "fixed", "max_iterations": t} for t in (0, 1, 2, 3, 4, 5, 3, 2)]


@pytest.fixture(scope="module", params=[(w, m) for w in tiny.WORKSPACES for m in MODELS], ids="-".join)
def made(request):
    return model(*request.param)


@pytest.fixture(scope="module", params=tiny.WORKSPACES)
def plain(request):
    return model(request.param)


def model(workspace, kind="plain"):
    options = MODELS[kind]
    return tiny.reasoner(**{**options, "loop": {**tiny.WORKSPACES[workspace], **options.get("loop", {})}})


def requests(made, depths=DEPTHS):
    return [tiny.request(made, prompt, loop) for prompt, loop in zip(tiny.PROMPTS, depths, strict=False)]


def answers(made, run_loop=None, depths=DEPTHS):
    return [
        (result.text, result.iterations, result.exit_reason, result.forward_passes)
        for result in generate(made, requests(made, depths), run_loop=run_loop)
    ]


def same(rows):
    return rows


@torch.inference_mode()
def looped(made, run_loop, depths=DEPTHS):
    context = made.encode(*tiny.batch(tiny.PROMPTS[: len(depths)]))
    return run_loop(context, [LoopParams(**loop).resolve(made.config) for loop in depths])


# -- replaced --------------------------------------------------------------------------------------------


def test_putting_back_a_loops_own_thoughts_changes_no_answer(made):
    own = answers(made)
    assert answers(made, replace_states(made, same)) == own
    assert len({iterations for _, iterations, _, _ in own}) >= 3


@torch.inference_mode()
def test_same_thoughts_change_nothing(made):
    own, again = looped(made, partial(loop_until_exit, made)), looped(made, replace_states(made, same))
    for mine, its in zip(own.states, again.states, strict=True):
        torch.testing.assert_close(its, mine)
    if made.answers_from_states:
        return
    torch.testing.assert_close(again.context.state, own.context.state, atol=1e-5, rtol=1e-5)
    assert again.context.next_position.tolist() == own.context.next_position.tolist()
    ids, present = torch.full((len(DEPTHS), 1), 7), torch.ones(len(DEPTHS), 1, dtype=torch.bool)
    kept = torch.tensor(own.kept_iterations) > 0
    logits = [made.answer_logits(output.context, ids, present, kept) for output in (own, again)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_a_guarded_loop_drops_states(workspace):
    own = looped(model(workspace, "guard"), partial(loop_until_exit, model(workspace, "guard")))
    assert any(kept < ran for kept, ran in zip(own.kept_iterations, own.iterations, strict=True))


@pytest.mark.parametrize("kind", ["plain", "latent decoder"])
@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_other_thoughts_are_what_the_answer_is_read_from(workspace, kind):
    made = model(workspace, kind)
    own = answers(made)
    other = answers(made, replace_states(made, lambda rows: [torch.cat([row[:1], -3 * row[1:]]) for row in rows]))
    changed = [a[0] != b[0] for a, b in zip(own, other, strict=True)]
    assert changed[0] is False, "no iterations, no thoughts"
    assert sum(changed) >= 5
    assert [a[1:3] for a in own] == [b[1:3] for b in other]


@torch.inference_mode()
def test_thoughts_are_put_where_the_model_would_have_put_them():
    made = model("append")
    edit = shuffle_thoughts(SEEDS)
    output = looped(made, replace_states(made, edit))
    for row, depth in enumerate(loop["max_iterations"] for loop in DEPTHS):
        (states,) = shuffle_thoughts([SEEDS[row]])([looped(made, partial(loop_until_exit, made)).states[row]])
        context = made.encode(*tiny.batch([tiny.PROMPTS[row]]))
        for t in range(1, depth + 1):
            context.hidden = states[None, t - 1]
            made.iterate(context, t)
        ids, present = torch.tensor([[7]]), torch.ones(1, 1, dtype=torch.bool)
        alone = made.answer_logits(context, ids, present, torch.tensor([depth > 0]))
        torch.testing.assert_close(output.context.state[row], states[depth, 0])
        many = made.answer_logits(
            output.context.fork(), torch.full((8, 1), 7), torch.ones(8, 1, dtype=torch.bool), torch.ones(8).bool()
        )
        torch.testing.assert_close(many[row], alone[0], atol=1e-4, rtol=1e-4)


# -- edits -----------------------------------------------------------------------------------------------


def rows(*lengths, width=2):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(length, width, 4, generator=generator) for length in lengths]


def thoughts(row):
    return [tuple(state.flatten().tolist()) for state in row[1:]]


def test_shuffled_is_another_order_of_the_same_thoughts():
    for seed in range(30):
        given = rows(1, 2, 3, 4, 7)
        edited = shuffle_thoughts([seed] * 5)(given)
        for row, (before, after) in enumerate(zip(given, edited, strict=True)):
            assert torch.equal(before[0], after[0])
            assert sorted(thoughts(before)) == sorted(thoughts(after))
            # One thought has no other order.
            assert (thoughts(before) != thoughts(after)) == (row >= 2)


def test_noised_keeps_the_lengths_and_nothing_else():
    given = rows(1, 2, 6)
    for before, after in zip(given, randomize_thoughts([1, 2, 3])(given), strict=True):
        assert torch.equal(before[0], after[0])
        torch.testing.assert_close(before.norm(dim=-1), after.norm(dim=-1))
        assert all(a != b for a, b in zip(thoughts(before), thoughts(after), strict=True))
    (long,) = randomize_thoughts([7])([torch.randn(40, 1, 512)])
    before = torch.randn(40, 1, 512)
    assert torch.cosine_similarity(long[1:], before[1:], dim=-1).abs().max() < 0.3


@pytest.mark.parametrize("edit", [shuffle_thoughts, randomize_thoughts])
def test_randomness_does_not_depend_on_the_batch(edit):
    given = rows(5, 3, 6)
    together = edit([11, 12, 13])(given)
    for seed, before, after in zip([11, 12, 13], given, together, strict=True):
        assert torch.equal(edit([seed])([before])[0], after)
    assert not torch.equal(edit([11, 12, 14])(given)[2], together[2])


def test_foreign_takes_the_thoughts_of_the_row_before():
    given = rows(4, 3, 1, 5)
    first, second, third, fourth = swap_thoughts(given)
    assert [torch.equal(a[0], b[0]) for a, b in zip(given, (first, second, third, fourth), strict=True)] == [True] * 4
    assert torch.equal(first[1:], given[3][1:4]), "of those that are too many, the first"
    assert torch.equal(second[1:], given[0][1:3])
    assert torch.equal(third, given[2])
    assert torch.equal(fourth, given[3]), "the row before has no thoughts"
    assert torch.equal(swap_thoughts(given[:2])[0][1:], given[1][[1, 2, 2]]), (
        "the last one again where there are too few"
    )


def test_foreign_thoughts_need_workspaces_of_one_size():
    with pytest.raises(ConfigError, match="fixed size"):
        swap_thoughts([*rows(3), *rows(3, width=5)])


# -- noise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_only", [True, False])
def test_noise_of_no_strength_changes_nothing(plain, start_only):
    assert answers(plain, add_noise(plain, 0.0, SEEDS, start_only=start_only)) == answers(plain)
    own, again = (
        looped(plain, partial(loop_until_exit, plain)),
        looped(plain, add_noise(plain, 0.0, SEEDS, start_only=start_only)),
    )
    for mine, its in zip(own.states, again.states, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("start_only", [True, False])
def test_noise_does_not_depend_on_the_batch(plain, start_only):
    together = looped(plain, add_noise(plain, 0.3, SEEDS, start_only=start_only)).states
    for row in (1, 5, 7):
        context = plain.encode(*tiny.batch([tiny.PROMPTS[row]]))
        with torch.inference_mode():
            alone = add_noise(plain, 0.3, [SEEDS[row]], start_only=start_only)(
                context, [LoopParams(**DEPTHS[row]).resolve(plain.config)]
            )
        torch.testing.assert_close(alone.states[0], together[row], atol=1e-4, rtol=1e-4)


def test_noise_is_a_share_of_the_states_size(plain):
    own = looped(plain, partial(loop_until_exit, plain)).states
    for scale in (0.1, 1.0):
        starts = [looped(plain, add_noise(plain, scale, [s + 100 * i for s in SEEDS])).states for i in range(5)]
        shares = [
            ((state[0] - mine[0]).pow(2).mean() / mine[0].pow(2).mean()).sqrt()
            for states in starts
            for state, mine in zip(states, own, strict=True)
        ]
        assert torch.stack(shares).mean() == pytest.approx(scale, rel=0.15)
        assert torch.stack(shares).std() > 0


def test_noise_in_the_start_only(plain):
    states = looped(plain, add_noise(plain, 0.5, SEEDS[3:4], start_only=True), DEPTHS[3:4]).states[0]
    throughout = looped(plain, add_noise(plain, 0.5, SEEDS[3:4]), DEPTHS[3:4]).states[0]
    assert torch.equal(states[0], throughout[0])
    assert not torch.allclose(states[1], throughout[1], atol=1e-3)
    context = plain.encode(*tiny.batch(tiny.PROMPTS[:1]))
    context.initial = context.hidden = states[None, 0]
    with torch.inference_mode():
        torch.testing.assert_close(plain.iterate(context, 1)[1][0], states[1], atol=1e-5, rtol=1e-5)


def test_after_noise_the_model_is_as_before(plain):
    own = answers(plain)
    answers(plain, add_noise(plain, 1.0, SEEDS))
    assert not plain.residual._forward_hooks
    with torch.inference_mode(), pytest.raises(RequestError):
        add_noise(plain, 1.0, SEEDS)(plain.encode(*tiny.batch(tiny.PROMPTS)), [])
    assert not plain.residual._forward_hooks
    assert answers(plain) == own


def test_token_is_refused():
    made = tiny.reasoner(loop={"workspace": "token"})
    with pytest.raises(ConfigError, match="not supported by workspace `token`"):
        replace_states(made, lambda rows: rows)

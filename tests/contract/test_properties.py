"""What holds for every loop that a config can describe, on tiny models of every architecture."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slr_core.errors import RequestError
from slr_core.generation.reference import generate
from slr_core.loop.convergence import ExitRule
from slr_core.loop.lora import DECODE
from slr_core.loop.timestep import Timestep
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.types import Result
from tests import tiny

NEAR = 1e-3
"""States so near a threshold, relative to it, may leave a loop an iteration earlier or later in a batch."""
DISTANCES = ("relative_change", "cosine", "kl", "entropy_change", "argmax_stable", "end_token")
THRESHOLDS = {"relative_change": (0.05, 1.2), "cosine": (0.001, 0.9), "kl": (0.01, 2), "entropy_change": (0.01, 0.5)}


# -- what is drawn ---------------------------------------------------------------------------------------


@st.composite
def loops(draw, *, workspace: str | None = None, policies: tuple[str, ...] = ("last", "cycle", "error")):
    """Any loop that a tiny model can run in no time; numbers are kept to where it does not explode by itself."""
    iterations, policy = draw(st.integers(1, 3)), draw(st.sampled_from(policies))
    halting = draw(st.booleans())
    kind = draw(st.sampled_from(["per_iteration", "shared", "none"]))
    rank: Any = st.integers(1, 4)
    if kind == "per_iteration":
        rank |= st.lists(rank, min_size=iterations, max_size=iterations)
    width = draw(st.sampled_from([1, 2]))
    latent = {"hidden_size": 8 * width, "layers": draw(st.integers(1, 2)), "heads": width, "max_thought_tokens": 3}
    writer = draw(st.sampled_from(["nobody", "thoughts", "answers"]))
    longest = draw(st.integers(0, iterations if policy == "error" else iterations + 3))
    return {
        "workspace": workspace or draw(st.sampled_from(list(tiny.WORKSPACES))),
        "block_size": draw(st.integers(1, 4)),
        "trained_iterations": iterations,
        "max_iterations": longest,
        "min_iterations": draw(st.integers(0, 3)),
        "projection": {"kind": draw(st.sampled_from(["identity", "rms_match", "linear", "mlp", "expected_embedding"]))},
        "timestep": {
            "kind": draw(st.sampled_from(["none", "sinusoidal", "learned"])),
            "combine": draw(st.sampled_from(["add", "concat"])),
            "noise_level": draw(st.booleans()),
        },
        "lora": {
            "kind": kind,
            "rank": draw(rank),
            "alpha": draw(st.sampled_from([1, 4])),
            "past_end": policy,
            "decode_rank": draw(st.none() | st.integers(1, 3)),
        },
        "residual": {
            "source": draw(st.sampled_from(["none", "initial", "previous"])),
            "mix": draw(st.sampled_from(["add", "convex", "gated"])),
            "scale": draw(st.sampled_from([-0.3, 0.1, 0.5])),
            "alpha": draw(st.sampled_from([0.3, 0.9])),
            "norm": draw(st.booleans()),
        },
        "convergence": draw(criteria(halting)) | {"end_token_id": 7},
        "guard": {
            "expanding_iterations": draw(st.integers(1, 3)),
            "norm_factor": draw(st.sampled_from([1.1, 10.0])),
        },
        "halting_head": halting,
        "decoder": {
            "answers": "latent_decoder" if writer == "answers" else "lm_head",
            "latent_decoder": None if writer == "nobody" else latent,
        },
    }


@st.composite
def criteria(draw, halting: bool) -> dict[str, Any]:
    """A criterion with a threshold that it meets now and then."""
    name = draw(st.sampled_from([*DISTANCES, "fixed", *(["learned"] if halting else [])]))
    low, high = THRESHOLDS.get(name, (0.5, 0.95))
    threshold = draw(st.none() | st.sampled_from([low, (low + high) / 2, high]))
    return {"criterion": name, "threshold": threshold, "patience": draw(st.integers(1, 2))}


def most(made: LatentReasoner) -> int:
    """Iterations that are worth running: past the last trained one, where the policy lets them."""
    loop = made.config.loop
    return loop.trained_iterations + (0 if loop.lora.past_end == "error" else 3)


@st.composite
def asked(draw, made: LatentReasoner) -> dict[str, Any]:
    """The loop settings of one request."""
    longest = draw(st.integers(0, most(made)))
    own = draw(st.just({}) | criteria(made.config.loop.halting_head))
    return {"max_iterations": longest, "min_iterations": draw(st.none() | st.integers(0, longest)), **own}


kinds = st.sampled_from(tiny.KINDS)
prompts = st.lists(st.lists(st.integers(0, 36), min_size=1, max_size=8), min_size=2, max_size=4).map(
    lambda rows: [tiny.words(*row) for row in rows]
)


def facts(result: Result) -> tuple[Any, ...]:
    thoughts = [record.thought for record in result.records]
    adapters = [record.adapter for record in result.records]
    counts = result.prompt_tokens, result.forward_passes
    return result.token_ids, result.iterations, result.exit_reason, result.finish_reason, counts, thoughts, adapters


def looped(made: LatentReasoner, rows: list[str], asks: list[dict[str, Any]], side: str = "right"):
    with torch.inference_mode():
        resolved = [LoopParams(**ask).resolve(made.config) for ask in asks]
        return loop_until_exit(made, made.encode(*tiny.batch(rows, side)), resolved)


@contextmanager
def margins() -> Iterator[list[float]]:
    """How near to one of its limits, relative to it, each iteration of each row inside the block came."""
    seen: list[float] = []
    plain = ExitRule.update

    def update(self, t, *, distance, change, norm, finite=True):
        reason = plain(self, t, distance=distance, change=change, norm=norm, finite=finite)
        limits = [(distance, self.settings.threshold), (self.contraction, 1.0)]
        limits.append((norm, self.guard.norm_factor * self.first_norm))
        seen.append(min(abs(value / limit - 1) for value, limit in limits if value is not None and limit))
        return reason

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExitRule, "update", update)
        yield seen


# -- the base model --------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(kind=kinds, loop=loops(), rows=prompts, data=st.data())
def test_without_iterations_it_is_the_base_model(kind, loop, rows, data):
    made, plain = tiny.reasoner(kind, loop), tiny.base(kind)
    # The others of its batch loop.
    asks = [{"max_iterations": 0}, *({"max_iterations": data.draw(st.integers(0, most(made)))} for _ in rows[1:])]
    result = generate(made, [tiny.request(made, row, ask) for row, ask in zip(rows, asks, strict=True)])[0]
    ids = torch.tensor([tiny.ids(rows[0])])
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    assert list(result.token_ids) == expected[0, ids.shape[1] :].tolist()
    assert (result.iterations, result.exit_reason, result.final_change) == (0, "max_iterations", None)
    assert result.forward_passes == len(result.token_ids)


# -- batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_a_batch_gives_each_row_what_it_gets_alone_in_any_order_and_padded_on_either_side(workspace):
    seen: list[float] = []
    exits: set[str] = set()

    @settings(max_examples=15)
    @given(kind=kinds, loop=loops(workspace=workspace), rows=prompts, data=st.data())
    def check(kind, loop, rows, data):
        made = tiny.reasoner(kind, loop)
        asks = [data.draw(asked(made)) for _ in rows]
        requests = [tiny.request(made, row, ask, trace=True) for row, ask in zip(rows, asks, strict=True)]
        with margins() as near:
            alone = [generate(made, [request])[0] for request in requests]
        seen.extend(near)
        exits.update(result.exit_reason for result in alone)
        if min(near, default=1) < NEAR:
            return
        order = data.draw(st.permutations(range(len(rows))))
        together = generate(made, [requests[i] for i in order])
        assert [facts(result) for result in together] == [facts(alone[i]) for i in order]
        for result, i in zip(together, order, strict=True):
            assert result.stability.oscillating == alone[i].stability.oscillating
            for record, other in zip(result.records, alone[i].records, strict=True):
                for name in ("relative_change", "cosine", "norm", "contraction", "kl", "entropy"):
                    a, b = getattr(record, name), getattr(other, name)
                    assert a is b is None or a == pytest.approx(b, rel=1e-3, abs=1e-4), name

        left, right = (looped(made, rows, asks, side) for side in ("left", "right"))
        assert (left.iterations, left.exit_reasons) == (right.iterations, right.exit_reasons)
        assert right.iterations == [result.iterations for result in alone]
        for i, row in enumerate(rows):
            own = looped(made, [row], [asks[i]]).states[0]
            for output in (left, right):
                torch.testing.assert_close(output.states[i], own, rtol=1e-3, atol=1e-4)

    check()
    assert sum(margin < NEAR for margin in seen) < 0.01 * len(seen)
    assert exits >= {"converged", "max_iterations"}  # or the above would say little


# -- exits -----------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(kind=kinds, loop=loops(), rows=prompts, data=st.data())
def test_a_minimum_that_is_the_maximum_equals_the_criterion_fixed(kind, loop, rows, data):
    made = tiny.reasoner(kind, loop)
    count = data.draw(st.integers(0, most(made)))
    own = data.draw(criteria(made.config.loop.halting_head))
    forced = {"max_iterations": count, "min_iterations": count, **own}
    fixed = {"max_iterations": count, "criterion": "fixed"}
    ours, theirs = (looped(made, rows, [ask] * len(rows)) for ask in (forced, fixed))
    assert (ours.iterations, ours.kept_iterations) == (theirs.iterations, theirs.kept_iterations)
    assert all(torch.equal(a, b) for a, b in zip(ours.states, theirs.states, strict=True))
    for i, (reason, plain) in enumerate(zip(ours.exit_reasons, theirs.exit_reasons, strict=True)):
        assert plain in ("max_iterations", "diverged")
        assert ours.iterations[i] == count or plain == "diverged"
        # A criterion that is met at the last iteration has been met: nothing else may differ.
        assert reason == plain or (reason, plain) == ("converged", "max_iterations")
        resolved = LoopParams(**forced).resolve(made.config)
        if plain == "max_iterations" and resolved.criterion in ("relative_change", "cosine", "kl"):
            last = [getattr(record, resolved.criterion) for record in ours.records[i][-resolved.patience :]]
            met = len(last) == resolved.patience and all(x is not None and x < resolved.threshold for x in last)
            assert (reason == "converged") == met
    answers = [generate(made, [tiny.request(made, row, ask) for row in rows]) for ask in (forced, fixed)]
    assert [r.token_ids for r in answers[0]] == [r.token_ids for r in answers[1]]


# -- checkpoints -----------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(kind=kinds, loop=loops(), rows=prompts, data=st.data())
def test_saving_and_loading_changes_nothing(kind, loop, rows, data):
    made = tiny.reasoner(kind, loop)
    asks = [data.draw(asked(made)) for _ in rows]
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        loaded = LatentReasoner.from_pretrained(folder)
        assert (Path(folder) / "loops" / DECODE).is_dir() == (loop["lora"]["decode_rank"] is not None)
    assert loaded.config.loop == made.config.loop
    mine, theirs = made.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) and not theirs[key].is_meta for key, tensor in mine.items())
    ours, again = looped(made, rows, asks), looped(loaded, rows, asks)
    assert all(torch.equal(a, b) for a, b in zip(ours.states, again.states, strict=True))
    answers = [
        [facts(r) for r in generate(m, [tiny.request(m, row, ask) for row, ask in zip(rows, asks, strict=True)])]
        for m in (made, loaded)
    ]
    assert answers[0] == answers[1]


# -- past the last trained iteration ---------------------------------------------------------------------


@settings(max_examples=10)
@given(kind=kinds, loop=loops(policies=("last", "cycle")), beyond=st.integers(1, 4))
def test_past_the_end_adapter_and_embedding_follow_the_policy(kind, loop, beyond):
    made, trained = tiny.reasoner(kind, loop), loop["trained_iterations"]
    count = trained + beyond
    embedded = []
    plain = Timestep.forward

    def forward(self, x, t, change=None):
        embedded.append(t)
        return plain(self, x, t, change)

    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timestep, "forward", forward)
        context = made.encode(*tiny.batch(tiny.PROMPTS[:2]))
        with tiny.passes(made) as seen:
            made.unroll(context, count)

    stay = [*range(1, trained + 1), *[trained] * beyond]
    again = [*range(1, trained + 1)] * (beyond + 1)
    expected = stay if loop["lora"]["past_end"] == "last" else again[:count]
    names = {
        "per_iteration": [f"loop_{t:02d}" for t in expected],
        "shared": ["loop_01"] * count,
        "none": [None] * count,
    }
    assert embedded == expected
    assert [adapter for adapter, _ in seen] == names[loop["lora"]["kind"]]
    assert [made.adapter_name(t) for t in range(1, count + 1)] == names[loop["lora"]["kind"]]


@settings(max_examples=10)
@given(loop=loops(policies=("error",)), beyond=st.integers(1, 4))
def test_past_the_end_an_error_comes_before_anything_runs(loop, beyond):
    config = tiny.config(loop)
    trained = config.loop.trained_iterations
    LoopParams(max_iterations=trained).resolve(config)
    for name in ("max_iterations", "min_iterations"):
        with pytest.raises(RequestError) as caught:
            LoopParams(**{name: trained + beyond}).resolve(config)
        assert caught.value.param == "max_iterations"


# -- divergence ------------------------------------------------------------------------------------------


@contextmanager
def broken(made: LatentReasoner, at: int, row: int, where: str, bad: float) -> Iterator[None]:
    """Iteration ``at`` gives ``row`` a state that is not finite: all of it, its first position, or from layer 1 on."""
    layers = made.base.transformer.h if hasattr(made.base, "transformer") else made.base.model.layers
    now = {"t": 0}
    plain = LatentReasoner.update

    def update(self, hidden, initial, t, run, *rest):
        now["t"] = t
        g, h = plain(self, hidden, initial, t, run, *rest)
        now["t"] = 0
        if t == at and where != "layer":
            g, h = g.clone(), h.clone()
            part = slice(None) if where == "state" else 0
            g[row, part], h[row, part] = bad, bad
        return g, h

    def spoil(_module, _inputs, output):
        if now["t"] != at or where != "layer":
            return None
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[row] = bad
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    # The first layer's output is the second one's keys and values: they stay in the cache.
    handle = layers[0].register_forward_hook(spoil)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentReasoner, "update", update)
        try:
            yield
        finally:
            handle.remove()


@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
@pytest.mark.parametrize("where", ["state", "position", "layer"])
@settings(max_examples=4)
@given(kind=kinds, rows=prompts, bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]), data=st.data())
def test_a_state_that_breaks_decodes_the_last_good_one_and_leaves_its_neighbours_alone(
    workspace, where, kind, rows, bad, data
):
    loop = data.draw(loops(workspace=workspace))
    made = tiny.reasoner(kind, {**loop, "guard": {"norm_factor": 1e6}})
    count = data.draw(st.integers(1, most(made)))
    at, row = data.draw(st.integers(1, count)), data.draw(st.integers(0, len(rows) - 1))
    ask = {"max_iterations": count, "criterion": "fixed"}
    requests = [tiny.request(made, prompt, ask, trace=True) for prompt in rows]
    expected = generate(made, requests)
    (last_good,) = generate(made, [tiny.request(made, rows[row], {**ask, "max_iterations": at - 1})])
    with broken(made, at, row, where, bad):
        results = generate(made, requests)
    fell = results.pop(row)
    expected.pop(row)
    assert [facts(result) for result in results] == [facts(result) for result in expected]
    assert [r.final_change for r in results] == [r.final_change for r in expected]
    assert (fell.exit_reason, fell.iterations) == ("diverged", at)
    assert fell.token_ids == last_good.token_ids
    assert not fell.stability.converged
    numbers = [x for record in fell.records for x in vars(record).values() if isinstance(x, float)]
    assert all(abs(x) < float("inf") for x in numbers)


# -- gradients -------------------------------------------------------------------------------------------

PARTS = ("workspace", "project", "timestep", "residual", "halting", "decoder", "base", "lora")


def part_of(name: str) -> str:
    return "lora" if ".lora_" in name else name.split(".")[0]


@settings(max_examples=10)
@given(kind=kinds, loop=loops(), frozen=st.sets(st.sampled_from(PARTS)) | st.just({"base"}))
def test_gradients_reach_every_trainable_part_and_no_frozen_one(kind, loop, frozen):
    made = tiny.reasoner(kind, loop).train()
    for module in made.modules():  # GPT-2's dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)

    batch = tiny.batch(tiny.PROMPTS[1:4])
    context = made.encode(*batch)
    states = made.unroll(context, loop["trained_iterations"])
    own, tokens = context.valid_mask, tiny.batch([tiny.words(1, 2)] * len(states))
    loss = made.head(states).logsumexp(-1).sum()
    if made.halting is not None:
        loss = loss + made.halting(states, own[:, None].expand(-1, states.shape[1], -1)).sum()
    if made.decoder is not None:
        seen = own[:, None].expand(-1, states.shape[1], -1).flatten(1)
        loss = loss + made.decode_latent(states.flatten(1, 2), seen, tokens[0]).logsumexp(-1).sum()
    everyone = torch.ones(len(states), dtype=torch.bool)
    made.close(context, states, torch.full((len(states),), loop["trained_iterations"]))
    answer = made.answer_logits(context, tokens[0], tokens[1].bool(), everyone)
    loss = loss + answer.logsumexp(-1).sum() + made.head(context.state).logsumexp(-1).sum()
    if not loss.requires_grad:
        assert not any(p.requires_grad for p in made.parameters())
        return
    loss.backward()
    for name, parameter in made.named_parameters():
        if part_of(name) in frozen:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name

"""Continuous depth-wise batching in the workspace ``token``; ``test_oracle.py`` compares random mixes as well."""

import pytest
import torch

from slr_core.engine.events import FinishedEvent, IterationEvent, TokenEvent
from slr_core.generation.reference import generate
from tests import tiny
from tests.engine.harness import SteppedCore, facts, is_empty

ASKED = (
    {"max_iterations": 4, "criterion": "relative_change", "threshold": 0.8},
    {"max_iterations": 0},
    {"max_iterations": 5, "criterion": "fixed"},
    {"max_iterations": 6, "criterion": "survival", "threshold": 0.3},
    {"max_iterations": 4, "min_iterations": 2, "criterion": "kl", "threshold": 1.0},
)


def token(kind="llama", **changes):
    return tiny.reasoner(kind, {"workspace": "token", "halting_head": True, **changes})


def core(made, **options):
    return SteppedCore(made, **{"slots": 5, "capacity": 128, **options})


def requests(made):
    return [
        tiny.request(made, prompt, loop, max_new_tokens=5) for prompt, loop in zip(tiny.PROMPTS, ASKED, strict=False)
    ]


@pytest.mark.parametrize(
    ("kind", "loop", "static"),
    [
        ("llama", {"feedback": "raw"}, False),
        ("qwen3", {"deeper_cache": "shared"}, True),
        ("gpt2", {}, True),
    ],
)
def test_a_step_takes_every_request_one_pass_further(kind, loop, static):
    made = token(kind, **loop)
    expected = generate(made, requests(made))
    stepped = core(made, static_shapes=static)
    futures = []
    for request in requests(made):
        futures.append(stepped.submit(request))
        stepped.step()
    stepped.drain()
    assert [facts(future.result(0)) for future in futures] == [facts(result) for result in expected]
    assert len({result.iterations_per_token for result in expected}) > 3
    # Nobody waits: each request takes as many steps as passes alone, from its arrival on.
    assert stepped.counters.steps == max(i + result.forward_passes for i, result in enumerate(expected))
    assert stepped.counters.iterations == sum(
        result.forward_passes for result, asked in zip(expected, ASKED, strict=True) if asked["max_iterations"]
    )
    assert is_empty(stepped.core)


@pytest.mark.parametrize(("cache", "positions"), [("copy", 3 * 8), ("shared", 8)])
def test_reserved_positions(cache, positions):
    made = token(deeper_cache=cache)
    stepped = core(made)
    future = stepped.submit(tiny.request(made, tiny.words(1, 2), {"max_iterations": 3, "criterion": "fixed"}))
    stepped.step(4)
    assert stepped.core.scheduler.reserved == positions
    (sequence,) = stepped.core.scheduler.running
    assert sequence.used_positions == 2 * positions // 8
    future.cancel()
    stepped.step()
    assert is_empty(stepped.core)
    assert stepped.counters.wasted_iterations == 4


def test_events():
    made, seen = token(), []
    stepped = core(made)
    future = stepped.submit(requests(made)[0], on_event=seen.append)
    stepped.drain()
    result = future.result(0)
    assert [type(event) for event in seen[: result.iterations]] == [IterationEvent] * result.iterations
    tokens = [event for event in seen if isinstance(event, TokenEvent)]
    assert [event.iterations for event in tokens] == list(result.iterations_per_token)
    assert seen[result.iterations :] == [*tokens, FinishedEvent(result)]


@pytest.mark.parametrize("cache", ["copy", "shared"])
@pytest.mark.parametrize("where", [0, 1], ids=["prompt", "answer"])
def test_a_loop_that_breaks_down(cache, where, monkeypatch):
    """A state that is not finite at iteration 3 of the prompt, or of the first token: as in the reference."""
    made = token(deeper_cache=cache)
    fixed = {"max_iterations": 4, "criterion": "fixed"}
    ours, other = (tiny.request(made, prompt, fixed) for prompt in tiny.PROMPTS[1:3])
    stepped = core(made)
    future, neighbour = stepped.submit(ours), stepped.submit(other)
    apply = stepped.core.outputs._apply_iteration

    def spoiled(sequence, output, passed):
        if sequence.request is ours and sequence.t == 2 and len(sequence.token.loops) == where:
            start = sequence.cache_start + sequence.filled
            stepped.core.cache.store[:, :, sequence.slot, :, start : start + sequence.queries()] = torch.nan
            output = output._replace(
                state=torch.full_like(output.state, torch.nan), finite=False, measured={"norm": float("nan")}
            )
        apply(sequence, output, passed)

    monkeypatch.setattr(stepped.core.outputs, "_apply_iteration", spoiled)
    stepped.drain()
    result, whole = future.result(0), neighbour.result(0)
    assert facts(whole) == facts(generate(made, [other])[0])
    assert result.exit_reason == "diverged"
    # The last good state is read, and its keys and values are in the cache.
    shallow = generate(made, [tiny.request(made, tiny.PROMPTS[1], fixed | {"max_iterations": 2})])[0]
    if where == 0:
        assert result.token_ids == shallow.token_ids
        assert result.iterations_per_token == (3, *shallow.iterations_per_token[1:])
    else:
        assert result.iterations_per_token[:3] == (4, 3, 4)
    again = cache == "shared"
    assert result.forward_passes == sum(result.iterations_per_token) + again
    assert is_empty(stepped.core)


def test_a_token_whose_first_iteration_breaks_down_fails_alone(monkeypatch):
    made = token()
    ours, other = requests(made)[2], requests(made)[3]
    stepped = core(made)
    future, neighbour = stepped.submit(ours), stepped.submit(other)
    apply = stepped.core.outputs._apply_iteration

    def spoiled(sequence, output, passed):
        if sequence.request is ours and sequence.t == 0 and sequence.token.loops:
            output = output._replace(
                state=torch.full_like(output.state, torch.nan), finite=False, measured={"norm": float("nan")}
            )
        apply(sequence, output, passed)

    monkeypatch.setattr(stepped.core.outputs, "_apply_iteration", spoiled)
    stepped.drain()
    assert "not finite" in str(future.exception(0))
    assert facts(neighbour.result(0)) == facts(generate(made, [other])[0])
    assert is_empty(stepped.core)


def test_prefixes_are_reused():
    """Of every iteration, between requests of one maximum; without a loop, and with a shared cache, nothing is."""
    for loop, reused in (({}, 32), ({"deeper_cache": "shared"}, 0)):
        made = token(**loop)
        stepped = core(made, capacity=256)
        first, second = tiny.words(*range(34)), tiny.words(*range(33), 9, 9)
        asked = [(first, 3), (second, 3), (second, 2), (first, 0), (first, 3)]
        total = []
        for prompt, iterations in asked:
            request = tiny.request(made, prompt, {"max_iterations": iterations, "threshold": 0.7}, max_new_tokens=3)
            before = stepped.counters.reused_tokens
            future = stepped.submit(request)
            stepped.drain()
            assert facts(future.result(0)) == facts(generate(made, [request])[0])
            total.append(stepped.counters.reused_tokens - before)
        assert total == [0, reused, 0, 0, reused]
        assert is_empty(stepped.core)


def test_a_reused_prefix_is_run_again_by_the_base(monkeypatch):
    made = token()
    stepped, prompt = core(made, capacity=256), tiny.words(*range(20))
    loop = {"max_iterations": 3, "criterion": "fixed"}
    stepped.submit(tiny.request(made, prompt, loop))
    stepped.drain()
    apply = stepped.core.outputs._apply_iteration

    def spoiled(sequence, output, passed):
        bad = {"norm": float("nan")}
        apply(sequence, output._replace(state=output.state * torch.nan, finite=False, measured=bad), passed)

    monkeypatch.setattr(stepped.core.outputs, "_apply_iteration", spoiled)
    future = stepped.submit(tiny.request(made, prompt, loop))
    stepped.drain()
    assert stepped.counters.reused_tokens == 16
    plain = generate(made, [tiny.request(made, prompt, {"max_iterations": 0})])[0]
    assert (future.result(0).exit_reason, future.result(0).token_ids) == ("diverged", plain.token_ids)
    assert is_empty(stepped.core)

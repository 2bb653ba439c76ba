"""ModelRunner that take single positions and whole prompts together."""

import pytest
import torch

from slr_core.engine.runner import model_runner as passes
from slr_core.engine.runner.attention import NAME, supports_packing
from slr_core.engine.runner.model_runner import by_length
from slr_core.generation.reference import generate
from tests import tiny
from tests.engine.stepped import Stepped, empty, facts


def fixed(iterations, new=4):
    return {"loop": {"max_iterations": iterations, "criterion": "fixed"}, "max_new_tokens": new}


def watched(engine):
    """The shapes of an engine's passes and their joints, as they run."""
    seen = []

    def note(_module, _args, options):
        seen.append((tuple(options["inputs_embeds"].shape[:2]), options.get("joint")))

    engine.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_a_step_is_one_pass_and_answers_are_those_of_the_reference(kind, workspace):
    made = tiny.reasoner(kind, tiny.WORKSPACES[workspace])
    requests = [tiny.request(made, prompt, **fixed(i % 4)) for i, prompt in enumerate(tiny.PROMPTS)]
    with Stepped(made, slots=3, prefix_gib=0) as engine:
        seen = watched(engine)
        futures = []
        for request in requests:  # one a step: prompts meet iterations and tokens
            futures.append(engine.submit(request))
            engine.step()
        engine.drain()
        assert len(seen) == engine.counters.steps
        assert any(joint for _, joint in seen)
        assert [facts(f.result()) for f in futures] == [facts(generate(made, [r])[0]) for r in requests]
        assert empty(engine)


def test_nothing_is_padded():
    made = tiny.reasoner()
    with Stepped(made, slots=4, prefix_gib=0) as engine:
        seen = watched(engine)
        engine.submit(tiny.request(made, tiny.words(1), **fixed(5)))
        engine.step()
        for length in (3, 5, 9):
            engine.submit(tiny.request(made, tiny.words(*range(length)), **fixed(1)))
        engine.step()
        (_, alone), (shape, joint) = seen
        assert alone is None
        assert shape == (1 + 3 + 5 + 9, 1)
        assert [part.mask.shape[2] for part in joint.parts] == [1, 3, 5, 9]
        engine.drain()
    assert made.base.config._attn_implementation == "sdpa"  # the engine's own copy alone is changed


def test_single_positions_are_found_around_a_slot_that_runs_a_prompt():
    made = tiny.reasoner()
    lengths = ((1, fixed(5)), (1, fixed(0, 1)), (1, fixed(5)), (9, fixed(2)))
    requests = [tiny.request(made, tiny.words(*range(i, i + n)), **options) for i, (n, options) in enumerate(lengths)]
    with Stepped(made, slots=4, prefill_chunk=6, prefix_gib=0) as engine:
        futures = [engine.submit(request) for request in requests]
        engine.step()  # the second ends, and the long prompt moves into its slot
        seen = watched(engine)
        engine.step()
        assert [part.among.tolist() for part in seen[0][1].parts if part.among is not None] == [[0, 2]]
        engine.drain()
        assert [facts(f.result()) for f in futures] == [facts(generate(made, [r])[0]) for r in requests]


def test_many_positions_are_passes_of_their_own(monkeypatch):
    monkeypatch.setattr(passes, "JOINED_POSITIONS", 8)
    made = tiny.reasoner()
    with Stepped(made, slots=2, prefix_gib=0) as engine:
        seen = watched(engine)
        engine.submit(tiny.request(made, tiny.words(1), **fixed(5)))
        engine.submit(tiny.request(made, tiny.words(*range(8)), **fixed(1)))
        engine.step()
        assert [shape for shape, _ in seen] == [(1, 1), (1, 8)]
        engine.drain()
    assert by_length([]) == []


def test_a_model_without_sdpa_keeps_its_attention():
    base = tiny.base()
    base.set_attn_implementation("eager")
    assert not supports_packing(base)
    assert base.config._attn_implementation == "eager"


def test_a_model_that_keeps_options_to_itself_does_not_join():
    base = tiny.base()
    assert supports_packing(base)
    assert base.config._attn_implementation == NAME
    other = tiny.base()
    forward = other.base_model.forward
    other.base_model.forward = lambda *args, joint=None, **options: forward(*args, **options)
    assert not supports_packing(other)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_without_a_joint_it_is_the_attention_of_transformers(kind):
    base, same = tiny.base(kind), tiny.base(kind)
    assert supports_packing(same)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, same(input_ids=ids).logits)

from itertools import islice

import pytest
import torch

from slr_core.errors import ConfigError
from slr_core.evaluation.interventions import patch_state
from slr_core.evaluation.patching import PATCHES, measure_patching, pair_with_rival
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.prosqa import GraphSpec, ProsQA, distances, generate_prosqa, graph_of
from tests import tiny


@pytest.fixture(scope="module")
def pairs():
    examples = islice(generate_prosqa(GraphSpec(12, 3, 3, True), 3), 12)
    return [pair for example in examples if (pair := pair_with_rival(example)) is not None]


def test_rival(pairs):
    """It shares the facts and the options, and reaches the wrong option alone, in as many hops."""
    assert len(pairs) > 8
    for pair in pairs:
        own, rival = graph_of(pair.own), graph_of(pair.rival)
        assert (rival.target, rival.neg_target) == (own.neg_target, own.target)
        reached = distances(own.edges, rival.root)
        assert reached[rival.target] == distances(own.edges, own.root)[own.target] == 3
        assert rival.neg_target not in reached
        assert pair.rival.question.rpartition(". Is ")[0] == pair.own.question.rpartition(". Is ")[0]
        assert ProsQA().grade(pair.rival, pair.rival.answer)
        assert not ProsQA().grade(pair.own, pair.rival.answer)


def test_answers_follow(pairs):
    scores = {(s.patch, s.t): s for s in measure_patching(LatentReasoner.from_pretrained(None), pairs, iterations=5)}
    assert set(scores) == {(None, None), *((patch, t) for patch in PATCHES for t in (1, 2, 3))}
    assert scores[None, None].own > 0.9
    for t in (1, 2, 3):
        assert scores["rival_frontier", t].rival > 0.7
        assert scores["own_frontier", t].own > 0.7


def test_patched_state():
    """It is the row's h_t, and later states follow from it."""
    made = tiny.reasoner()
    loop = LoopParams(criterion="fixed", min_iterations=3, max_iterations=3)
    request = prepare(made, tiny.PROMPTS[0], loop, trace=True, include_states=True)
    (plain,) = generate(made, [request])
    donor = torch.ones_like(plain.states[2])
    for t in (0, 2):
        (patched,) = generate(made, [request], run_loop=patch_state(made, t, donor[None]))
        same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(plain.states, patched.states, strict=True)]
        assert same == [i < t for i in range(4)]
        assert torch.equal(patched.states[t], donor)


def test_refuses_other_workspaces(pairs):
    with pytest.raises(ConfigError, match="append"):
        measure_patching(tiny.reasoner(loop={"workspace": "block"}), pairs, iterations=2)

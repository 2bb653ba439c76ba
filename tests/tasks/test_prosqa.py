import itertools
import math
import random
import re
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from statistics import mean

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slr_core.errors import ConfigError, DataError
from slr_core.tasks import prosqa
from slr_core.tasks.base import Example, read_jsonl
from slr_core.tasks.prosqa import (
    CONCEPTS,
    NAMES,
    GraphSpec,
    ProsQA,
    depth_rule,
    distances,
    frontiers,
    generate_prosqa,
    graph_of,
)

FACT = r"(?:Every [a-z]+|[A-Z][a-z]+) is a [a-z]+\."
QUESTION = re.compile(rf"{FACT}(?: {FACT})+ Is [A-Z][a-z]+ a [a-z]+ or [a-z]+\?")
STEP = re.compile(FACT)
ANSWER = re.compile(r"[A-Z][a-z]+ is a [a-z]+\.")


def relaxed(edges, sources):
    """Shortest distances by relaxing every edge until nothing changes: not a breadth-first search."""
    found = dict.fromkeys(sources, 0)
    changed = True
    while changed:
        changed = False
        for parent, child in edges:
            if parent in found and found[parent] + 1 < found.get(child, math.inf):
                found[child] = found[parent] + 1
                changed = True
    return found


def parentless(graph):
    return set(range(graph.nodes)) - {child for _, child in graph.edges}


def shortest_paths(graph):
    """How many there are from the root to the target."""
    distance = relaxed(graph.edges, [graph.root])
    count = Counter({graph.root: 1})
    for node in sorted(distance, key=distance.get):
        for parent, child in graph.edges:
            if parent == node and distance.get(child) == distance[node] + 1:
                count[child] += count[node]
    return count[graph.target]


def words_of(question):
    """Facts as pairs, the person and the options, read from the text alone."""
    pairs = [tuple(x) for x in re.findall(r"(?:Every )?(\w+) is a (\w+)\.", question)]
    ((person, *options),) = re.findall(r"Is (\w+) a (\w+) or (\w+)\?$", question)
    return pairs, person, options


# -- every generated example -----------------------------------------------------------------------------


@st.composite
def specs(draw):
    nodes = draw(st.integers(6, 24))
    balanced = draw(st.booleans())
    # Without planted paths, long ones in small graphs are rare: they would take many draws.
    longest = nodes // 2 - 1 if balanced else min(3, nodes // 4)
    low = draw(st.integers(1, longest))
    return GraphSpec(nodes, low, draw(st.integers(low, longest)), balanced)


@given(specs(), st.integers(0, 10**6))
@settings(max_examples=150)
def test_an_example_is_what_its_options_ask_for(spec, seed):
    example = next(generate_prosqa(spec, seed))
    graph, symbols = graph_of(example), example.extra["idx_to_symbol"]
    assert 4 <= graph.nodes <= spec.nodes
    assert len(set(graph.edges)) == len(graph.edges)
    assert all(parent < child for parent, child in graph.edges)
    assert {n for edge in graph.edges for n in edge} == set(range(graph.nodes))

    roots = parentless(graph)
    assert {graph.root} <= roots
    assert {graph.target, graph.neg_target}.isdisjoint({parent for parent, _ in graph.edges})
    from_root = relaxed(graph.edges, [graph.root])
    assert graph.target in from_root
    assert graph.neg_target not in from_root
    assert spec.min_hops <= from_root[graph.target] <= spec.max_hops
    assert len(example.steps) == from_root[graph.target] == ProsQA().difficulty(example)

    assert len(set(symbols)) == graph.nodes
    assert all((symbols[n] in NAMES) == (n in roots) for n in range(graph.nodes))
    assert all((symbols[n] in CONCEPTS) == (n not in roots) for n in range(graph.nodes))


@given(specs(), st.integers(0, 10**6))
def test_the_text_says_what_the_graph_is(spec, seed):
    example = next(generate_prosqa(spec, seed))
    graph, symbols = graph_of(example), example.extra["idx_to_symbol"]
    assert QUESTION.fullmatch(example.question)
    facts, person, options = words_of(example.question)
    assert sorted(facts) == sorted((symbols[p], symbols[c]) for p, c in graph.edges)
    assert person == symbols[graph.root]
    assert sorted(options) == sorted([symbols[graph.target], symbols[graph.neg_target]])
    assert example.answer == f"{person} is a {symbols[graph.target]}."
    assert ANSWER.fullmatch(example.answer)
    assert ProsQA().grade(example, example.answer)
    assert not ProsQA().grade(example, f"{person} is a {symbols[graph.neg_target]}.")
    assert ProsQA().grade_steps(example, " ".join([*example.steps, "#", example.answer]))
    assert ProsQA().grade_steps(example, example.answer) is None


@given(specs(), st.integers(0, 10**6))
def test_the_steps_are_a_path_of_stated_facts(spec, seed):
    example = next(generate_prosqa(spec, seed))
    _, person, _ = words_of(example.question)
    assert all(STEP.fullmatch(step) and step in example.question for step in example.steps)
    path = [words for step in example.steps for words in re.findall(r"(?:Every )?(\w+) is a (\w+)\.", step)]
    assert path[0][0] == person
    assert all(a[1] == b[0] for a, b in itertools.pairwise(path))
    assert example.answer == f"{person} is a {path[-1][1]}."


@given(specs(), st.integers(0, 10**6))
def test_frontiers_are_the_nodes_at_each_distance(spec, seed):
    example = next(generate_prosqa(spec, seed))
    facts, person, _ = words_of(example.question)
    distance = relaxed(facts, [person])
    hops = distance[example.answer.split()[-1].rstrip(".")]
    expected = [{word for word, d in distance.items() if d == t} for t in range(hops + 1)]
    found = frontiers(example)
    assert [set(level) for level in found] == expected
    assert all(len(set(level)) == len(level) for level in found)
    assert found[0] == [person]


@given(st.integers(0, 10**6))
def test_distances_are_the_shortest(seed):
    rng = random.Random(seed)
    edges = [(rng.randrange(9), rng.randrange(9)) for _ in range(rng.randrange(20))]
    assert distances(edges, 4) == relaxed(edges, [4])


@given(specs(), st.integers(0, 10**6))
def test_balanced_leaves_nothing_to_the_depth_rule(spec, seed):
    assume(spec.balanced)
    example = next(generate_prosqa(spec, seed))
    graph = graph_of(example)
    depth = relaxed(graph.edges, parentless(graph))
    assert depth[graph.target] == depth[graph.neg_target]
    assert depth_rule(example) == 0.5
    assert ProsQA().baselines(example) == {"depth_rule": 0.5}


@given(st.integers(0, 10**6))
def test_the_depth_rule_takes_the_option_farther_from_its_nearest_parentless_node(seed):
    example = next(generate_prosqa(GraphSpec(balanced=False), seed))
    graph = graph_of(example)
    depth = relaxed(graph.edges, parentless(graph))
    target, other = depth[graph.target], depth[graph.neg_target]
    assert depth_rule(example) == (1.0 if target > other else 0.0 if target < other else 0.5)


def take(spec, seed, count):
    return list(itertools.islice(generate_prosqa(spec, seed), count))


def test_the_stream_is_that_of_its_seed():
    spec = GraphSpec(10, 2, 4, balanced=True)
    assert take(spec, 1, 20) == take(spec, 1, 20)
    assert take(spec, 1, 20) != take(spec, 2, 20)
    assert len({example.question for example in take(spec, 1, 300)}) == 300


def test_balanced_roots_and_options_are_coin_flips():
    examples = take(GraphSpec(10, 2, 4, balanced=True), 0, 1000)
    first = mean(words_of(e.question)[2][0] == e.answer.split()[-1].rstrip(".") for e in examples)
    root = mean(graph_of(e).root for e in examples)
    hops = Counter(len(e.steps) for e in examples)
    assert first == pytest.approx(0.5, abs=0.06)
    assert root == pytest.approx(0.5, abs=0.06)
    assert {n: hops[n] / 1000 for n in (2, 3, 4)} == pytest.approx(dict.fromkeys((2, 3, 4), 1 / 3), abs=0.06)


@pytest.mark.parametrize(
    "options",
    [
        {"nodes": 5},
        {"nodes": 41},
        {"nodes": 0},
        {"min_hops": 0},
        {"min_hops": 4, "max_hops": 3},
        {"nodes": 8, "min_hops": 1, "max_hops": 4},
        {"mean_parents": 0.0},
        {"mean_parents": -1.0},
        {"mean_parents": math.nan},
    ],
    ids=str,
)
def test_impossible_options_are_refused(options):
    # Those that were let through would draw graphs forever.
    with pytest.raises(ConfigError):
        GraphSpec(**options)


def test_rare_graphs_are_given_up(monkeypatch):
    monkeypatch.setattr(prosqa, "_MOST_DRAWS", 50)
    with pytest.raises(ConfigError, match=r"no graph in 50 draws has 13 to 13 hops .* fewer hops"):
        next(generate_prosqa(GraphSpec(28, 13, 13, balanced=False), 0))


def test_an_option_below_no_root_is_refused():
    """Also in a circle, where every node has a parent."""
    example = next(generate_prosqa(GraphSpec(10, 2, 4), 0))
    ProsQA().check_example(example)
    circle = [[b, a] for a, b in example.extra["edges"]]
    with pytest.raises(DataError, match="no parentless node"):
        ProsQA().check_example(replace(example, extra=example.extra | {"edges": [*example.extra["edges"], *circle]}))


def test_default_is_balanced():
    """The other form has a shortcut: nobody should be given it without asking."""
    examples = list(itertools.islice(ProsQA().generate(3), 50))
    assert ProsQA.generator_options["balanced"] is True
    assert {depth_rule(example) for example in examples} == {0.5}


# -- the official form -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    """2000 generated examples of the official form, seed 11."""
    return take(GraphSpec(balanced=False), 11, 2000)


def shares(values, keys):
    count = Counter(values)
    return {key: count[key] / len(values) for key in keys}


def test_sizes_are_those_of_the_official_files(official):
    graphs = [graph_of(e) for e in official]
    assert mean(g.nodes for g in graphs) == pytest.approx(22.8, abs=0.2)
    assert mean(len(g.edges) for g in graphs) == pytest.approx(36.1, abs=0.5)
    assert max(g.nodes for g in graphs) <= 28


def test_paths_are_those_of_the_official_files(official):
    lengths = shares([len(e.steps) for e in official], (3, 4, 5, 6))
    assert lengths == pytest.approx({3: 0.41, 4: 0.43, 5: 0.135, 6: 0.026}, abs=0.035)
    assert sum(lengths.values()) == pytest.approx(1)
    assert mean(shortest_paths(graph_of(e)) for e in official) == pytest.approx(1.6, abs=0.1)


def test_roots_are_those_of_the_official_files(official):
    assert mean(graph_of(e).root for e in official) == pytest.approx(0.625, abs=0.04)
    assert {graph_of(e).root for e in official} == {0, 1}
    counts = shares([len(parentless(graph_of(e))) for e in official], (2, 3, 4, 5))
    assert counts == pytest.approx({2: 0.576, 3: 0.312, 4: 0.09, 5: 0.02}, abs=0.035)


def test_labels_are_those_of_the_official_files(official):
    labels = []
    for graph in map(graph_of, official):
        below = [relaxed(graph.edges, [root]) for root in (0, 1)]
        labels += [(n in below[0]) + 2 * (n in below[1]) for n in range(2, graph.nodes)]
    assert shares(labels, range(4)) == pytest.approx({2: 0.51, 1: 0.39, 3: 0.064, 0: 0.0345}, abs=0.02)


def test_shortcut_on_official_files(official):
    assert mean(map(depth_rule, official)) == pytest.approx(0.911, abs=0.02)
    assert mean(depth_rule(e) for e in take(GraphSpec(balanced=True), 11, 200)) == 0.5


def test_all_names_and_concepts_occur(official):
    words = {symbol for e in official for symbol in e.extra["idx_to_symbol"]}
    assert words == {*NAMES, *CONCEPTS}
    assert (len(NAMES), len(CONCEPTS)) == (17, 38)


# -- grading, reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Tom is a rompus.", True),
        ("  Tom is a rompus.\n", True),
        ("Tom is a rompus", False),
        ("tom is a rompus.", False),
        ("Tom is a lempus.", False),
        ("Tom is a rompus. Tom is a lempus.", False),
        ("", False),
    ],
)
def test_the_whole_sentence_is_graded(text, right):
    assert ProsQA().grade(Example("q", (), "Tom is a rompus."), text) is right


PATH = Example(
    "Every b is a c. Tom is a b. Sam is a d. Tom is a d. Every d is a e. Every a is a c. Is Tom a e or c?",
    (),
    "Tom is a c.",
)


@pytest.mark.parametrize(
    ("text", "hold"),
    [
        ("Tom is a b. Every b is a c. # Tom is a c.", True),
        ("Tom is a b. Every b is a c. ### Tom is a c.", True),
        ("Tom is a b.\nEvery b is a c.\nTom is a c.", True),
        # What counts is where they lead, not what is then said.
        ("Tom is a b. Every b is a c. # Tom is a e.", True),
        ("Tom is a d. Every d is a e. # Tom is a e.", False),
        ("Tom is a d. Every d is a e. # Tom is a c.", False),
        ("Tom is a b. # Tom is a c.", False),
        ("Every b is a c. # Tom is a c.", False),
        ("Every b is a c. Tom is a b. # Tom is a c.", False),
        ("Tom is a b. Every a is a c. # Tom is a c.", False),
        ("Sam is a d. Every d is a e. # Tom is a e.", False),
        ("Tom is a c. # Tom is a c.", False),
        ("Tom is a a. Every a is a c. # Tom is a c.", False),
        ("Tom is a b. Every b is a c # Tom is a c.", False),
        ("Well. # Tom is a c.", False),
        ("Every. # Tom is a c.", False),
        ("Tom is a c.", None),
        ("\n# Tom is a c.\n", None),
        ("", None),
    ],
)
def test_written_steps_hold_when_they_are_a_path_to_the_right_option(text, hold):
    assert ProsQA().grade_steps(PATH, text) is hold


GRAPH = {"idx_to_symbol": ["Tom", "Sam", "rompus", "lempus"], "edges": [[0, 2], [1, 3]], "root": 0, "target": 2}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        GRAPH,
        {**GRAPH, "neg_target": "three"},
        {**GRAPH, "neg_target": 3, "edges": [[0, 2, 1]]},
        {**GRAPH, "neg_target": 3, "edges": None},
        {**GRAPH, "neg_target": 3, "idx_to_symbol": 4},
        {**GRAPH, "neg_target": 3, "target": 3},
        {**GRAPH, "neg_target": 3, "target": 9},
        {**GRAPH, "neg_target": 9, "edges": [[0, 2]]},
    ],
    ids=str,
)
def test_an_example_without_a_usable_graph_is_a_data_error(extra):
    example = Example("q", (), "a", extra)
    with pytest.raises(DataError):
        (frontiers(example), depth_rule(example))


@pytest.mark.parametrize(
    ("folder", "rule"), [("prosqa", 0.925), ("prosqa_balanced", 0.5)], ids=["official", "balanced"]
)
def test_the_data_files(folder, rule, shared_data):
    examples = read_jsonl(shared_data / folder / "valid.jsonl.gz")
    assert len(examples) == 300
    task = ProsQA()
    assert mean(map(depth_rule, examples)) == pytest.approx(rule, abs=5e-4)
    checked = 0
    for example in examples:
        assert QUESTION.fullmatch(example.question)
        assert all(STEP.fullmatch(step) for step in example.steps)
        assert task.grade(example, example.answer)
        assert task.grade_steps(example, " ".join([*example.steps, "#", example.answer]))
        graph, symbols = graph_of(example), example.extra["idx_to_symbol"]
        facts, person, options = words_of(example.question)
        assert sorted(facts) == sorted((symbols[p], symbols[c]) for p, c in graph.edges)
        assert person == symbols[graph.root]
        assert sorted(options) == sorted([symbols[graph.target], symbols[graph.neg_target]])
        levels = frontiers(example)
        assert len(levels) - 1 == len(example.steps) == task.difficulty(example)
        assert symbols[graph.target] in levels[-1]
        # neighbor_k holds those of the frontier that lie on a shortest path to the target.
        backwards = relaxed([(c, p) for p, c in graph.edges], [graph.target])
        for k, nodes in example.extra.get("neighbor_k", {}).items():
            on_path = {
                s for n, s in enumerate(symbols) if s in levels[int(k)] and backwards.get(n) == len(levels) - 1 - int(k)
            }
            assert {symbols[n] for n in nodes} == on_path
            checked += 1
    assert checked > 0 or folder == "prosqa"


@pytest.mark.parametrize(
    ("spec", "digest"),
    [
        (GraphSpec(20, 2, 6, balanced=True), "1f2eb51caa319b19"),
        (GraphSpec(28, 3, 6, balanced=False), "e32468cc76348907"),
    ],
    ids=["balanced", "official"],
)
def test_a_seed_gives_the_questions_that_it_always_gave(spec, digest):
    """Published figures name the hash of their questions."""
    questions = "\n".join(example.question for example in itertools.islice(generate_prosqa(spec, 7), 50))
    assert sha256(questions.encode()).hexdigest()[:16] == digest

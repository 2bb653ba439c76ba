import re
from collections import Counter
from hashlib import sha256
from itertools import islice, pairwise
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slr_core.errors import DataError
from slr_core.tasks.base import Example, read_jsonl
from slr_core.tasks.prontoqa import CONCEPTS, MOST_HOPS, NAMES, PROPERTIES, ProntoQA, generate_prontoqa, mention_rule

FAMILY = {word: i for i, family in enumerate(PROPERTIES) for word in family}
RULE = re.compile(r"(?:(Each|Every) (\w+) is|([A-Z]\w+)es are) (not )?(an? )?(\w+)")


def parsed(example):
    """Premises, is-a rules, property rules and forms of a question, read by splitting it at its full stops."""
    context, _, asked = example.question.partition(" True or false: ")
    sentences = context.removesuffix(".").split(". ")
    name = asked.split()[0]
    premises = [s.split()[-1] for s in sentences if s.startswith(f"{name} is a")]
    kinds, properties, forms = [], {}, Counter()
    for sentence in sentences:
        if not sentence.startswith(f"{name} is a"):
            form, one, many, negated, article, what = RULE.fullmatch(sentence).groups()
            concept = (one or many).lower()
            forms[form or "plural"] += 1
            if what in FAMILY:
                assert concept not in properties
                properties[concept] = (what, bool(negated))
            else:
                assert (article is None) == (form is None)
                assert article is None or (article == "an ") == (what[0] in "aeiou")
                kinds.append((concept, what if form else what.removesuffix("es")))
    words = asked.rstrip(".").split()
    return premises, kinds, properties, forms, (words[-1], "not" in words)


def derived(example):
    """The answer by forward chaining over the text alone."""
    premises, kinds, properties, _, (word, negated) = parsed(example)
    known = set(premises)
    while more := {b for a, b in kinds if a in known} - known:
        known |= more
    (holds,) = {properties[c][1] for c in known if c in properties and properties[c][0] == word}
    return str(holds == negated)


def figures(examples):
    """What a file of questions looks like, as shares and means."""
    negated = {"path": [], "target": [], "elsewhere": []}
    forms, counts = Counter(), Counter()
    first = []
    for example in examples:
        premises, kinds, properties, form, (word, _) = parsed(example)
        path = [step.split(".")[0].split()[-1] for step in example.steps[:-1]]
        (other,) = {c for c, (what, _) in properties.items() if what == word} - {path[-1]}
        for concept, (_, no) in properties.items():
            if concept != other:
                role = "target" if concept == path[-1] else "path" if concept in path else "elsewhere"
                negated[role].append(no)
        forms += form
        counts[len(kinds), len(properties), len(premises), len(example.steps)] += 1
        first.append(premises[0] == path[0])
    total = forms.total()
    return {
        "counts": {k: n / len(examples) for k, n in counts.items()},
        **{f"negated {role}": mean(values) for role, values in negated.items()},
        **{form: n / total for form, n in forms.items()},
        "true": mean(e.answer == "True" for e in examples),
        "start first": mean(first),
    }


# Of the 9,200 official training and validation questions.
OFFICIAL = {
    "counts": {(11, 12, 2, 6): 1.0},
    "negated path": 0.274,
    "negated target": 0.467,
    "negated elsewhere": 0.33,
    "plural": 0.5,
    "Each": 0.25,
    "Every": 0.25,
    "true": 0.491,
    "start first": 0.508,
}


def like_the_official(found, tolerance):
    assert found.pop("counts") == OFFICIAL["counts"]
    expected = {k: v for k, v in OFFICIAL.items() if k != "counts"}
    assert found == pytest.approx(expected, abs=tolerance)


def take(hops, count, balanced=False, seed=0):
    return list(islice(generate_prontoqa(hops, balanced, seed), count))


@given(st.integers(1, MOST_HOPS), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=60)
def test_the_answer_follows_from_the_rules_in_as_many_hops_as_asked(hops, balanced, seed):
    (example,) = take(hops, 1, balanced, seed)
    assert derived(example) == example.answer
    assert ProntoQA().difficulty(example) == hops
    assert len(example.steps) == hops + 1
    assert all(sentence in example.question for step in example.steps[:-1] for sentence in step.split(". ")[1:])
    chain = [step.split(".")[0].split()[-1] for step in example.steps[:-1]]
    assert chain == example.extra["chain"]
    premises, kinds, properties, _, (word, negated) = parsed(example)
    assert chain[0] in premises
    assert set(pairwise(chain)) <= set(kinds)
    assert properties[chain[-1]][0] == word
    said = example.steps[-1].split()
    assert (said[-1].rstrip("."), "not" in said) == properties[chain[-1]]
    assert (properties[chain[-1]][1] == negated) == (example.answer == "True")
    assert ProntoQA().grade_steps(example, f"{' '.join(example.steps)} ### {example.answer}")
    assert ProntoQA().grade_steps(example, f"{' '.join(example.steps[:-1])} ### {example.answer}") is False


@given(st.integers(1, MOST_HOPS), st.integers(0, 10**6))
@settings(max_examples=40)
def test_in_the_official_form_a_concept_is_mentioned_once_and_gives_the_answer_away(hops, seed):
    (example,) = take(hops, 1, seed=seed)
    assert mention_rule(example) == 1.0
    if hops <= 6:  # more hops than the official concepts are enough for
        assert set(re.findall(r"\w+p(?:us)\b", example.question.lower())) <= {*CONCEPTS}


def test_a_seed_keeps_its_questions():
    """Committed figures name seeds."""
    questions = (x.question for hops in (1, 5, 6) for balanced in (False, True) for x in take(hops, 20, balanced))
    assert sha256("\n".join(questions).encode()).hexdigest().startswith("79f79e4f6381bc5c")


@given(st.integers(1, MOST_HOPS), st.integers(0, 10**6))
@settings(max_examples=40)
def test_balanced_both_rules_stand_at_the_same_place_of_chains_of_one_build(hops, seed):
    (example,) = take(hops, 1, balanced=True, seed=seed)
    assert mention_rule(example) == 0.5
    _, kinds, properties, _, (word, _) = parsed(example)
    about = [c for c, (what, _) in properties.items() if what == word]
    degrees = [(sum(a == c for a, _ in kinds), sum(b == c for _, b in kinds)) for c in about]
    assert len(about) == 2
    assert degrees[0] == degrees[1]
    assert properties[about[0]][1] != properties[about[1]][1]


def test_generated_questions_look_like_the_official_ones():
    examples = take(5, 3000, seed=1)
    like_the_official(figures(examples), 0.03)
    assert {example.question.split(": ")[-1].split()[0] for example in examples} == {*NAMES}


def test_shortcut_rules_are_worth_what_the_card_says():
    def score(examples):
        rules = [ProntoQA().baselines(e) for e in examples]
        return {name: mean(r[name] for r in rules) for name in rules[0]}

    assert score(take(5, 1000)) == {"always_true": pytest.approx(0.49, abs=0.05), "mention_rule": 1.0}
    assert score(take(3, 1000, balanced=True)) == {"always_true": pytest.approx(0.5, abs=0.05), "mention_rule": 0.5}


def test_the_mention_rule_can_be_wrong_and_knows_what_it_reads():
    rules = "Each impus is happy. Impuses are rompuses. Every wumpus is not happy."
    question = rules + " {}Max is a wumpus. True or false: Max is happy."
    assert mention_rule(Example(question.format("Zumpuses are impuses. "), (), "False")) == 0.5  # both are mentioned
    unmentioned = question.replace("Max is a wumpus. ", "Max is a lempus. ").format("")
    assert mention_rule(Example(unmentioned, (), "False")) == 0.0
    assert mention_rule(Example(unmentioned, (), "True")) == 1.0
    assert mention_rule(Example(unmentioned.replace("Max is happy", "Max is not happy"), (), "True")) == 0.0
    with pytest.raises(DataError, match="not a ProntoQA question"):
        mention_rule(Example("Is Tom a lempus or rompus?", (), "Tom is a lempus."))


PROOF = Example(
    "Each wumpus is a lempus. Lempuses are not happy. Zumpuses are happy. Every lempus is a rompus. Max is a wumpus. "
    "True or false: Max is happy.",
    (),
    "False",
)


@pytest.mark.parametrize(
    ("steps", "hold"),
    [
        ("Max is a wumpus. Each wumpus is a lempus. Max is a lempus. Lempuses are not happy. Max is not happy.", True),
        # Another form of the same rules; premises need not be said again, nor rules be used at once.
        ("Wumpuses are lempuses. Every lempus is not happy. Max is a lempus. Max is not happy.", True),
        ("Each wumpus is a lempus. Max is a lempus. Lempuses are not happy. Max is happy.", False),
        ("Max is a wumpus. Each wumpus is a lempus. Max is a lempus.", False),
        ("Max is a wumpus. Each wumpus is a lempus. Max is a lempus. Max is not happy.", False),
        ("Max is a wumpus. Lempuses are not happy. Max is not happy.", False),
        ("Max is a zumpus. Zumpuses are happy. Max is happy.", False),
        ("Max is a wumpus. Wumpuses are not happy. Max is not happy.", False),
        ("Sam is a wumpus. Each wumpus is a lempus. Sam is a lempus. Lempuses are not happy. Sam is not happy.", False),
        ("Each wumpus is a lempus. Max is a lempus. Lempuses are not happy. Max is not happy. Max is a wumpus.", False),
        ("So. Each wumpus is a lempus. Max is a lempus. Lempuses are not happy. Max is not happy.", False),
        ("Each wumpus is a lempus. Max is a lempus. Lempuses are not happy. Max is not happy. Zumpuses are", False),
        ("", None),
    ],
)
def test_written_steps_hold_when_they_are_a_proof(steps, hold):
    for answer in ("False", "True"):
        assert ProntoQA().grade_steps(PROOF, f"{steps}\n### {answer}") is hold
    assert not ProntoQA().grade_steps(Example(PROOF.question, (), "True"), f"{steps} # True")


def test_a_proof_of_something_else_is_a_data_error():
    with pytest.raises(DataError, match="not a ProntoQA question"):
        ProntoQA().grade_steps(Example("Is Tom a lempus or rompus?", (), "Tom is a lempus."), "Tom is a lempus. # x")


def test_the_official_file(shared_data):
    examples = read_jsonl(shared_data / "prontoqa" / "valid.jsonl.gz")
    assert len(examples) == 200
    task = ProntoQA()
    assert all(derived(e) == e.answer and task.grade(e, e.answer) and task.difficulty(e) == 5 for e in examples)
    assert mean(task.baselines(e)["mention_rule"] for e in examples) == 1.0
    assert all(task.grade_steps(e, f"{' '.join(e.steps)} ### {e.answer}") for e in examples)
    assert mean(task.baselines(e)["always_true"] for e in examples) == 0.445


@pytest.mark.slow
def test_generator_fits_official_file(shared_data):
    examples = [e for f in ("train", "valid") for e in read_jsonl(shared_data / "prontoqa" / f"{f}.jsonl.gz")]
    like_the_official(figures(examples), 0.005)
    assert all(mention_rule(e) == 1.0 for e in examples)
    assert mean(e.answer == "True" for e in examples[:9000]) == pytest.approx(0.492, abs=5e-4)

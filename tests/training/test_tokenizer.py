import torch
from hypothesis import given
from hypothesis import strategies as st

from slr_core import tasks
from slr_core.tasks.base import read_jsonl
from slr_core.tasks.prosqa import CONCEPTS, NAMES, GraphSpec, generate_prosqa
from slr_core.training.tokenizer import prontoqa_tokenizer, prosqa_tokenizer, start_embeddings, word_tokenizer

TOKENIZER = prosqa_tokenizer()


def back(text):
    return TOKENIZER.decode(TOKENIZER(text).input_ids, skip_special_tokens=True)


@given(st.integers(0, 10**6), st.sampled_from([8, 16, 28]), st.booleans())
def test_questions_and_answers_survive(seed, nodes, balanced):
    example = next(generate_prosqa(GraphSpec(nodes, 1, 2, balanced), seed))
    for text in (example.question, example.answer, *example.steps):
        assert back(text) == text
        assert TOKENIZER.unk_token_id not in TOKENIZER(text).input_ids
    facts = len(example.extra["edges"])
    assert len(TOKENIZER(example.question).input_ids) == 2 * facts + 3
    assert len(TOKENIZER(example.answer).input_ids) == 2


@given(st.lists(st.tuples(st.sampled_from((*NAMES, *CONCEPTS)), st.sampled_from(CONCEPTS)), min_size=1, max_size=6))
def test_any_run_of_facts_survives(facts):
    text = " ".join(f"{s} is a {o}." if s in NAMES else f"Every {s} is a {o}." for s, o in facts)
    assert back(text) == text
    assert len(TOKENIZER(text).input_ids) == 2 * len(facts)


def test_the_official_files_survive(shared_data):
    for example in read_jsonl(shared_data / "prosqa" / "valid.jsonl.gz"):
        for text in (example.question, example.answer, *example.steps):
            assert back(text) == text
            assert TOKENIZER.unk_token_id not in TOKENIZER(text).input_ids


def test_what_it_does_not_know_is_unknown():
    ids = TOKENIZER("Every wumpus is a unicorn.").input_ids
    assert TOKENIZER.unk_token_id in ids
    assert TOKENIZER.convert_tokens_to_ids("Every wumpus") == ids[0]


def test_the_vocabulary_is_dense_and_every_token_is_its_own():
    vocabulary = TOKENIZER.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(TOKENIZER)))
    assert len(vocabulary) == 3 + 2 * len(NAMES) + 4 * len(CONCEPTS)
    assert len({TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}) == 3


def test_tokens_of_one_word_start_alike():
    table = start_embeddings(TOKENIZER, 256, torch.Generator().manual_seed(0))
    again = start_embeddings(TOKENIZER, 256, torch.Generator().manual_seed(0))
    assert torch.equal(table, again)
    assert table.shape == (len(TOKENIZER), 256)
    assert (table.norm(dim=-1) > 0).all()
    every, stated, other = (
        table[TOKENIZER.convert_tokens_to_ids(token)] for token in ("Every wumpus", " is a wumpus.", " is a rompus.")
    )
    assert torch.cosine_similarity(every, stated, dim=0) > 0.4
    assert torch.cosine_similarity(every, other, dim=0).abs() < 0.25


@given(st.integers(0, 10**6))
def test_a_chain_of_thought_survives_with_its_mark(seed):
    tokenizer = prosqa_tokenizer(chain_of_thought=True)
    example = next(generate_prosqa(GraphSpec(12, 2, 4, True), seed))
    text = " ".join([*example.steps, "#", example.answer])
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert len(ids) == 2 * len(example.steps) + 3
    assert tokenizer.decode(ids) == text
    # Every other token is the same: only the mark is new.
    assert tokenizer.get_vocab() == {**TOKENIZER.get_vocab(), "#": len(TOKENIZER)}


# -- the others ------------------------------------------------------------------------------------------

PRONTO = prontoqa_tokenizer()


@given(st.integers(0, 10**6), st.booleans())
def test_prontoqa_survives_with_two_tokens_a_sentence(seed, balanced):
    example = next(tasks.get_task("prontoqa").generate(seed, hops=5, balanced=balanced))
    for text in (example.question, example.answer, *example.steps, " ".join([*example.steps, "#", example.answer])):
        ids = PRONTO(text).input_ids
        assert PRONTO.unk_token_id not in ids
        assert PRONTO.decode(ids) == text
    assert len(PRONTO(example.question).input_ids) == 2 * example.question.count(".")


def test_the_official_prontoqa_file_survives(shared_data):
    for example in read_jsonl(shared_data / "prontoqa" / "valid.jsonl.gz"):
        for text in (example.question, example.answer, *example.steps):
            assert PRONTO.decode(PRONTO(text).input_ids) == text


def test_plural_and_capitals_start_alike():
    table = start_embeddings(PRONTO, 256, torch.Generator().manual_seed(0))
    said = ("Each wumpus", "Wumpuses", " is a wumpus.", " are wumpuses.")
    vectors = [table[PRONTO.convert_tokens_to_ids(token)] for token in said]
    other = table[PRONTO.convert_tokens_to_ids(" are rompuses.")]
    assert min(float(torch.cosine_similarity(vectors[0], v, dim=0)) for v in vectors[1:]) > 0.4
    assert torch.cosine_similarity(vectors[0], other, dim=0).abs() < 0.25


@given(st.lists(st.sampled_from(["What is 3 + 4?", "a b,  c.", "Take 3 1 2. So!", "\n- x_y"]), min_size=1))
def test_known_words_survive(texts):
    tokenizer = word_tokenizer(texts)
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.unk_token_id in tokenizer("unheard").input_ids

"""Log-probabilities: of prompts by the base model, of written tokens wherever they were read, of tokens forced on
the answer; the engine's like the reference's, however a prompt is cut into chunks."""

import pytest
import torch

from slr_core.engine import Engine, FinishedEvent, TokenEvent
from slr_core.errors import RequestError
from slr_core.generation.logprobs import score, score_states
from slr_core.generation.reference import generate
from slr_core.types import Tokens
from tests import tiny

PROMPT = "w9 w8 w7 w6 w5 w4 w3 w2 w1"
IDS = tuple(tiny.ids(PROMPT))


@pytest.fixture(params=["append", "block", "prompt"], scope="module")
def made(request):
    return tiny.reasoner(loop=tiny.WORKSPACES[request.param], decode=True)


def same(ours, theirs) -> bool:
    assert [s.token_id for s in ours] == [s.token_id for s in theirs]
    assert [[token for token, _ in s.top] for s in ours] == [[token for token, _ in s.top] for s in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-4))
        assert [p for _, p in mine.top] == pytest.approx([p for _, p in other.top], abs=1e-4)
    return True


def plain_scores(made, ids):
    """By hand, from the base model."""
    with torch.inference_mode(), made.adapters.use(None):
        logprobs = made.base(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [None, *(float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1))]


@pytest.mark.parametrize("chunk", [512, 4])
def test_prompt_and_answer(made, chunk):
    options = {"logprobs": 3, "score_prompt": True}
    request = tiny.request(made, PROMPT, **options)
    (expected,) = generate(made, [request])
    assert [s.logprob for s in expected.prompt_scores] == pytest.approx(plain_scores(made, IDS), abs=1e-4, nan_ok=False)
    assert [s.token_id for s in expected.scores] == list(expected.token_ids)
    assert all(s.logprob == s.top[0][1] and len(s.top) == 3 for s in expected.scores), "greedy takes the likeliest"
    with Engine(made, threads=1, prefill_chunk=chunk) as engine:
        engine.submit(tiny.request(made, PROMPT)).result()  # its prefix is at hand now, and is no help
        told = []
        result = engine.submit(request, on_event=told.append).result()
    assert result.token_ids == expected.token_ids
    assert result.iterations == expected.iterations
    assert result.forward_passes == expected.forward_passes
    assert same(result.prompt_scores, expected.prompt_scores)
    assert same(result.scores, expected.scores)
    written = [event.score for event in told if isinstance(event, TokenEvent)]
    assert tuple(written) == result.scores
    assert isinstance(told[-1], FinishedEvent)


def test_forced_tokens_are_written_and_scored_where_they_stand(made):
    forced = tuple(tiny.ids("w30 w4 w17"))
    request = tiny.request(made, PROMPT, logprobs=0, forced_ids=forced, max_new_tokens=2)
    (expected,) = generate(made, [request])
    assert expected.token_ids[:3] == forced
    assert 1 <= expected.completion_tokens <= 2, "the end token may come first"
    assert expected.prompt_tokens == len(request.prompt_ids) + len(forced)
    # The first is read after the loop, as the first token of any answer is.
    free = tiny.request(made, PROMPT, logprobs=len(tiny.WORDS))
    (chosen,) = generate(made, [free])
    assert expected.scores[0].logprob == pytest.approx(dict(chosen.scores[0].top)[forced[0]], abs=1e-4)
    with Engine(made, threads=1) as engine:
        result = engine.submit(request).result()
        assert engine.counters.tokens == result.completion_tokens
    assert result.token_ids == expected.token_ids
    assert (result.prompt_tokens, result.forced_tokens) == (expected.prompt_tokens, expected.forced_tokens)
    assert same(result.scores, expected.scores)


def test_what_is_forced_neither_ends_an_answer_nor_stops_it(made):
    forced = (tiny.EOS, *tiny.ids("w3 w4"))
    request = tiny.request(made, PROMPT, forced_ids=forced, stop=["w3"], max_new_tokens=2)
    (result,) = generate(made, [request])
    assert result.token_ids[:3] == forced
    assert len(result.token_ids) > 3
    assert result.text.startswith("w3 w4")


def test_without_a_loop_forced_tokens_have_the_base_models_scores(made):
    forced = IDS[4:]
    request = tiny.request(
        made,
        Tokens(IDS[:4]),
        {"max_iterations": 0},
        max_new_tokens=1,
        logprobs=0,
        score_prompt=True,
        forced_ids=forced,
    )
    (result,) = generate(made, [request])
    scores = [*result.prompt_scores, *result.scores[: len(forced)]]
    assert [s.logprob for s in scores] == pytest.approx(plain_scores(made, IDS), abs=1e-4)


def test_nobody_pays_for_what_nobody_asked(made):
    (result,) = generate(made, [tiny.request(made, PROMPT)])
    assert result.scores == result.prompt_scores == ()


@pytest.mark.parametrize(("ids", "told"), [((), "at least one token"), ((3, -1), "got -1"), ((40,), "0 to 39, got 40")])
def test_token_ids_are_checked(made, ids, told):
    with Engine(made, threads=1) as engine, pytest.raises(RequestError, match=told) as error:
        engine.prepare(Tokens(ids), tiny.request(made, "w1").loop)
    assert error.value.param == "prompt"


def test_tokens_take_none_of_the_checkpoints_texts():
    made = tiny.reasoner(text={"prompt_prefix": "w1 ", "answer_prefix": "w2", "stop": ["w3"]})
    request = tiny.request(made, Tokens(IDS))
    assert (request.prompt_ids, request.answer_prefix_ids, request.stop) == (IDS, (), ())


def test_logits_that_are_no_numbers_are_an_error_and_no_answer(made):
    head = tiny.twin(made)
    with torch.no_grad():
        head.base.get_output_embeddings().weight[5] = torch.nan
    with Engine(head, threads=1) as engine:
        future = engine.submit(tiny.request(head, PROMPT))
        with pytest.raises(Exception, match="not finite"):
            future.result()


def test_suppressed_tokens_are_not_among_the_likely_ones():
    (found,) = score(torch.tensor([[1.0, 2.0, -torch.inf]]), [2], 3)
    assert found.logprob is None
    assert [token for token, _ in found.top] == [1, 0]


def test_parts_are_scored_like_the_whole(monkeypatch):
    head, states, ids = torch.nn.Linear(8, 11), torch.randn(7, 8), [1, 2, 3, 4, 5]
    monkeypatch.setattr("slr_core.generation.logprobs._CHUNK", 2)
    with torch.no_grad():
        assert same(score_states(head, states, ids, 2), score(head(states[:5]), ids, 2))
        assert score_states(head, states, [], 2) == []

import pytest

from slr_core.config import TextConfig
from slr_core.errors import RequestError
from slr_core.generation import generate, prepare
from slr_core.loop.convergence import LoopSettings
from slr_core.sampling import SamplingSettings
from tests import tiny

FIXED = {"max_iterations": 2, "criterion": "fixed"}


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner()


def loop(made, **options):
    return LoopSettings.resolve(made.config.loop, **options)


# -- prepare ---------------------------------------------------------------------------------------------


def test_prefix_suffix_and_stops_of_the_checkpoint_are_applied():
    made = tiny.reasoner(text={"prompt_prefix": "w1 ", "prompt_suffix": " w2", "stop": ["w9"], "max_new_tokens": 7})
    request = prepare(made, "w5", loop(made), stop=("w8",))
    assert request.prompt_ids == tuple(tiny.ids("w1 w5 w2"))
    assert request.stop == ("w9", "w8")
    assert request.max_new_tokens == 7


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "w1 \ud800"])
def test_a_prompt_without_text_is_refused(made, prompt):
    with pytest.raises(RequestError) as caught:
        prepare(made, prompt, loop(made))
    assert caught.value.param == "prompt"


def test_the_longest_prompt_that_fits_and_the_next(made):
    iterations = 5
    fits = tiny.POSITIONS - iterations - 1
    settings = loop(made, max_iterations=iterations)
    request = prepare(made, tiny.words(*[1] * fits), settings)
    assert request.max_new_tokens == 1
    with pytest.raises(RequestError, match=f"at most {fits} fit") as caught:
        prepare(made, tiny.words(*[1] * (fits + 1)), settings)
    assert caught.value.param == "prompt"
    (result,) = generate(made, [request])
    assert result.completion_tokens == 1


def test_an_explicit_limit_must_fit_and_a_default_gives_way(made):
    settings, prompt = loop(made, max_iterations=4), tiny.words(*[1] * 50)
    assert prepare(made, prompt, settings, max_new_tokens=10).max_new_tokens == 10
    assert prepare(made, prompt, settings).max_new_tokens == 10
    with pytest.raises(RequestError, match=r"at most 10 .* got 11") as caught:
        prepare(made, prompt, settings, max_new_tokens=11)
    assert caught.value.param == "max_new_tokens"


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_whole_budget_can_be_used(kind):
    made = tiny.reasoner(kind)
    request = prepare(made, tiny.words(*range(20)), loop(made, max_iterations=4, criterion="fixed"), max_new_tokens=40)
    (result,) = generate(made, [request])
    assert result.iterations == 4
    assert result.completion_tokens == 40 or result.finish_reason == "stop"


# -- generate --------------------------------------------------------------------------------------------


def first_answer(made, **options):
    return generate(made, [tiny.request(made, tiny.PROMPTS[3], FIXED, **options)])[0]


def test_counts_and_text(made):
    result = first_answer(made, max_new_tokens=5)
    assert result.completion_tokens == len(result.token_ids) <= 5
    assert result.prompt_tokens == 9
    assert result.forward_passes == 1 + 2 + result.completion_tokens - 1
    assert result.text == tiny.tokenizer().decode(result.token_ids, skip_special_tokens=True)
    assert result.final_change == result.records[-1].relative_change
    assert (result.iterations, result.exit_reason) == (2, "max_iterations")
    timings = result.timings
    parts = timings.queue_s + timings.prefill_s + timings.loop_s + timings.decode_s
    assert timings.total_s == pytest.approx(parts, abs=1e-9)
    assert min(timings.prefill_s, timings.loop_s, timings.decode_s) >= 0


def test_waiting_is_part_of_the_total(made):
    (result,) = generate(made, [tiny.request(made, tiny.PROMPTS[3], FIXED)], queued_s=[5.0])
    assert result.timings.queue_s == 5.0
    assert result.timings.total_s > 5.0


def test_the_limit_ends_an_answer_by_length(made):
    long = first_answer(made, max_new_tokens=12)
    assert long.finish_reason == "length"
    for limit in (1, 2, 11):
        short = first_answer(made, max_new_tokens=limit)
        assert (short.token_ids, short.finish_reason) == (long.token_ids[:limit], "length")


def test_the_end_token_ends_an_answer_and_is_not_text(made):
    seeds = range(40)
    sampled = [
        first_answer(made, max_new_tokens=12, sampling=SamplingSettings(temperature=3.0, seed=seed)) for seed in seeds
    ]
    ended = [result for result in sampled if tiny.EOS in result.token_ids]
    assert ended
    for result in sampled:
        assert (result.finish_reason == "stop") == (tiny.EOS in result.token_ids)
        assert tiny.EOS not in result.token_ids[:-1]
        assert "<eos>" not in result.text


def test_a_stop_string_cuts_the_text_before_it(made):
    whole = first_answer(made, max_new_tokens=10)
    pieces = whole.text.split()
    stop = next(piece for piece in pieces[1:] if piece != pieces[0])
    cut = first_answer(made, max_new_tokens=10, stop=(stop,))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.token_ids) == pieces.index(stop) + 1


def test_of_several_stop_strings_the_earliest_cuts(made):
    whole = first_answer(made, max_new_tokens=10)
    first, second = whole.text.split()[:2]
    cut = first_answer(made, max_new_tokens=10, stop=(second, f"{first} {second}", "absent"))
    assert cut.text == ""


def test_stop_strings_reach_over_tokens(made):
    whole = first_answer(made, max_new_tokens=10)
    pieces = whole.text.split()
    cut = first_answer(made, max_new_tokens=10, stop=(f"{pieces[1]} {pieces[2]}",))
    assert cut.text == f"{pieces[0]} "
    assert len(cut.token_ids) == 3


def test_only_a_traced_row_has_the_top_tokens_it_asked_for(made):
    asked = [(True, 3), (True, 1), (False, 0)]
    requests = [
        tiny.request(made, prompt, FIXED, trace=trace, top_tokens=top)
        for prompt, (trace, top) in zip(tiny.PROMPTS, asked, strict=False)
    ]
    results = generate(made, requests)
    for result, (_, top) in zip(results, asked, strict=True):
        assert [len(record.top_tokens) for record in result.records] == [top] * 2
    assert all(record.entropy is not None for result in results[:2] for record in result.records)


def test_text_settings_have_safe_defaults():
    assert TextConfig().stop == ()
    assert TextConfig().max_new_tokens >= 1

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from slr_core.config import TextConfig
from slr_core.errors import RequestError
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.params import LoopParams, SamplingParams
from tests import tiny

FIXED = {"max_iterations": 2, "criterion": "fixed"}


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner()


# -- prepare ---------------------------------------------------------------------------------------------


def test_prompt_text():
    """A prompt is stripped, then replaced in, then put between prefix and suffix."""
    text = {"prompt_strip": True, "prompt_replace": [["w1", "w2"], ["w2 w2", "w5"]], "prompt_prefix": "w1 "}
    made = tiny.reasoner(text=text)
    assert made.config.text.wrap_prompt("  w1 w2 w3\n") == "w1 w5 w3"
    assert list(tiny.request(made, "  w1 w2 w3 ").prompt_ids) == tiny.ids("w1 w5 w3")


def test_prefix_suffix_and_stops_of_the_checkpoint_are_applied():
    made = tiny.reasoner(text={"prompt_prefix": "w1 ", "prompt_suffix": " w2", "stop": ["w9"], "max_new_tokens": 7})
    request = prepare(made, "w5", LoopParams(), stop=("w8",))
    assert request.prompt_ids == tuple(tiny.ids("w1 w5 w2"))
    assert request.stop == ("w9", "w8")
    assert request.max_new_tokens == 7


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "w1 \ud800"])
def test_a_prompt_without_text_is_refused(made, prompt):
    with pytest.raises(RequestError) as caught:
        prepare(made, prompt, LoopParams())
    assert caught.value.param == "prompt"


def test_the_longest_prompt_that_fits_and_the_next(made):
    iterations = 5
    fits = tiny.POSITIONS - iterations - 1
    settings = LoopParams(max_iterations=iterations)
    request = prepare(made, tiny.words(*[1] * fits), settings)
    assert request.max_new_tokens == 1
    with pytest.raises(RequestError, match=f"at most {fits} fit") as caught:
        prepare(made, tiny.words(*[1] * (fits + 1)), settings)
    assert caught.value.param == "prompt"
    (result,) = generate(made, [request])
    assert result.completion_tokens == 1


def test_an_explicit_limit_must_fit_and_a_default_gives_way(made):
    settings, prompt = LoopParams(max_iterations=4), tiny.words(*[1] * 50)
    assert prepare(made, prompt, settings, max_new_tokens=10).max_new_tokens == 10
    assert prepare(made, prompt, settings).max_new_tokens == 10
    with pytest.raises(RequestError, match=r"at most 10 .* got 11") as caught:
        prepare(made, prompt, settings, max_new_tokens=11)
    assert caught.value.param == "max_new_tokens"


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_whole_budget_can_be_used(kind):
    made = tiny.reasoner(kind)
    request = prepare(made, tiny.words(*range(20)), LoopParams(max_iterations=4, criterion="fixed"), max_new_tokens=40)
    (result,) = generate(made, [request])
    assert result.iterations == 4
    assert result.completion_tokens == 40 or result.finish_reason == "stop"


# One position an iteration, K however many, none; and an answer prefix of two tokens.
TAKEN = [("append", 0, 0), ("append", 5, 5), ("block", 0, 0), ("block", 5, 3), ("prompt", 0, 0), ("prompt", 5, 0)]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("workspace", "iterations", "taken"), TAKEN)
def test_a_loop_takes_the_positions_of_its_workspace(workspace, iterations, taken, prefix):
    text = {"answer_prefix": tiny.words(*range(prefix))}
    made = tiny.reasoner(loop={"workspace": workspace, "block_size": 3}, text=text)
    settings = LoopParams(max_iterations=iterations)
    fits = tiny.POSITIONS - taken - prefix - 1
    assert prepare(made, tiny.words(*[1] * fits), settings).max_new_tokens == 1
    with pytest.raises(RequestError, match=f"prompt has {fits + 1} tokens; .* at most {fits} fit") as caught:
        prepare(made, tiny.words(*[1] * (fits + 1)), settings)
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match=r"max_new_tokens must be at most 6 .* got 7"):
        prepare(made, tiny.words(*[1] * (fits - 5)), settings, max_new_tokens=7)


def test_what_fits_a_slot_is_less_than_what_fits_the_model(made):
    settings, prompt = LoopParams(max_iterations=4), tiny.words(*[1] * 10)
    assert prepare(made, prompt, settings, limit=20).max_new_tokens == 6
    assert prepare(made, prompt, settings, max_new_tokens=6, limit=20).max_new_tokens == 6
    with pytest.raises(RequestError, match=r"max_new_tokens must be at most 6 .* got 7"):
        prepare(made, prompt, settings, max_new_tokens=7, limit=20)
    with pytest.raises(RequestError, match=r"prompt has 10 tokens; .* at most 9 fit a slot$"):
        prepare(made, prompt, settings, limit=14)
    every_token = tiny.reasoner(loop={"workspace": "token"})
    message = r"at most 9 fit a slot, which holds 4 key/value caches of 10 positions$"
    with pytest.raises(RequestError, match=message):
        prepare(every_token, prompt, settings, limit=43)


def test_a_slot_longer_than_the_model_changes_nothing(made):
    settings, prompt = LoopParams(max_iterations=4), tiny.words(*[1] * 10)
    most = tiny.POSITIONS - 10 - 4
    assert prepare(made, prompt, settings, limit=10**6).max_new_tokens == most
    with pytest.raises(RequestError, match=f"max_new_tokens must be at most {most}"):
        prepare(made, prompt, settings, max_new_tokens=most + 1, limit=10**6)


def test_an_answer_prefix_is_tokens_of_its_own():
    made = tiny.reasoner(text={"answer_prefix": "w7 w8", "prompt_suffix": " w2"})
    request = prepare(made, "w5", LoopParams())
    assert request.prompt_ids == tuple(tiny.ids("w5 w2"))
    assert request.answer_prefix_ids == tuple(tiny.ids("w7 w8"))
    assert prepare(tiny.reasoner(), "w5", LoopParams()).answer_prefix_ids == ()


# -- chats -----------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w1', 'assistant': 'w2'}[m.role] }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w3{% endif %}"
)
CHAT = [
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w6 w7"},
    {"role": "user", "content": "w8"},
]
RENDERED = "w1 w5 w2 w6 w7 w1 w8 w3"


def chatty(template, **text):
    """A reasoner whose tokenizer has a template of its own."""
    made = tiny.reasoner(text=text)
    made.tokenizer = copy.deepcopy(made.tokenizer)
    made.tokenizer.chat_template = template
    return made


def test_a_chat_gets_the_configs_template_and_no_prefix():
    made = tiny.reasoner(text={"chat_template": TEMPLATE, "prompt_prefix": "w9 ", "prompt_suffix": " w9"})
    assert prepare(made, CHAT, LoopParams()).prompt_ids == tuple(tiny.ids(RENDERED))


def test_the_tokenizers_template_serves_where_the_config_has_none():
    assert prepare(chatty(TEMPLATE), CHAT, LoopParams()).prompt_ids == tuple(tiny.ids(RENDERED))
    made = chatty("w36", chat_template=TEMPLATE)
    assert prepare(made, CHAT, LoopParams()).prompt_ids == tuple(tiny.ids(RENDERED))


def test_of_several_templates_of_a_tokenizer_the_default_serves():
    made = chatty({"default": TEMPLATE, "rag": "w36"})
    assert prepare(made, CHAT, LoopParams()).prompt_ids == tuple(tiny.ids(RENDERED))
    made = chatty({"rag": "w36"})
    with pytest.raises(RequestError, match="multiple chat templates"):
        prepare(made, CHAT, LoopParams())


def test_a_chat_is_answered_as_its_text():
    made = tiny.reasoner(text={"chat_template": TEMPLATE})
    chat, text = (prepare(made, asked, LoopParams(), max_new_tokens=4) for asked in (CHAT, RENDERED))
    (first,), (second,) = generate(made, [chat]), generate(made, [text])
    assert first.token_ids == second.token_ids


def test_special_tokens_are_added_to_a_text_alone():
    # A chat template writes its own, and an answer prefix stands inside a text.
    made = chatty(TEMPLATE, answer_prefix="w7")
    opening = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    made.tokenizer.backend_tokenizer.post_processor = opening
    assert prepare(made, "w5", LoopParams()).prompt_ids == (2, *tiny.ids("w5"))
    chat = prepare(made, CHAT, LoopParams())
    assert chat.prompt_ids == tuple(tiny.ids(RENDERED))
    assert chat.answer_prefix_ids == tuple(tiny.ids("w7"))


def test_without_a_template_there_are_no_chats(made):
    with pytest.raises(RequestError, match="no chat template") as caught:
        prepare(made, CHAT, LoopParams())
    assert caught.value.param == "messages"


STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('who?') }}{% endif %}" + TEMPLATE
BAD_CHATS = {
    "empty": [],
    "text": ["w5"],
    "numbers": [3],
    "none": [None],
    "unknown-role": [{"role": "captain", "content": "w5"}],
    "no-role": [{"content": "w5"}],
    "surrogate": [{"role": "user", "content": "w5 \ud800"}],
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_messages_that_cannot_be_rendered_are_refused(case):
    made = tiny.reasoner(text={"chat_template": STRICT})
    with pytest.raises(RequestError):
        prepare(made, BAD_CHATS[case], LoopParams())


BAD_TEMPLATES = {
    "syntax": "{% for m in messages %}{{ m.content }}",
    "undefined": "{{ nonesuch.field }}",
    "type": "{{ messages + 1 }}",
    "division": "{{ 1 // (messages | length - 3) }}",
    "range": "{% for i in range(10 ** 9) %}w1{% endfor %}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "nothing": "{# only a comment #}",
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_a_template_that_fails_is_an_error_of_the_request(case):
    made = tiny.reasoner(text={"chat_template": BAD_TEMPLATES[case]})
    with pytest.raises(RequestError):
        prepare(made, CHAT, LoopParams())


ESCAPES = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.append('w5') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_runs_in_a_sandbox(template):
    # A checkpoint is data: what its template reaches for is refused, or empty.
    made = tiny.reasoner(text={"chat_template": template})
    with pytest.raises(RequestError, match=r"refuses|holds no tokens"):
        prepare(made, CHAT, LoopParams())
    assert len(CHAT) == 3


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


def test_the_first_token_comes_between_the_loop_and_the_end(made):
    request = tiny.request(made, tiny.PROMPTS[3], FIXED)
    (result,) = generate(made, [request])
    timings = result.timings
    assert timings.queue_s + timings.prefill_s + timings.loop_s <= result.first_token_s <= timings.total_s
    (single,) = generate(made, [tiny.request(made, tiny.PROMPTS[3], FIXED, max_new_tokens=1)])
    assert single.first_token_s <= single.timings.total_s


def test_the_limit_ends_an_answer_by_length(made):
    long = first_answer(made, max_new_tokens=12)
    assert long.finish_reason == "length"
    for limit in (1, 2, 11):
        short = first_answer(made, max_new_tokens=limit)
        assert (short.token_ids, short.finish_reason) == (long.token_ids[:limit], "length")


def test_the_end_token_ends_an_answer_and_is_not_text(made):
    seeds = range(40)
    sampled = [
        first_answer(made, max_new_tokens=12, sampling=SamplingParams(temperature=3.0, seed=seed)) for seed in seeds
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

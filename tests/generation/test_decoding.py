"""What is written after a loop: by the head or the latent decoder, after an answer prefix, with thoughts and states."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slr_core.errors import ConfigError
from slr_core.generation.decoding import DecodeState, decode_thoughts
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import count_passes, generate
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams, SamplingParams
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.generation.test_token_bytes import TOKENIZERS

WORKSPACES = ("append", "block", "prompt")
PROMPTS = tiny.PROMPTS[:4]
LATENT = {"hidden_size": 16, "layers": 1, "heads": 2, "max_thought_tokens": 5}
WRITES = {"decoder": {"answers": "latent_decoder", "latent_decoder": LATENT}}
THINKS = {"decoder": {"latent_decoder": LATENT}}


def reasoner(workspace="append", loop=None, **options):
    return tiny.reasoner(loop={"workspace": workspace, "block_size": 3, **(loop or {})}, **options)


def fixed(iterations):
    return {"max_iterations": iterations, "criterion": "fixed"}


def answer(made, prompt=tiny.PROMPTS[1], iterations=2, **options):
    return generate(made, [tiny.request(made, prompt, fixed(iterations), **options)])[0]


class Passes:
    """Counts the base model's passes inside its block."""

    def __init__(self, made):
        self.made, self.count = made, 0

    def __enter__(self):
        self.hook = self.made.base.base_model.register_forward_pre_hook(self._note)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def _note(self, *_):
        self.count += 1


# -- a row while it is written ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytewise():
    """A reasoner whose tokens are bytes."""
    made = tiny.reasoner()
    made.tokenizer = tiny.byte_tokenizer()
    return made


def write_ids(made, ids, stop=(), limit=50):
    """The answer of so many tokens, and what was shown of it after each."""
    row, shown = DecodeState(made, tiny.request(made, "abc", stop=stop, max_new_tokens=limit)), []
    for token in ids:
        row.add_token(token)
        shown.append(row.new_text())
        if row.finish_reason:
            break
    return row, shown


def test_finish_reasons(bytewise):
    ids = bytewise.tokenizer("abcd").input_ids
    row, _ = write_ids(bytewise, [*ids, tiny.EOS, *ids])
    assert (row.finish_reason, row.text, row.tokens) == ("stop", "abcd", [*ids, tiny.EOS])
    row, _ = write_ids(bytewise, ids, stop=("cd", "bcd"))
    assert (row.finish_reason, row.text, row.tokens) == ("stop", "a", ids)
    row, _ = write_ids(bytewise, ids, limit=3)
    assert (row.finish_reason, row.text, row.tokens) == ("length", "abc", ids[:3])
    row, _ = write_ids(bytewise, ids)
    assert (row.finish_reason, row.text) == (None, "abcd")
    # The last token that there is room for may end it as well.
    assert write_ids(bytewise, [ids[0], tiny.EOS], limit=2)[0].finish_reason == "stop"
    assert write_ids(bytewise, ids, stop=("d",), limit=4)[0].finish_reason == "stop"


def test_what_is_shown_is_shown_once(bytewise):
    row, shown = write_ids(bytewise, bytewise.tokenizer("ab c").input_ids)
    assert shown == ["a", "b", " ", "c"]
    assert row.new_text() == ""


def test_a_character_is_shown_when_it_is_whole(bytewise):
    _, shown = write_ids(bytewise, bytewise.tokenizer("aé😀b").input_ids)
    assert shown == ["a", "", "é", "", "", "", "😀", "b"]


def test_half_a_character_is_shown_at_the_end_alone(bytewise):
    half = bytewise.tokenizer("a😀").input_ids[:3]
    _, shown = write_ids(bytewise, half, limit=3)
    assert shown == ["a", "", "\ufffd"]
    _, shown = write_ids(bytewise, [*half, *bytewise.tokenizer("b").input_ids])
    assert shown == ["a", "", "", "\ufffdb"]


def test_the_beginning_of_a_stop_string_is_held_back(bytewise):
    ids = bytewise.tokenizer("abcabd").input_ids
    assert write_ids(bytewise, ids, stop=("abd",))[1] == ["", "", "abc", "", "", ""]
    assert write_ids(bytewise, ids[:5], stop=("abd",), limit=5)[1] == ["", "", "abc", "", "ab"]


def test_what_is_held_back_reaches_over_half_a_character(bytewise):
    # After `a` and half an `é` the stop string may still come: `a` must not have been shown.
    row, shown = write_ids(bytewise, bytewise.tokenizer("baé").input_ids, stop=("aé",))
    assert (row.text, "".join(shown)) == ("b", "b")


byte_ids = st.lists(st.integers(1, len(tiny.WORDS) - 1), max_size=20)
characters = st.text("abcé😀€", max_size=8)


@settings(max_examples=300)
@given(st.data())
def test_nothing_that_was_shown_is_taken_back(bytewise, data):
    ids = [
        token
        for part in data.draw(st.lists(st.one_of(byte_ids, characters), max_size=5))
        for token in (bytewise.tokenizer(part).input_ids if isinstance(part, str) else part)
    ]
    stop = tuple(data.draw(st.lists(st.text("abé😀", min_size=1, max_size=3), max_size=2)))
    row, shown = write_ids(bytewise, ids, stop, limit=data.draw(st.integers(1, 40)))
    so_far = "".join(shown)
    if row.finish_reason:
        assert so_far == row.text
        assert not any(stopping in row.text for stopping in stop)
    else:
        assert row.text.startswith(so_far)


# -- tokenizers of all kinds -----------------------------------------------------------------------------


def cleaned():
    """A WordPiece tokenizer that asks for the clean-up of blanks, which rewrites earlier text."""
    made = TOKENIZERS["word_piece"]()
    made.clean_up_tokenization_spaces = True
    return made


@pytest.fixture(scope="module", params=[*TOKENIZERS, "cleaned"])
def any_tokenizer(request):
    """A reasoner with a tokenizer of this kind."""
    tokenizer = cleaned() if request.param == "cleaned" else TOKENIZERS[request.param]()
    plain = tiny.base()
    plain.resize_token_embeddings(max(len(tokenizer), len(tiny.WORDS)), mean_resizing=False)
    return LatentReasoner(plain, tokenizer, tiny.config())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_stream_is_the_text(any_tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(any_tokenizer.tokenizer) - 1), min_size=1, max_size=14))
    stop = tuple(data.draw(st.lists(st.text("ab é.", min_size=1, max_size=3), max_size=2)))
    row = DecodeState(any_tokenizer, tiny_request(stop, len(ids)))
    shown = []
    for token in ids:
        row.add_token(token)
        shown.append(row.new_text())
        if row.finish_reason:
            break
    assert "".join(shown) == row.text


@functools.cache
def plain_request():
    return tiny.request(tiny.reasoner(), "w1", max_new_tokens=1)


def tiny_request(stop, limit):
    return dataclasses.replace(plain_request(), stop=stop, max_new_tokens=limit)


def test_a_run_of_bytes_is_shown_when_it_has_ended():
    made = tiny.reasoner()
    made.tokenizer = TOKENIZERS["byte_fallback"]()
    letter, *euro = made.tokenizer.convert_tokens_to_ids(["<0x41>", "<0xE2>", "<0x82>", "<0xAC>"])
    after = made.tokenizer.convert_tokens_to_ids("a")
    for ids, text in (([letter, *euro, after], "A€a"), ([letter, euro[0], after], "��a")):
        row, shown = DecodeState(made, tiny_request((), 50)), []
        for token in ids:
            row.add_token(token)
            shown.append(row.new_text())
        assert shown == ["", *[""] * (len(ids) - 2), text]


# -- what a request costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("prefix", ["", "w7 w8"])
@pytest.mark.parametrize("loop", [{}, WRITES], ids=["head", "decoder"])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_the_passes_told_are_the_passes_run(workspace, loop, prefix, iterations):
    made = reasoner(workspace, loop, text={"answer_prefix": prefix})
    with Passes(made) as passes:
        result = answer(made, iterations=iterations, max_new_tokens=4)
    tokens = result.completion_tokens
    assert tokens >= 1
    assert result.forward_passes == passes.count
    before = {"append": 1 + iterations, "block": 1 + iterations, "prompt": iterations}[workspace]
    if loop and iterations:
        assert result.forward_passes == before
    else:
        closing = {"append": 0, "block": int(iterations > 0), "prompt": 1}[workspace]
        assert result.forward_passes == before + closing + bool(prefix) + tokens - 1


def test_passes_after_divergence():
    # Three iterations were run, none was kept: the answer is the base model's.
    for workspace, expected in (("append", 1 + 3 + 4), ("block", 1 + 3 + 4), ("prompt", 3 + 1 + 4)):
        for loop in ({}, WRITES):
            made = reasoner(workspace, loop)
            assert count_passes(made, tiny.request(made, tiny.PROMPTS[1]), 3, 0, 5) == expected
    made = reasoner("block", WRITES)
    assert count_passes(made, tiny.request(made, tiny.PROMPTS[1]), 3, 2, 5) == 4


# -- the answer prefix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_without_a_loop_a_prefix_is_the_end_of_the_prompt(workspace):
    made = reasoner(workspace, decode=True, text={"answer_prefix": "w7 w8"})
    plain = reasoner(workspace)
    for prompt in tiny.PROMPTS[:4]:
        found, expected = answer(made, prompt, 0), answer(plain, f"{prompt} w7 w8", 0)
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
        assert found.prompt_tokens == expected.prompt_tokens - 2


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_a_prefix_is_what_a_forced_beginning_would_be(workspace):
    made, plain = reasoner(workspace, decode=True, text={"answer_prefix": "w7 w8"}), reasoner(workspace, decode=True)
    prefixed = answer(made, max_new_tokens=3)
    with torch.inference_mode():
        context = plain.encode(*tiny.batch([tiny.PROMPTS[1]]))
        output = loop_until_exit(plain, context, [LoopParams(**fixed(2)).resolve(plain.config)])
        tokens, looped, one = tiny.ids("w7 w8"), torch.tensor([True]), torch.tensor([[True]])
        for token in tokens:
            logits = plain.answer_logits(output.context, torch.tensor([[token]]), one, looped)
        for token in prefixed.token_ids:
            assert token == int(logits[0, -1].argmax())
            logits = plain.answer_logits(output.context, torch.tensor([[token]]), one, looped)
    assert prefixed.token_ids != answer(plain, max_new_tokens=3).token_ids


@pytest.mark.parametrize("loop", [{}, WRITES], ids=["head", "decoder"])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_a_batch_with_a_prefix_is_its_rows_alone(workspace, loop):
    made = reasoner(workspace, loop, decode=True, text={"answer_prefix": "w7 w8"})
    requests = [
        tiny.request(made, prompt, fixed(n), max_new_tokens=limit)
        for prompt, n, limit in zip(tiny.PROMPTS[:4], (0, 3, 1, 0), (5, 1, 6, 2), strict=True)
    ]
    for together, request in zip(generate(made, requests), requests, strict=True):
        (alone,) = generate(made, [request])
        assert together.token_ids == alone.token_ids
        assert together.forward_passes == alone.forward_passes


# -- answers of the latent decoder -----------------------------------------------------------------------


def say(made, monkeypatch, *words):
    """Make the latent decoder say ``words``, then the end token, whatever it reads."""
    ids = [*tiny.ids(" ".join(words)), tiny.EOS]

    def decode_latent(memory, present, input_ids):
        logits = torch.zeros(len(memory), input_ids.shape[1] + 1, len(tiny.WORDS))
        for at in range(input_ids.shape[1] + 1):
            logits[:, at, ids[min(at, len(ids) - 1)]] = 1.0
        return logits

    monkeypatch.setattr(made, "decode_latent", decode_latent)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_the_latent_decoder_writes_what_the_loop_left(workspace):
    made = reasoner(workspace, WRITES)
    request = tiny.request(made, tiny.PROMPTS[1], fixed(3), include_states=True)
    (result,) = generate(made, [request])
    memory = result.states[1:, 0] if workspace == "append" else result.states[-1]
    written: list[int] = []
    with torch.no_grad():
        for token in result.token_ids:
            ids = torch.tensor([written], dtype=torch.long)
            logits = made.decode_latent(memory[None], torch.ones(1, len(memory), dtype=torch.bool), ids)
            assert token == int(logits[0, -1].argmax())
            written.append(token)
    assert result.token_ids


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_mixed_batch_without_loop(workspace):
    made, plain = reasoner(workspace, WRITES, decode=True), reasoner(workspace)
    depths = (0, 2, 0, 4)
    requests = [tiny.request(made, p, fixed(n)) for p, n in zip(tiny.PROMPTS[:4], depths, strict=True)]
    for request, result, prompt, depth in zip(
        requests, generate(made, requests), tiny.PROMPTS[:4], depths, strict=True
    ):
        assert result.token_ids == generate(made, [request])[0].token_ids
        if depth == 0:
            assert result.token_ids == answer(plain, prompt, 0).token_ids


def test_stops_and_ends_hold_for_the_latent_decoder_too(monkeypatch):
    made = reasoner(loop=WRITES)
    say(made, monkeypatch, "w5", "w6", "w9")
    assert answer(made).text == "w5 w6 w9"
    assert answer(made).finish_reason == "stop"
    assert answer(made).token_ids[-1] == tiny.EOS
    assert answer(made, max_new_tokens=2).finish_reason == "length"
    assert answer(made, stop=("w6",)).text == "w5 "


def test_the_latent_decoder_reads_the_answer_prefix(monkeypatch):
    made = reasoner(loop=WRITES, text={"answer_prefix": "w5"})
    say(made, monkeypatch, "w5", "w6", "w9")
    assert answer(made).text == "w6 w9"


# -- thoughts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_every_iteration_of_a_trace_is_put_into_words(workspace):
    made = reasoner(workspace, THINKS)
    result = answer(made, iterations=3, trace=True, include_states=True)
    thoughts = []
    with torch.no_grad():
        for state in result.states[1:]:
            tokens: list[int] = []
            while len(tokens) < 5 and tiny.EOS not in tokens:
                ids = torch.tensor([tokens], dtype=torch.long)
                logits = made.decode_latent(state[None], torch.ones(1, len(state), dtype=torch.bool), ids)
                tokens.append(int(logits[0, -1].argmax()))
            thoughts.append(tiny.tokenizer().decode(tokens, skip_special_tokens=True).strip())
    assert [record.thought for record in result.records] == thoughts
    assert any(thoughts)


def test_a_thought_ends_at_the_end_token_or_at_its_longest(monkeypatch):
    made = reasoner(loop=THINKS)
    say(made, monkeypatch, "w5", "w6")
    assert [record.thought for record in answer(made, trace=True).records] == ["w5 w6"] * 2
    say(made, monkeypatch, *["w5"] * 9)
    assert [record.thought for record in answer(made, trace=True).records] == ["w5 w5 w5 w5 w5"] * 2


def test_thoughts_in_a_batch():
    made = reasoner("prompt", THINKS)
    traced = (True, False, True, True)
    requests = [
        tiny.request(made, prompt, fixed(n), trace=trace)
        for prompt, n, trace in zip(tiny.PROMPTS[:4], (3, 2, 0, 1), traced, strict=True)
    ]
    for result, request in zip(generate(made, requests), requests, strict=True):
        (alone,) = generate(made, [request])
        found = [record.thought for record in result.records]
        assert found == [record.thought for record in alone.records]
        assert all((thought is not None) == request.trace for thought in found)


def test_without_a_latent_decoder_there_are_no_thoughts():
    assert all(record.thought is None for record in answer(reasoner(), trace=True).records)


def test_a_state_that_is_not_finite_has_no_thought(monkeypatch):
    made = reasoner("block", THINKS)
    real, seen = made.residual.forward, []

    def spoil(g, *others):
        seen.append(1)
        h = real(g, *others)
        if len(seen) == 2:
            h = h.clone()
            h[0, 1] = torch.nan
        return h

    monkeypatch.setattr(made.residual, "forward", spoil)
    requests = [tiny.request(made, prompt, fixed(3), trace=True, include_states=True) for prompt in tiny.PROMPTS[1:3]]
    spoiled, clean = generate(made, requests)
    monkeypatch.undo()
    assert (spoiled.iterations, spoiled.exit_reason) == (2, "diverged")
    assert [record.thought is None for record in spoiled.records] == [False, True]
    expected = generate(made, requests)
    assert clean.token_ids == expected[1].token_ids
    assert [record.thought for record in clean.records] == [record.thought for record in expected[1].records]
    assert spoiled.records[0].thought == expected[0].records[0].thought


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_thoughts_of_any_depth(workspace):
    made = reasoner(workspace, THINKS)
    depths = (3, 2, 0, 1)
    results = [
        answer(made, prompt, n, trace=True, include_states=True) for prompt, n in zip(PROMPTS, depths, strict=True)
    ]
    states = [result.states for result in results]
    with torch.inference_mode():
        said = decode_thoughts(made, states, [True, False, True, True])
        assert decode_thoughts(made, [], []) == []
        assert decode_thoughts(reasoner(workspace), states[:1], [True]) == [[None] * 3]
    thoughts = [[record.thought for record in result.records] for result in results]
    assert said == [thoughts[0], [None, None], [], thoughts[3]]


# -- states ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workspace", "width"), [("append", 1), ("block", 3), ("prompt", 5)])
def test_states_are_returned_to_whom_asks(workspace, width):
    made = reasoner(workspace)
    requests = [
        tiny.request(made, tiny.PROMPTS[1], fixed(n), include_states=asked)
        for n, asked in ((3, True), (2, False), (0, True))
    ]
    whole, none, start = generate(made, requests)
    assert (whole.states.shape, whole.states.dtype, none.states) == ((4, width, 32), torch.float32, None)
    assert start.states.shape == (1, width, 32)
    torch.testing.assert_close(start.states[0], whole.states[0])
    for record in whole.records:
        assert whole.states[record.t].norm().item() == pytest.approx(record.norm, rel=1e-4)


def test_states_of_half_precision_are_returned_as_fp32():
    made = tiny.reasoner(plain=tiny.base().to(torch.bfloat16))
    assert answer(made, include_states=True).states.dtype == torch.float32


# -- what ends an answer ---------------------------------------------------------------------------------


def test_stop_tokens_of_the_config_end_an_answer():
    whole = answer(reasoner(), max_new_tokens=8)
    stop = next(token for token in whole.token_ids[1:] if token != whole.token_ids[0])
    cut = answer(reasoner(text={"stop_token_ids": [stop]}), max_new_tokens=8)
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]


@pytest.mark.parametrize("options", [{}, {"logprobs": 3}, {"sampling": SamplingParams(temperature=2.0, seed=3)}])
def test_suppressed_tokens(options):
    """They are never chosen: greedy, sampled, and where the caller has found the most likely token already."""
    first = answer(reasoner(), max_new_tokens=8, **options)
    made = reasoner(text={"suppressed_token_ids": sorted(set(first.token_ids))})
    found = answer(made, max_new_tokens=8, **options)
    assert not set(found.token_ids) & set(first.token_ids)
    state = DecodeState(made, tiny.request(made, "w1", **options))
    logits = torch.zeros(len(tiny.WORDS))
    logits[first.token_ids[0]] = 50.0
    assert state.choose_token(logits, first.token_ids[0]) != first.token_ids[0]
    assert logits[first.token_ids[0]] == 50


def test_token_ids_of_a_config_exist():
    with pytest.raises(ConfigError, match=r"text\.suppressed_token_ids must be below 40, .* got 41"):
        tiny.reasoner(text={"suppressed_token_ids": [3, 41]})
    with pytest.raises(ConfigError, match=r"loop\.convergence\.end_token_id must be below 40, .* got 40"):
        tiny.reasoner(loop={"convergence": {"end_token_id": 40}})


# -- the budget ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_the_whole_budget_can_be_used(workspace, kind):
    made = reasoner(workspace, kind=kind, text={"answer_prefix": "w7 w8"})
    taken = {"append": 4, "block": 3, "prompt": 0}[workspace] + 2
    request = prepare(made, tiny.words(*range(20)), LoopParams(**fixed(4)))
    assert request.max_new_tokens == tiny.POSITIONS - 20 - taken
    (result,) = generate(made, [request])
    assert result.completion_tokens == request.max_new_tokens or result.finish_reason == "stop"

"""What each method answers, against what defines it."""

import pytest
import torch

from slr_core.errors import ConfigError, RequestError
from slr_core.evaluation.backends import Local, Remote
from slr_core.evaluation.cost import Cost
from slr_core.evaluation.interventions import add_noise, randomize_thoughts, replace_states, shuffle_thoughts
from slr_core.evaluation.methods import METHODS, NOISY_START, Batch, MethodSettings, _vote, get_method
from slr_core.evaluation.outcomes import MethodAnswer
from slr_core.generation.reference import generate
from slr_core.tasks import get_task
from tests import tiny
from tests.evaluation.asked import Words

SEEDS = [1009 * i for i in range(len(tiny.PROMPTS))]
TEXT = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def local():
    return Local(tiny.reasoner(text=TEXT))


def batch(backend, prompts=tiny.PROMPTS, before=tiny.PROMPTS[-1], **settings):
    given = MethodSettings(**{"loop": {}, "cot_tokens": 6, "samples": 3, **settings})
    return Batch(backend, Words(), prompts, SEEDS[: len(prompts)], given, before)


def texts(name, given):
    return [answered.text for answered in METHODS[name].run(given)]


def generated(made, loop=None, run_loop=None, **options):
    requests = [tiny.request(made, p, loop, **{"max_new_tokens": 4, **options}) for p in tiny.PROMPTS]
    return [result.text for result in generate(made, requests, run_loop=run_loop)]


# -- the loop and its controls ---------------------------------------------------------------------------

LOOPS = {
    "no_cot": {"max_iterations": 0},
    "no_thought": {"max_iterations": 0},
    "pause": {},
    "pause_as_thought": {},
    "multipass_pause": {},
    "slr": {},
    "slr_fixed": {"criterion": "fixed"},
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_that_of_its_settings(local, name):
    assert texts(name, batch(local)) == generated(local.reasoner, LOOPS[name])


@pytest.mark.parametrize("name", LOOPS)
def test_changed_settings_hold_for_what_loops(local, name):
    answers = METHODS[name].run(batch(local, loop={"max_iterations": 2, "min_iterations": 2}))
    assert {answered.iterations for answered in answers} == {0 if name in ("no_cot", "no_thought") else 2}


def test_chain_of_thought_length(local):
    assert texts("cot", batch(local)) == generated(local.reasoner, {"max_iterations": 0}, max_new_tokens=6)


def test_thoughts_are_replaced(local):
    made, given = local.reasoner, batch(local)
    own = generated(made)
    for name, edit in (("shuffled_thoughts", shuffle_thoughts(SEEDS)), ("noised_thoughts", randomize_thoughts(SEEDS))):
        assert texts(name, given) == generated(made, run_loop=replace_states(made, edit)) != own
    mean = made.base.get_input_embeddings().weight.mean(0)
    for name, value in (("zeroed_thoughts", torch.zeros(32)), ("paused_thoughts", mean)):
        constant = replace_states(made, lambda rows, x=value: [torch.cat([r[:1], x.expand_as(r[1:])]) for r in rows])
        assert texts(name, given) == generated(made, run_loop=constant) != own
    taken = replace_states(made, lambda rows: [torch.cat([row[:1], rows[i - 1][1:]]) for i, row in enumerate(rows)])
    fixed = {"criterion": "fixed"}
    assert texts("foreign_thoughts", batch(local, loop=fixed)) == generated(made, fixed, taken) != own
    assert texts("foreign_thoughts", batch(local, before=tiny.PROMPTS[0], loop=fixed))[0] == own[0]


def test_thoughts_of_another_question_need_another_question(local):
    with pytest.raises(ConfigError, match="at least two questions"):
        METHODS["foreign_thoughts"].run(batch(local, tiny.PROMPTS[:1], None))


def test_a_disturbed_start_is_that_of_its_scale(local):
    made = local.reasoner
    answers = [answered.text for answered in NOISY_START.run(batch(local, noise=0.7))]
    assert answers == generated(made, run_loop=add_noise(made, 0.7, SEEDS, start_only=True))


# -- votes -----------------------------------------------------------------------------------------------

VOTES = {
    "majority": (["w1 a", "w2 b", "w2 c"], "w2 b"),
    "tie": (["w3 a", "w2 b", "w2 c", "w3 d"], "w3 a"),
    "all different": (["w3", "w2", "w1"], "w3"),
    "one without an answer": (["", "w2", "w1", "w1"], "w1"),
    "most without an answer": (["", " ", "w5 x"], "w5 x"),
    "no answers": ([" ", "", ""], " "),
    "one": (["w9"], "w9"),
}


class Scripted(Local):
    """Says the same to every prompt; samples in a row, or one a call."""

    def __init__(self, reasoner, said):
        super().__init__(reasoner)
        self.said, self.calls = said, 0

    def answer(self, prompts, ask, seeds, run_loop=None):
        said = self.said if ask.samples > 1 else [self.said[self.calls % len(self.said)]]
        self.calls += 1
        return [
            [MethodAnswer(text, iterations=self.calls, tokens=1, forward_passes=2) for text in said] for _ in prompts
        ]


@pytest.mark.parametrize("name", ["self_consistency", "slr_vote"])
@pytest.mark.parametrize(("said", "winner"), VOTES.values(), ids=VOTES)
def test_the_majority_wins_and_of_equals_the_first(local, name, said, winner):
    backend = Scripted(local.reasoner, said)
    answers = METHODS[name].run(batch(backend, samples=len(said)))
    assert [answered.text for answered in answers] == [winner] * len(tiny.PROMPTS)
    assert {(answered.tokens, answered.forward_passes) for answered in answers} == {(len(said), 2 * len(said))}
    if name == "slr_vote":
        assert backend.calls == len(said)
        assert answers[0].iterations == (1 + len(said)) / 2


@pytest.mark.parametrize(
    ("task", "said", "winner"),
    [
        ("gsm8k", ["#### 1,800", "#### 17", "#### 17", "#### 1800", "#### 1800.00"], "#### 1,800"),
        ("text", ["Rome", "The answer is Paris.", "Rome", "paris", "**Paris**"], "The answer is Paris."),
        ("text:number", ["#### 2", "#### 3", "#### 3", "#### 2.0", "#### 2"], "#### 2"),
        ("arithmetic", ["1,000", "7", "7", "1000", "1000"], "1,000"),
        ("asdiv", ["#### red", "#### 5", "#### 5.0"], "#### 5"),
    ],
)
def test_spellings_of_an_answer_are_one_answer(task, said, winner):
    voted = _vote(get_task(task), [MethodAnswer(text) for text in said])
    assert voted.text == winner


def test_self_consistency_seeds(local):
    class Seen(Local):
        def answer(self, prompts, ask, seeds, run_loop=None):
            self.asked = ask, list(seeds)
            return super().answer(prompts, ask, seeds, run_loop)

    seen = Seen(local.reasoner)
    answers = METHODS["self_consistency"].run(batch(seen, temperature=1.5))
    ask, seeds = seen.asked
    assert (dict(ask.loop), ask.max_new_tokens, ask.temperature, ask.samples) == ({"max_iterations": 0}, 6, 1.5, 3)
    assert seeds == SEEDS
    drawn = local.answer(tiny.PROMPTS, ask, SEEDS)
    assert all(answered.text in [own.text for own in owns] for answered, owns in zip(answers, drawn, strict=True))
    assert [answered.tokens for answered in answers] == [sum(own.tokens for own in owns) for owns in drawn]
    assert any(len({own.text for own in owns}) > 1 for owns in drawn)


def test_every_rollout_of_slr_vote_has_noise_of_its_own(local):
    made = local.reasoner
    one = [texts("slr_vote", batch(local, samples=1, noise=0.8))] + [
        generated(made, run_loop=add_noise(made, 0.8, [seed + sample for seed in SEEDS])) for sample in (0, 1, 2)
    ]
    assert one[0] == one[1]
    assert len({tuple(said) for said in one}) == 3
    voted = METHODS["slr_vote"].run(batch(local, noise=0.8))
    for row, answered in enumerate(voted):
        assert answered.text in [said[row] for said in one[1:]]


# -- transformers' own search ----------------------------------------------------------------------------


def searched(plain, prompt, **options):
    ids = torch.tensor([tiny.ids(prompt)])
    options = {"max_new_tokens": 6, "top_k": 0, "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS, **options}
    sequences = plain.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return sequences, ids.shape[1]


def said(sequence, start):
    return tiny.tokenizer().decode(sequence[start:], skip_special_tokens=True)


def test_beam_search_is_that_of_transformers(local):
    plain = tiny.base()
    expected = []
    for prompt in tiny.PROMPTS:
        sequences, start = searched(plain, prompt, num_beams=4, do_sample=False)
        expected.append(said(sequences[0], start))
    assert texts("beam", batch(local)) == expected
    assert expected != texts("cot", batch(local)), "or a beam finds nothing that greedy does not"


@torch.inference_mode()
def test_best_of_n_is_the_likeliest_sample_of_transformers(local):
    plain = tiny.base()
    for seed, prompt, answered in zip(SEEDS, tiny.PROMPTS, METHODS["best_of_n"].run(batch(local)), strict=True):
        torch.manual_seed(seed)
        sequences, start = searched(plain, prompt, do_sample=True, temperature=0.7, num_return_sequences=3)
        scores = []
        for sequence in sequences:
            written = sequence[start:].tolist()
            if tiny.EOS in written:
                written = written[: written.index(tiny.EOS) + 1]
            logits = plain(torch.tensor([[*tiny.ids(prompt), *written]])).logits[0, start - 1 : -1].log_softmax(-1)
            scores.append(logits[range(len(written)), written].mean().item())
        assert answered.text == said(sequences[scores.index(max(scores))], start)
        assert len({tuple(sequence.tolist()) for sequence in sequences}) > 1


@pytest.mark.parametrize("name", ["beam", "best_of_n"])
def test_a_search_does_not_depend_on_its_batch(local, name):
    whole = texts(name, batch(local))
    given = batch(local)
    for row in (0, 5):
        alone = Batch(local, Words(), tiny.PROMPTS[row : row + 1], SEEDS[row : row + 1], given.settings)
        assert texts(name, alone) == whole[row : row + 1]


def test_a_bases_own_generation_settings_do_not_mix_in(local):
    made = tiny.reasoner(text=TEXT)
    made.base.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=5.0)
    for name in ("beam", "best_of_n"):
        assert texts(name, batch(Local(made))) == texts(name, batch(local))


@pytest.mark.parametrize("name", ["beam", "best_of_n"])
def test_a_search_counts_every_branch(local, name):
    (answered,) = METHODS[name].run(batch(local, tiny.PROMPTS[1:2], beams=4, samples=4, cot_tokens=1))
    assert (answered.tokens, answered.forward_passes, answered.prompt_tokens) == (4, 1, 5)
    (longer,) = METHODS[name].run(batch(local, tiny.PROMPTS[1:2], beams=4, samples=4, cot_tokens=3))
    assert (longer.tokens, longer.forward_passes) == (12, 9)
    assert longer.flops == 4 * Cost(local.reasoner).request(5, 0, 3)


@pytest.mark.parametrize("name", ["cot", "beam", "best_of_n"])
def test_a_chain_of_thought_is_as_long_as_fits(local, name):
    (answered,) = METHODS[name].run(batch(local, tiny.PROMPTS[1:2], beams=1, samples=1, cot_tokens=1000))
    assert 0 < answered.tokens <= tiny.POSITIONS - 5
    with pytest.raises(RequestError, match="prompt has 64 tokens"):
        METHODS[name].run(batch(local, [tiny.words(*[1] * 64)]))


@pytest.mark.parametrize("name", ["beam", "best_of_n"])
def test_search_prefix_and_stop(local, name):
    begun = Local(tiny.reasoner(text={**TEXT, "prompt_suffix": " w5", "answer_prefix": "w1 w2"}))
    with_prompt = [f"{prompt} w5 w1 w2" for prompt in tiny.PROMPTS]
    whole = texts(name, batch(begun))
    assert whole == texts(name, batch(local, with_prompt))
    end = whole[0].split()[-1]
    cut = texts(name, batch(Local(tiny.reasoner(text={**TEXT, "stop": [end]})), with_prompt))
    assert cut == [text.split(end)[0] for text in whole] != whole


# -- the list --------------------------------------------------------------------------------------------


def test_methods_that_reach_into_the_model_say_so():
    remote = Remote("http://127.0.0.1:9")
    for method in METHODS.values():
        if not method.remote:
            with pytest.raises(ConfigError, match="server"):
                method.run(batch(remote))


def test_every_control_of_the_issue_is_there():
    controls = {name for name, method in METHODS.items() if method.control}
    assert controls == {
        "no_cot",
        "no_thought",
        "pause_as_thought",
        "multipass_pause",
        "shuffled_thoughts",
        "noised_thoughts",
        "zeroed_thoughts",
        "paused_thoughts",
        "foreign_thoughts",
    }
    assert all(name == method.name for name, method in METHODS.items())


def test_a_method_that_there_is_not_is_refused():
    assert get_method("slr") is METHODS["slr"]
    with pytest.raises(ConfigError, match=r"one of no_cot, cot, .*got guess"):
        get_method("guess")

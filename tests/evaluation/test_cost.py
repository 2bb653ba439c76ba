"""Operations counted by hand, and from the passes that a model really runs."""

import pytest

from slr_core.evaluation.cost import Cost
from slr_core.generation.reference import generate
from slr_core.loop.lora import DECODE
from tests import tiny

# The tiny llama: 32 channels, 2 layers, 4 heads of 8, 2 of them for keys and values, 48 inside the MLP, 40 words.
ATTENTION, MLP, NORMS = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48, 2 * 32
WEIGHT = 2 * (2 * (ATTENTION + MLP + NORMS) + 32)
ADAPTER = 2 * 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # rank 2 on every linear layer
ATTENDED = 4 * 2 * 32
TOKEN = 2 * 32 * 40


@pytest.fixture(scope="module", params=tiny.WORKSPACES)
def made(request):
    return tiny.reasoner(loop=tiny.WORKSPACES[request.param])


HAND = {
    # Each pass: (positions, positions attended, whether the loop's adapter acts); prompt of 5, 2 iterations, 3 tokens.
    "append": [(5, 15, 0), (1, 6, 1), (1, 7, 1), (1, 8, 0), (1, 9, 0)],
    "block": [(5, 15, 0), (3, 21, 1), (3, 21, 1), (3, 21, 0), (1, 9, 0), (1, 10, 0)],
    "prompt": [(5, 15, 1), (5, 15, 1), (5, 15, 0), (1, 6, 0), (1, 7, 0)],
}


@pytest.mark.parametrize("made", tiny.WORKSPACES, indirect=True)
def test_a_request_by_hand(made):
    passes = HAND[made.config.loop.workspace]
    expected = 3 * TOKEN + sum(n * (WEIGHT + ADAPTER * loop) + ATTENDED * seen for n, seen, loop in passes)
    assert Cost(made).request(5, 2, 3) == expected


def test_no_iterations_cost_the_base_model_alone(made):
    passes = [(5, 15), (1, 6), (1, 7)]
    expected = 3 * TOKEN + sum(n * WEIGHT + ATTENDED * seen for n, seen in passes)
    assert Cost(made).request(5, 0, 3) == expected


def of_passes(made, prompt, iterations):
    """The operations of the passes that a lone request runs, and its tokens."""
    cost = Cost(made)
    with tiny.passes(made) as seen:
        result = generate(made, [tiny.request(made, prompt, {"max_iterations": iterations, "criterion": "fixed"})])[0]
    body = sum(
        len(positions) * (WEIGHT + cost.per_adapter[adapter]) + ATTENDED * sum(at + 1 for at in positions)
        for adapter, (positions,) in seen
    )
    return body + result.completion_tokens * TOKEN, result.completion_tokens


OPTIONS = {
    "plain": {},
    "adapter for writing": {"decode": True},
    "answer prefix": {"text": {"answer_prefix": "w1 w2"}},
    "ranks": {"loop": {"lora": {"rank": [1, 2, 3]}}},
    "shared": {"loop": {"lora": {"kind": "shared"}}},
    "none": {"loop": {"lora": {"kind": "none"}}},
}


@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_estimate_is_that_of_the_passes_that_run(workspace, options):
    loop = {**tiny.WORKSPACES[workspace], **options.get("loop", {})}
    made = tiny.reasoner(**{**options, "loop": loop})
    for prompt in tiny.PROMPTS[:2]:
        for iterations in (0, 1, 4):
            expected, tokens = of_passes(made, prompt, iterations)
            assert Cost(made).request(len(tiny.ids(prompt)), iterations, tokens) == expected


def test_adapters_count_what_they_hold():
    cost = Cost(tiny.reasoner(decode=True, loop={"lora": {"rank": [1, 2, 3]}}))
    assert [cost.per_adapter[f"loop_0{t}"] for t in (1, 2, 3)] == [ADAPTER // 2, ADAPTER, ADAPTER // 2 * 3]
    # q_proj and down_proj, rank 3.
    assert cost.per_adapter[DECODE] == 2 * 3 * 2 * ((32 + 32) + (48 + 32))


@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_a_latent_decoder_writes_with_its_own_weights(workspace):
    decoder = {"answers": "latent_decoder", "latent_decoder": tiny.LATENT_DECODER}
    made = tiny.reasoner(loop={**tiny.WORKSPACES[workspace], "decoder": decoder})
    expected, tokens = of_passes(made, tiny.PROMPTS[1], 3)
    weights = 2 * sum(p.numel() for p in made.decoder.parameters())
    assert Cost(made).request(5, 3, tokens) == expected + weights * tokens * (tokens + 1) // 2
    # Without a loop the base model writes.
    expected, tokens = of_passes(made, tiny.PROMPTS[1], 0)
    assert Cost(made).request(5, 0, tokens) == expected


def test_more_of_anything_costs_more(made):
    cost = Cost(made)
    for prompt, iterations, tokens in [(1, 0, 1), (3, 1, 1), (5, 2, 3), (20, 5, 7)]:
        least = cost.request(prompt, iterations, tokens)
        assert 0 < least < cost.request(prompt + 1, iterations, tokens)
        assert least < cost.request(prompt, iterations + 1, tokens)
        assert least < cost.request(prompt, iterations, tokens + 1)


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("qwen3", True)])
def test_embeddings_are_free_and_a_tied_head_is_counted_once(kind, tied):
    made = tiny.reasoner(kind)
    cost = Cost(made)
    layers = sum(p.numel() for name, p in made.base.named_parameters() if ".layers." in name and "lora" not in name)
    assert cost.per_position == 2 * (layers + 32)
    assert cost.per_token == TOKEN
    assert (made.base.get_output_embeddings().weight is made.base.get_input_embeddings().weight) is tied

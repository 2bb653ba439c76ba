import pytest

from slr_core.checkpoint.info import describe_model
from tests import tiny

K = 3


def reasoner(kind="llama", **loop):
    return tiny.reasoner(kind, loop={"block_size": K, **loop})


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_model_is_the_sum_of_its_parts(kind):
    made = reasoner(kind)
    facts = describe_model(made)
    assert facts.base_parameters == sum(p.numel() for p in tiny.base(kind).parameters())
    assert facts.base_parameters + facts.added_parameters == sum(p.numel() for p in made.parameters())
    assert facts.architecture == type(tiny.base(kind)).__name__
    assert (facts.max_positions, facts.vocabulary) == (tiny.POSITIONS, len(tiny.WORDS))
    assert facts.added_share == facts.added_parameters / facts.base_parameters


def test_adapters_by_hand():
    # Of rank r, an adapter of an in x out layer has r * (in + out) weights.
    only_v = {"target_modules": ["v_proj"]}
    assert describe_model(reasoner(lora={**only_v, "rank": 2})).adapter_parameters == 3 * 2 * 2 * (32 + 16)
    assert describe_model(reasoner(lora={**only_v, "rank": [1, 4, 2]})).adapter_parameters == 7 * 2 * (32 + 16)
    assert describe_model(reasoner(lora={**only_v, "decode_rank": 5})).adapter_parameters == (3 * 2 + 5) * 2 * (32 + 16)
    assert describe_model(reasoner(lora={"kind": "none"})).adapter_parameters == 0


@pytest.mark.parametrize(
    ("loop", "more"),
    [
        ({"workspace": "block"}, K * 32),
        ({"workspace": "prompt"}, 0),
        ({"halting_head": True}, 32 + 1),
        ({"residual": {"norm": True}}, 32),
        ({"timestep": {"noise_level": True}}, 1 + 2 * 16 + 16 * 32 + 32),
        ({"projection": {"kind": "linear"}}, 32 * 32 + 32),
    ],
    ids=str,
)
def test_every_part_counts(loop, more):
    assert describe_model(reasoner(**loop)).module_parameters == describe_model(reasoner()).module_parameters + more


def test_the_latent_decoder_counts():
    latent = {"hidden_size": 16, "layers": 1, "heads": 2}
    made = reasoner(decoder={"latent_decoder": latent})
    more = sum(p.numel() for p in made.decoder.parameters())
    assert more > 0
    assert describe_model(made).module_parameters == describe_model(reasoner()).module_parameters + more


# Layers, keys and values, key heads, channels a head, bytes.
CACHE = {"llama": 2 * 2 * 2 * 8 * 4, "qwen3": 2 * 2 * 2 * 8 * 4, "gpt2": 2 * 2 * 4 * 8 * 4}


@pytest.mark.parametrize("kind", CACHE)
def test_the_cache_of_a_position_by_hand(kind):
    assert describe_model(reasoner(kind)).cache_bytes_per_position == CACHE[kind]


@pytest.mark.parametrize(("workspace", "positions"), [("append", 5), ("block", K), ("prompt", 0)])
def test_a_request_reserves_its_prompt_its_loop_and_its_answer(workspace, positions):
    facts = describe_model(reasoner(workspace=workspace))
    assert facts.loop_positions == positions
    assert facts.cache_bytes(10, 7) == (10 + positions + 7) * CACHE["llama"]


@pytest.mark.parametrize(("cache", "copies"), [("copy", 5), ("shared", 1)])
def test_caches_of_token(cache, copies):
    facts = describe_model(tiny.reasoner(loop={"workspace": "token", "deeper_cache": cache}))
    assert facts.cache_bytes(10, 7) == copies * (10 + 7) * CACHE["llama"]


def test_half_precision_halves_the_cache():
    made = tiny.reasoner(plain=tiny.base().bfloat16())
    assert describe_model(made).cache_bytes_per_position == CACHE["llama"] // 2


def test_one_line():
    facts = describe_model(reasoner())
    assert f"{facts.base_parameters:,} parameters, the loop adds {facts.added_parameters:,} (" in facts.sizes
    assert facts.sizes.endswith(f"({100 * facts.added_share:.1f}%)")

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slr_core.config import (
    DEFAULT_THRESHOLDS,
    ConvergenceConfig,
    LoopConfig,
    SLRConfig,
)
from slr_core.errors import ConfigError


def test_defaults_are_valid_and_round_trip():
    config = SLRConfig()
    assert SLRConfig.from_dict(json.loads(config.to_json())) == config
    assert SLRConfig.from_dict({}) == config


loops = st.fixed_dictionaries(
    {"halting_head": st.just(True)},  # without one, not every criterion is possible
    optional={
        "workspace": st.sampled_from(["append", "block", "prompt"]),
        "block_size": st.integers(1, 1024),
        "decoder": st.fixed_dictionaries(
            {
                "answers": st.sampled_from(["lm_head", "latent_decoder"]),
                "latent_decoder": st.builds(
                    lambda heads, width, layers: {"hidden_size": 2 * heads * width, "heads": heads, "layers": layers},
                    st.integers(1, 16),
                    st.integers(4, 64),
                    st.integers(1, 48),
                ),
            }
        ),
        "trained_iterations": st.integers(1, 64),
        "max_iterations": st.integers(0, 256),
        "projection": st.fixed_dictionaries(
            {"kind": st.sampled_from(["identity", "rms_match", "linear", "mlp", "expected_embedding"])}
        ),
        "timestep": st.fixed_dictionaries(
            {"kind": st.sampled_from(["none", "sinusoidal", "learned"]), "combine": st.sampled_from(["add", "concat"])},
            optional={"noise_level": st.booleans()},
        ),
        "lora": st.fixed_dictionaries(
            {
                "kind": st.sampled_from(["per_iteration", "shared", "none"]),
                "rank": st.integers(1, 1024),
                "decode_rank": st.none() | st.integers(1, 1024),
                "target_modules": st.none() | st.lists(st.text(max_size=9), max_size=3),
            }
        ),
        "residual": st.fixed_dictionaries({"mix": st.sampled_from(["add", "convex"]), "alpha": st.floats(0.01, 1)}),
        "convergence": st.fixed_dictionaries(
            {
                "criterion": st.sampled_from(sorted(DEFAULT_THRESHOLDS)),
                "threshold": st.none() | st.floats(0, 1e6),
                "end_token_id": st.integers(0, 9),
            }
        ),
    },
)


@given(loops, st.text(max_size=20), st.lists(st.text(min_size=1, max_size=5), max_size=3))
def test_any_config_round_trips(loop, prefix, stop):
    data = {"loop": loop, "text": {"prompt_prefix": prefix, "stop": stop}}
    config = SLRConfig.from_dict(data)
    assert SLRConfig.from_dict(json.loads(config.to_json())) == config
    dumped = config.model_dump(mode="json")
    assert holds(dumped["loop"], loop)


def holds(whole, part):
    """Whether every setting of a nested ``part`` has its value in ``whole``."""
    if not isinstance(part, dict):
        return whole == part
    return all(holds(whole[key], value) for key, value in part.items())


def test_it_is_read_from_a_file(tmp_path):
    path = tmp_path / "slr_config.json"
    path.write_text(SLRConfig(base="some/model").to_json())
    assert SLRConfig.from_json(path).base == "some/model"


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000])
def test_a_file_that_is_not_json_is_named(content, tmp_path):
    path = tmp_path / "slr_config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"slr_config\.json"):
        SLRConfig.from_json(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        SLRConfig.from_json(tmp_path / "nowhere.json")


WRONG = {
    "unknown": ({"speed": 11}, "speed"),
    "unknown-nested": ({"loop": {"lora": {"dropout": 0.1}}}, "loop.lora.dropout"),
    "newer": ({"format_version": 2}, "format_version"),
    "boolean-version": ({"format_version": True}, "format_version"),
    "type": ({"loop": {"trained_iterations": "six"}}, "loop.trained_iterations"),
    "numeric-string": ({"loop": {"trained_iterations": "6"}}, "loop.trained_iterations"),
    "boolean": ({"loop": {"max_iterations": True}}, "loop.max_iterations"),
    "fraction": ({"loop": {"max_iterations": 2.5}}, "loop.max_iterations"),
    "negative": ({"loop": {"max_iterations": -1}}, "loop.max_iterations"),
    "absurd": ({"loop": {"max_iterations": 10**9}}, "loop.max_iterations"),
    "zero-trained": ({"loop": {"trained_iterations": 0}}, "loop.trained_iterations"),
    "choice": ({"loop": {"workspace": "sideways"}}, "loop.workspace"),
    "nan": ({"loop": {"convergence": {"threshold": float("nan")}}}, ""),
    "infinite": ({"loop": {"lora": {"alpha": float("inf")}}}, ""),
    "criterion": ({"loop": {"convergence": {"criterion": "vibes"}}}, "loop.convergence.criterion"),
    "patience": ({"loop": {"convergence": {"patience": 0}}}, "loop.convergence.patience"),
    "block-size": ({"loop": {"block_size": 0}}, "loop.block_size"),
    "block-size-absurd": ({"loop": {"block_size": 1025}}, "loop.block_size"),
    "noise-level": ({"loop": {"timestep": {"noise_level": 0.5}}}, "loop.timestep.noise_level"),
    "halting-head": ({"loop": {"halting_head": "yes"}}, "loop.halting_head"),
    "rank-zero": ({"loop": {"lora": {"rank": [1, 0]}}}, "loop.lora.rank"),
    "rank-absurd": ({"loop": {"lora": {"rank": 1025}}}, "loop.lora.rank"),
    "decode-rank": ({"loop": {"lora": {"decode_rank": 0}}}, "loop.lora.decode_rank"),
    "decoder-field": ({"loop": {"decoder": {"latent_decoder": {"depth": 1}}}}, "loop.decoder.latent_decoder.depth"),
    "decoder-odd": ({"loop": {"decoder": {"latent_decoder": {"hidden_size": 33}}}}, "latent_decoder.hidden_size"),
    "thought-length": ({"loop": {"decoder": {"latent_decoder": {"max_thought_tokens": 0}}}}, "max_thought_tokens"),
    "stop-empty": ({"text": {"stop": [""]}}, "text.stop.0"),
    "stop-token": ({"text": {"stop_token_ids": [-1]}}, "text.stop_token_ids.0"),
    "inner-size": ({"loop": {"projection": {"kind": "mlp", "inner_size": 0}}}, "loop.projection.inner_size"),
    "suppressed-token": ({"text": {"suppressed_token_ids": [-1]}}, "text.suppressed_token_ids.0"),
    "replace-nothing": ({"text": {"prompt_replace": [["", "x"]]}}, "text.prompt_replace.0.0"),
    "replace-much": ({"text": {"prompt_replace": [["ab", "x" * 20]] * 2}}, "text: prompt_replace may make 100 char"),
    "long-prefix": ({"text": {"prompt_prefix": "x" * 65537}}, "text.prompt_prefix"),
    "many-stops": ({"text": {"stop": ["x"] * 65}}, "text.stop"),
    "long-stop": ({"text": {"stop": ["x" * 1025]}}, "text.stop.0"),
    "replace-one": ({"text": {"prompt_replace": [["x"]]}}, "text.prompt_replace.0"),
    "answer-prefix": ({"text": {"answer_prefix": None}}, "text.answer_prefix"),
    "chat-template": ({"text": {"chat_template": ["x"]}}, "text.chat_template"),
    "gate": ({"loop": {"residual": {"mix": "gated", "alpha": 1}}}, "alpha must be below 1"),
    "not-an-object": ([1, 2], "config"),
    "null": (None, "config"),
    "null-part": ({"loop": None}, "loop"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    data, named = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        SLRConfig.from_dict(data)
    assert named in str(caught.value)


LATENT = {"hidden_size": 24, "heads": 5}
MISFITS = {
    "heads": (
        {"decoder": {"latent_decoder": LATENT}},
        "loop.decoder.latent_decoder: hidden_size must be a multiple of heads (5)",
    ),
    "nobody-answers": (
        {"decoder": {"answers": "latent_decoder"}},
        "loop.decoder: answers `latent_decoder` needs a latent_decoder; `latent_decoder: {}` uses its defaults",
    ),
    "covers": (
        {"lora": {"covers": "all"}},
        "loop: lora.covers `all` needs lora.kind `shared` and no decode_rank",
    ),
    "shifted": (
        {"feedback": "shifted"},
        "loop: feedback `shifted` needs workspace `block`",
    ),
    "raw": (
        {"feedback": "raw"},
        "loop: feedback `raw` needs workspace `token`",
    ),
    "token-decode": (
        {"workspace": "token", "lora": {"decode_rank": 2}},
        "loop: lora.decode_rank is not supported by workspace `token`: answers are written by the loop's own adapters",
    ),
    "token-noise": (
        {"workspace": "token", "timestep": {"noise_level": True}},
        "loop: timestep.noise_level is not supported by workspace `token`: one change would have to stand for many "
        "positions",
    ),
    "token-latent": (
        {"workspace": "token", "decoder": {"answers": "latent_decoder", "latent_decoder": LATENT | {"heads": 4}}},
        "loop: decoder.answers is not supported by workspace `token`: it must be `lm_head`, which reads every token",
    ),
    "no-survival": (
        {"convergence": {"criterion": "survival"}},
        "loop: convergence.criterion `survival` needs halting_head: true",
    ),
    "no-end-token": (
        {"convergence": {"criterion": "end_token"}},
        "loop: convergence.criterion `end_token` needs convergence.end_token_id",
    ),
    "shared-ranks": (
        {"lora": {"kind": "shared", "rank": [8]}},
        "loop: lora.rank must be one number for lora.kind `shared`",
    ),
    "no-adapters-ranks": (
        {"lora": {"kind": "none", "rank": [1, 2, 3, 4, 5, 6]}},
        "loop: lora.rank must be one number for lora.kind `none`",
    ),
    "few-ranks": (
        {"trained_iterations": 3, "lora": {"rank": [8, 4]}},
        "loop: lora.rank must be one number or 3, one per trained iteration, got 2",
    ),
    "no-ranks": (
        {"lora": {"rank": []}},
        "loop: lora.rank must be one number or 6, one per trained iteration, got 0",
    ),
    "no-head": (
        {"convergence": {"criterion": "learned"}},
        "loop: convergence.criterion `learned` needs halting_head: true",
    ),
    "pause-of-a-prompt": (
        {"workspace": "prompt", "projection": {"kind": "pause"}},
        "loop: projection.kind `pause` needs workspace `append`: in the others the input would be lost",
    ),
    "past-the-end": (
        {"trained_iterations": 3, "max_iterations": 4, "lora": {"past_end": "error"}},
        "loop: max_iterations must be at most trained_iterations under lora.past_end `error`",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_together_are_named(case):
    loop, message = MISFITS[case]
    with pytest.raises(ConfigError) as caught:
        SLRConfig.from_dict({"loop": loop})
    assert str(caught.value) == message


def test_answer_prefix_of_token():
    with pytest.raises(ConfigError, match=r"text\.answer_prefix is not supported by workspace `token`"):
        SLRConfig.from_dict({"loop": {"workspace": "token"}, "text": {"answer_prefix": "A:"}})


@pytest.mark.parametrize(
    "loop",
    [
        {"workspace": "token", "deeper_cache": "shared", "feedback": "raw"},
        {"trained_iterations": 3, "lora": {"rank": [8, 4, 2]}},
        {"decoder": {"answers": "latent_decoder", "latent_decoder": {}}},
        {"decoder": {"latent_decoder": {"hidden_size": 24, "heads": 6}}},
        {"halting_head": True, "convergence": {"criterion": "learned"}},
        {"trained_iterations": 4, "max_iterations": 4, "lora": {"past_end": "error"}},
    ],
    ids=str,
)
def test_parts_that_fit_together_round_trip(loop):
    config = SLRConfig.from_dict({"loop": loop})
    assert SLRConfig.from_dict(json.loads(config.to_json())) == config
    assert holds(config.model_dump(mode="json")["loop"], loop)


def test_every_fault_is_listed():
    with pytest.raises(ConfigError) as caught:
        SLRConfig.from_dict({"speed": 1, "loop": {"max_iterations": -1}})
    assert "speed" in str(caught.value)
    assert "loop.max_iterations" in str(caught.value)


def test_replace_merges_nested_fields_and_validates():
    config = SLRConfig.from_dict({"loop": {"lora": {"rank": 3}, "max_iterations": 9}, "text": {"stop": ["x"]}})
    changed = config.replace(loop={"residual": {"source": "none"}, "lora": {"alpha": 2}}, base="b")
    assert changed.loop.residual.source == "none"
    assert (changed.loop.lora.rank, changed.loop.lora.alpha) == (3, 2)
    assert (changed.loop.max_iterations, changed.base, changed.text.stop) == (9, "b", ("x",))
    assert config.loop.residual.source == "previous"
    with pytest.raises(ConfigError, match="rank"):
        config.replace(loop={"lora": {"rank": 0}})


def test_configs_are_frozen():
    with pytest.raises(ValidationError):
        SLRConfig().loop.max_iterations = 3


def test_every_criterion_has_a_default_threshold():
    for criterion, threshold in DEFAULT_THRESHOLDS.items():
        convergence = {"criterion": criterion, "end_token_id": 7}
        config = SLRConfig.from_dict({"loop": {"convergence": convergence, "halting_head": True}})
        assert config.loop.convergence.effective_threshold == threshold
    assert ConvergenceConfig(threshold=0.0).effective_threshold == 0.0


def test_adapters_are_named_by_iteration():
    assert LoopConfig(trained_iterations=12).adapters[8:] == ("loop_09", "loop_10", "loop_11", "loop_12")


def test_every_field_is_described_by_its_schema():
    schema = SLRConfig.model_json_schema()
    for name, part in schema["$defs"].items():
        assert part.get("description"), name
    leaves = [
        (name, field, value)
        for name, part in schema["$defs"].items()
        for field, value in part["properties"].items()
        if "$ref" not in value
    ]
    assert leaves
    assert [(name, field) for name, field, value in leaves if not value.get("description")] == []

"""The workspace ``token``: the formulas, rows of a batch, the base model, and loops that break down."""

import pytest
import torch

from slr_core.config import SLRConfig
from slr_core.errors import ConfigError
from slr_core.generation.reference import generate
from slr_core.loop.lora import DECODE, new_adapter_configs
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.contract.derivation import derive
from tests.contract.test_properties import broken

CASES = {
    "copy": {},
    "shared": {"deeper_cache": "shared", "residual": {"source": "none"}},
    "raw": {
        "feedback": "raw",
        "projection": {"kind": "identity"},
        "residual": {"source": "initial", "mix": "add", "norm": True},
        "timestep": {"combine": "concat"},
    },
    "raw-shared": {
        "feedback": "raw",
        "deeper_cache": "shared",
        "projection": {"kind": "mlp"},
        "lora": {"rank": [1, 3, 2]},
    },
    "bare": {"lora": {"kind": "none"}, "timestep": {"kind": "none"}, "residual": {"source": "none"}},
    "covers-all": {"lora": {"kind": "shared", "covers": "all"}, "projection": {"kind": "linear"}},
}
ASKED = (
    {"max_iterations": 4, "criterion": "relative_change", "threshold": 0.8},
    {"max_iterations": 0},
    {"max_iterations": 5, "criterion": "fixed"},
    {"max_iterations": 6, "criterion": "survival", "threshold": 0.3, "patience": 2},
    {"max_iterations": 4, "min_iterations": 2, "criterion": "kl", "threshold": 1.0},
)


def token(kind, case, **changes):
    return tiny.reasoner(kind, {"workspace": "token", "halting_head": True, **CASES[case], **changes})


def facts(result):
    return (
        result.token_ids,
        result.iterations,
        result.iterations_per_token,
        result.exit_reason,
        result.forward_passes,
        [record.adapter for record in result.records],
    )


def product():
    """Every case on one architecture in turn; on the others in the slow tests."""
    for i, case in enumerate(CASES):
        for kind in tiny.KINDS:
            marks = () if kind == tiny.KINDS[i % len(tiny.KINDS)] else pytest.mark.slow
            yield pytest.param(kind, case, marks=marks)


@pytest.mark.parametrize(("kind", "case"), list(product()))
def test_formulas(kind, case, tmp_path):
    made = token(kind, case)
    made.save_pretrained(str(tmp_path))
    requests = [
        tiny.request(made, prompt, loop, trace=True, include_states=True, max_new_tokens=5, trace_tokens=9)
        for prompt, loop in zip(tiny.PROMPTS, ASKED, strict=False)
    ]
    together = generate(made, requests)
    for request, batched in zip(requests, together, strict=True):
        with tiny.passes(made) as passes:
            (ours,) = generate(made, [request])
        derived = derive(tmp_path, list(request.prompt_ids), request.loop, 5)
        assert list(ours.token_ids) == derived.tokens
        assert list(ours.iterations_per_token) == derived.iterations_per_token
        assert (ours.iterations, ours.exit_reason) == (derived.iterations_per_token[0], derived.exit_reason)
        assert passes == [(adapter, [positions]) for adapter, positions in derived.passes]
        assert len(passes) == ours.forward_passes
        torch.testing.assert_close(ours.states, torch.stack(derived.states), rtol=1e-5, atol=1e-5)
        for record, expected in zip(ours.records, derived.records, strict=True):
            for key, value in expected.items():
                assert getattr(record, key) == (
                    pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
                ), key
        assert ours.records_per_token[0] == ours.records
        assert [len(loop) for loop in ours.records_per_token] == derived.iterations_per_token
        for loop in ours.records_per_token[1:]:
            assert all(record.entropy is not None and record.norm is not None for record in loop)
        # Alone or in a batch, padded, beside rows of other depths.
        assert facts(batched) == facts(ours)
        torch.testing.assert_close(batched.states, ours.states, rtol=1e-4, atol=1e-5)


def test_cases_exit_early():
    made = token("llama", "copy")
    results = generate(made, [tiny.request(made, tiny.PROMPTS[0], loop) for loop in ASKED])
    assert {result.exit_reason for result in results} == {"converged", "max_iterations"}
    assert any(len(set(result.iterations_per_token)) > 1 for result in results)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_without_iterations_it_is_the_base(kind):
    made, plain = token(kind, "raw"), tiny.base(kind)
    requests = [
        tiny.request(made, prompt, {"max_iterations": n}) for prompt, n in ((tiny.PROMPTS[1], 0), (tiny.PROMPTS[2], 3))
    ]
    result = generate(made, requests)[0]
    ids = torch.tensor([tiny.ids(tiny.PROMPTS[1])])
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    assert list(result.token_ids) == expected[0, ids.shape[1] :].tolist()
    assert (result.iterations, result.exit_reason) == (0, "max_iterations")
    assert set(result.iterations_per_token) == {0}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bare_loops_are_stacked_passes(kind):
    """Without adapters, T iterations of raw feedback are a model whose layers are repeated T times.

    GPT-2 adds its position embeddings once.
    """
    made = token(kind, "bare", feedback="raw", projection={"kind": "identity"})
    deep = tiny.base(kind)
    layers = deep.transformer.h if kind == "gpt2" else deep.model.layers
    layers.extend([layer for _ in range(2) for layer in list(layers)])
    deep.config.num_hidden_layers = len(layers)
    ids = torch.tensor([tiny.ids(tiny.PROMPTS[3])])
    expected = deep(ids, use_cache=False).logits[0, -1]
    with torch.inference_mode():
        ours = made(ids, iterations=3).logits[0, -1]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["copy", "shared"])
@pytest.mark.parametrize("where", ["state", "position", "layer"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_prompt_that_breaks_down_lowers_the_depth(case, where, at):
    made, row = token("llama", case, guard={"norm_factor": 1e6}), 1
    fixed = {"max_iterations": 4, "criterion": "fixed"}
    requests = [tiny.request(made, prompt, fixed, trace=True) for prompt in tiny.PROMPTS[1:4]]
    expected = generate(made, requests)
    (last_good,) = generate(made, [tiny.request(made, tiny.PROMPTS[2], fixed | {"max_iterations": at - 1})])
    with broken(made, at, row, where, float("nan")):
        results = generate(made, requests)
    fell = results.pop(row)
    expected.pop(row)
    assert [facts(result) for result in results] == [facts(result) for result in expected]
    assert (fell.exit_reason, fell.iterations, fell.token_ids) == ("diverged", at, last_good.token_ids)
    assert fell.iterations_per_token == (at, *last_good.iterations_per_token[1:])


def test_a_prompt_that_breaks_down_after_its_exit():
    made = token("llama", "copy")
    early = {"max_iterations": 4, "criterion": "relative_change", "threshold": 100.0}
    request = tiny.request(made, tiny.PROMPTS[1], early)
    assert generate(made, [request])[0].iterations == 2
    with broken(made, 3, 0, "state", float("inf")):
        (fell,) = generate(made, [request])
    assert (fell.iterations, fell.exit_reason, fell.stability.converged) == (2, "diverged", True)
    assert max(fell.iterations_per_token) == 2


@pytest.mark.parametrize("case", ["copy", "shared"])
def test_training_mode_reads_what_generate_reads(case):
    """Teacher-forced logits are those from which a full-depth answer is decoded."""
    made = token("gpt2", case)
    ids, answer = torch.tensor([tiny.ids(tiny.PROMPTS[3])]), torch.tensor([[3, 4, 5, 6]])
    with torch.inference_mode():
        output = made(ids, labels=answer, iterations=3)
    forced = tiny.request(
        made,
        tiny.PROMPTS[3],
        {"max_iterations": 3, "criterion": "fixed"},
        forced_ids=(3, 4, 5),
        logprobs=0,
        max_new_tokens=1,
    )
    (result,) = generate(made, [forced])
    log_probs = output.logits[0].log_softmax(-1)
    assert [score.logprob for score in result.scores[:3]] == pytest.approx(
        [float(log_probs[i, token]) for i, token in enumerate((3, 4, 5))], abs=1e-4
    )
    assert result.token_ids[3] == int(log_probs[3].argmax())


def test_every_part_gets_gradients():
    made = token("llama", "raw").train()
    made(torch.tensor([tiny.ids(tiny.PROMPTS[1])]), labels=torch.tensor([[3, 4]]), iterations=3).loss.backward()
    without = {name for name, p in made.named_parameters() if p.grad is None}
    assert {name.split(".")[0] for name in without} == {"halting"}


def test_an_adapter_decode_is_refused():
    config = SLRConfig.from_dict({"loop": {"workspace": "token"}})
    adapters = new_adapter_configs(config.loop)
    adapters[DECODE] = adapters["loop_01"]
    with pytest.raises(ConfigError, match="`decode` is not supported by workspace `token`"):
        LatentReasoner(tiny.base(), tiny.tokenizer(), config, adapters)


def test_a_result_holds_one_position():
    made = token("llama", "copy")
    loop = {"max_iterations": 3, "criterion": "fixed"}
    (result,) = generate(made, [tiny.request(made, tiny.PROMPTS[1], loop, include_states=True)])
    assert result.states[1:].numel() == made.state_values(result.prompt_tokens, 3) == 3 * 32

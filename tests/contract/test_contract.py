"""What holds for every architecture: batches, padding, the plain base model, PEFT, and the formulas re-derived."""

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from slr_core.generation import generate
from slr_core.loop.convergence import LoopSettings
from slr_core.model import LatentReasoner
from slr_core.sampling import SamplingSettings
from tests import tiny

MIXED = (
    {"max_iterations": 0},
    {"max_iterations": 3, "criterion": "fixed"},
    {"max_iterations": 12, "min_iterations": 2, "criterion": "relative_change", "threshold": 0.3},
    {"max_iterations": 9, "criterion": "argmax_stable", "patience": 2},
    {"max_iterations": 0, "min_iterations": 0},
    {"max_iterations": 10, "criterion": "kl", "threshold": 0.5},
    {"max_iterations": 8, "min_iterations": 4, "criterion": "cosine", "threshold": 0.9},
    {"max_iterations": 7, "criterion": "entropy_change", "threshold": 0.3},
)
VALUE_OF = {"relative_change": "relative_change", "cosine": "cosine", "kl": "kl"}


@pytest.fixture(scope="module", params=tiny.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["", "decode-adapter"])
def made(kind, request):
    return tiny.reasoner(kind, decode=request.param)


@pytest.fixture(scope="module")
def saved(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind) / "checkpoint"
    made = tiny.reasoner(kind)
    made.save_pretrained(str(folder))
    return made, folder


def mixed(made, **options):
    return [
        tiny.request(made, prompt, loop, trace=True, **options)
        for prompt, loop in zip(tiny.PROMPTS, MIXED, strict=True)
    ]


def facts(result):
    return result.token_ids, result.iterations, result.exit_reason, result.finish_reason, result.forward_passes


def near(a, b):
    return a is b is None or a == pytest.approx(b, rel=1e-4, abs=1e-5)


def plain_base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def with_peft(model, folder: Path, names):
    with warnings.catch_warnings():
        # PEFT's own ways with transformers 5 and with Conv1D.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        peft_model = PeftModel.from_pretrained(model, folder / "loops" / names[0], adapter_name=names[0])
        for name in names[1:]:
            peft_model.load_adapter(folder / "loops" / name, adapter_name=name)
    return peft_model.eval()


# -- batches ---------------------------------------------------------------------------------------------


def test_a_batch_gives_each_row_what_it_gets_alone(made):
    requests = mixed(made)
    together = generate(made, requests)
    alone = [generate(made, [request])[0] for request in requests]

    # The mix must really be one, and no row may sit so near its threshold that rounding decides.
    assert {"converged", "max_iterations"} == {result.exit_reason for result in alone}
    assert len({result.iterations for result in alone}) >= 4
    assert len({result.token_ids for result in alone}) >= len(alone) - 2
    for result, request in zip(alone, requests, strict=True):
        if name := VALUE_OF.get(request.loop.criterion):
            values = [getattr(record, name) for record in result.records]
            assert all(abs(value / request.loop.threshold - 1) > 1e-3 for value in values)

    assert [facts(result) for result in together] == [facts(result) for result in alone]
    for a, b in zip(together, alone, strict=True):
        assert near(a.final_change, b.final_change)
        for record, other in zip(a.records, b.records, strict=True):
            for name in ("relative_change", "cosine", "norm", "contraction", "kl", "entropy"):
                assert near(getattr(record, name), getattr(other, name)), name


def test_states_in_a_batch_are_those_of_rows_alone(made):
    settings = [LoopSettings.resolve(made.config.loop, **loop) for loop in MIXED]
    with torch.inference_mode():
        together = made.loop(made.encode(*tiny.batch(tiny.PROMPTS)), settings)
        for i, prompt in enumerate(tiny.PROMPTS):
            alone = made.loop(made.encode(*tiny.batch([prompt])), [settings[i]])
            assert together.iterations[i] == alone.iterations[0]
            torch.testing.assert_close(together.states[i], alone.states[0], rtol=1e-5, atol=1e-5)
            assert len(together.states[i]) == together.iterations[i] + 1


def test_sampled_tokens_do_not_depend_on_the_batch(made):
    sampling = [SamplingSettings(temperature=1.0, top_k=20, top_p=0.95, seed=seed) for seed in range(8)]
    requests = [
        tiny.request(made, prompt, loop, sampling=own)
        for prompt, loop, own in zip(tiny.PROMPTS, MIXED, sampling, strict=True)
    ]
    together = generate(made, requests)
    assert [facts(r) for r in together] == [facts(generate(made, [request])[0]) for request in requests]


def test_the_order_of_a_batch_changes_nothing(made):
    requests = mixed(made)
    order = [5, 2, 7, 0, 3, 1, 6, 4]
    straight, shuffled = generate(made, requests), generate(made, [requests[i] for i in order])
    assert [facts(result) for result in shuffled] == [facts(straight[i]) for i in order]


def test_left_padding_equals_right_padding(made):
    settings = [LoopSettings.resolve(made.config.loop, **loop) for loop in MIXED]
    looped = torch.tensor([s.max_iterations > 0 for s in settings])
    tokens, present = tiny.batch([tiny.words(1, 2), *[tiny.words(4, 5, 6)] * 7])
    outputs, answers = [], []
    with torch.inference_mode():
        for side in ("left", "right"):
            outputs.append(made.loop(made.encode(*tiny.batch(tiny.PROMPTS, side)), settings))
            answers.append(made.answer(outputs[-1].context, tokens, present.bool(), looped))
    left, right = outputs
    assert (left.iterations, left.exit_reasons) == (right.iterations, right.exit_reasons)
    for a, b in zip(left.states, right.states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answers[0][present.bool()], answers[1][present.bool()], rtol=1e-4, atol=1e-4)


# -- the base model --------------------------------------------------------------------------------------


def test_without_iterations_it_is_the_base_model(saved):
    made, folder = saved
    plain = plain_base(folder)
    results = generate(made, [tiny.request(made, p, {"max_iterations": 0}, max_new_tokens=12) for p in tiny.PROMPTS])
    for prompt, result in zip(tiny.PROMPTS, results, strict=True):
        prompt_ids = torch.tensor([tiny.ids(prompt)])
        expected = plain.generate(
            prompt_ids, attention_mask=torch.ones_like(prompt_ids), do_sample=False, max_new_tokens=12
        )
        assert list(result.token_ids) == expected[0, prompt_ids.shape[1] :].tolist()
        assert (result.iterations, result.exit_reason, result.final_change) == (0, "max_iterations", None)
        assert result.records == ()
    # Iterations do change the answer, or the above would say nothing.
    looped = generate(made, [tiny.request(made, p, {"max_iterations": 3}, max_new_tokens=12) for p in tiny.PROMPTS])
    assert [r.token_ids for r in looped] != [r.token_ids for r in results]


def test_iteration_1_is_what_peft_makes_of_the_first_adapter(saved):
    made, folder = saved
    peft_model = with_peft(plain_base(folder), folder, ["loop_01"])
    input_ids, mask = tiny.batch([tiny.PROMPTS[3]])
    with torch.inference_mode():
        context = made.encode(input_ids, mask)
        h_0 = context.hidden
        u = made.timestep(made.project(h_0, made.embedding_rms()), 1)
        g, _ = made.iterate(context, 1, h_0)

        with peft_model.disable_adapter():
            prompt = peft_model(input_ids=input_ids, use_cache=True, output_hidden_states=True)
        torch.testing.assert_close(prompt.hidden_states[-1][:, -1], h_0, rtol=1e-5, atol=1e-5)
        length = input_ids.shape[1]
        options = {"inputs_embeds": u[:, None], "position_ids": torch.tensor([[length]])}
        with_adapter = peft_model(**options, past_key_values=clone(prompt.past_key_values)).logits[:, 0]
        with peft_model.disable_adapter():
            without = peft_model(**options, past_key_values=clone(prompt.past_key_values)).logits[:, 0]
        torch.testing.assert_close(made.head(g), with_adapter, rtol=1e-5, atol=1e-5)
        assert (with_adapter - without).abs().max() > 0.1


def clone(cache):
    copied = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copied.update(layer.keys.clone(), layer.values.clone(), index)
    return copied


# -- the formulas, from the files alone ------------------------------------------------------------------

ABLATIONS = {
    "default": {},
    "bare": {"projection": {"kind": "identity"}, "timestep": {"kind": "none"}, "residual": {"source": "none"}},
    "sinusoidal-concat": {"timestep": {"kind": "sinusoidal", "combine": "concat"}},
    "learned-concat-linear": {"timestep": {"combine": "concat"}, "projection": {"kind": "linear"}},
    "initial-convex-norm": {"residual": {"source": "initial", "mix": "convex", "alpha": 0.7, "norm": True}},
    "previous-add": {"residual": {"mix": "add", "scale": -0.4}},
    "mlp-sinusoidal-initial": {
        "projection": {"kind": "mlp"},
        "timestep": {"kind": "sinusoidal"},
        "residual": {"source": "initial", "alpha": 0.6},
    },
    "shared-adapter": {"lora": {"kind": "shared"}},
    "no-adapter": {"lora": {"kind": "none"}},
    "cycle": {"lora": {"past_end": "cycle"}},
}
CASES = [*itertools.product(tiny.KINDS, ["default"]), *(("llama", name) for name in ABLATIONS if name != "default")]


@pytest.mark.parametrize(("kind", "ablation"), CASES)
@pytest.mark.parametrize("decode", [False, True], ids=["", "decode-adapter"])
def test_the_loop_is_the_formulas(kind, ablation, decode, tmp_path):
    iterations, prompt = 5, tiny.PROMPTS[3]
    made = tiny.reasoner(kind, ABLATIONS[ablation], decode=decode)
    made.save_pretrained(str(tmp_path))
    with torch.inference_mode():
        ours = made.loop(
            made.encode(*tiny.batch([prompt])),
            [LoopSettings.resolve(made.config.loop, max_iterations=iterations, criterion="fixed")],
        )
        (answer,) = generate(
            made, [tiny.request(made, prompt, {"max_iterations": iterations, "criterion": "fixed"}, max_new_tokens=6)]
        )
        states, tokens = derive(tmp_path, made.config.loop, tiny.ids(prompt), iterations, len(answer.token_ids))
    assert ours.iterations == [iterations]
    torch.testing.assert_close(ours.states[0], states, rtol=1e-5, atol=1e-5)
    assert list(answer.token_ids) == tokens


def derive(folder: Path, loop, prompt: list[int], iterations: int, count: int):
    """The append loop from the saved files: transformers' and PEFT's calls, the design's formulas, none of our code."""
    weights = load_file(folder / "slr_modules.safetensors")
    names = sorted(path.name for path in (folder / "loops").glob("*")) if (folder / "loops").is_dir() else []
    model = plain_base(folder)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if names:
        model = with_peft(model, folder, names)
    cache = DynamicCache()

    def run(embeds, first, adapter):
        positions = torch.arange(first, first + embeds.shape[1])[None]
        options = {"inputs_embeds": embeds, "position_ids": positions, "past_key_values": cache}
        if adapter is None and names:
            with model.disable_adapter():
                out = model(**options, use_cache=True, output_hidden_states=True)
        else:
            if adapter is not None:
                model.set_adapter(adapter)
            out = model(**options, use_cache=True, output_hidden_states=True)
        return out.hidden_states[-1][:, -1]

    trained = [name for name in names if name != "decode"]
    h = [run(table(torch.tensor([prompt])), 0, None)]
    for t in range(1, iterations + 1):
        if loop.lora.past_end == "cycle":
            index = (t - 1) % 3
            adapter = trained[index % len(trained)] if trained else None
        else:
            index = min(t, 3) - 1
            adapter = trained[min(t, len(trained)) - 1] if trained else None
        u = embedding_of(index, project(h[-1], table.weight, weights, loop), weights, loop)
        g = run(u[:, None], len(prompt) + t - 1, adapter)
        h.append(residual(g, h[-1], h[0], weights, loop))
    tokens = [int(head(h[-1]).argmax())]
    position = len(prompt) + iterations
    while len(tokens) < count:
        state = run(table(torch.tensor([tokens[-1:]])), position, "decode" if "decode" in names else None)
        tokens.append(int(head(state).argmax()))
        position += 1
    return torch.cat(h), tokens


def rms(x):
    return (x**2).mean(-1, keepdim=True).sqrt()


def project(h, table, weights, loop):
    match loop.projection.kind:
        case "identity":
            return h
        case "rms_match":
            return h / rms(h) * (table**2).mean().sqrt()
        case "linear":
            return h @ weights["project.layers.weight"].T + weights["project.layers.bias"]
        case "mlp":
            x = torch.nn.functional.gelu(h @ weights["project.layers.0.weight"].T + weights["project.layers.0.bias"])
            x = x @ weights["project.layers.2.weight"].T + weights["project.layers.2.bias"]
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            return x * weights["project.layers.3.weight"] + weights["project.layers.3.bias"]


def embedding_of(index, x, weights, loop):
    if loop.timestep.kind == "none":
        return x
    if loop.timestep.kind == "learned":
        e = weights["timestep.table"][index]
    else:
        angles = (index + 1) * 10_000.0 ** (-torch.arange(16) / 16)
        e = torch.cat([angles.sin(), angles.cos()])
        e = e @ weights["timestep.mlp.0.weight"].T + weights["timestep.mlp.0.bias"]
        e = (e * e.sigmoid()) @ weights["timestep.mlp.2.weight"].T + weights["timestep.mlp.2.bias"]
    if loop.timestep.combine == "add":
        return x + e
    return torch.cat([x, e.expand_as(x)], -1) @ weights["timestep.merge.weight"].T + weights["timestep.merge.bias"]


def residual(g, previous, initial, weights, loop):
    config = loop.residual
    s = {"none": None, "previous": previous, "initial": initial}[config.source]
    if s is None:
        h = g
    elif config.mix == "add":
        h = g + config.scale * s
    else:
        alpha = weights["residual.gate"].sigmoid() if config.mix == "gated" else config.alpha
        h = alpha * g + (1 - alpha) * s
    return h / rms(h) * weights["residual.weight"] if config.norm else h


# -- divergence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("where", ["state", "layer"])
def test_a_row_that_breaks_down_decodes_its_last_good_state_and_leaves_its_neighbours_alone(
    kind, bad, at, where, monkeypatch
):
    made, row = tiny.reasoner(kind), 2
    settings = [{"max_iterations": 5, "criterion": "fixed"}] * 4
    requests = [tiny.request(made, p, s, trace=True) for p, s in zip(tiny.PROMPTS, settings, strict=False)]
    expected = generate(made, requests)
    (last_good,) = generate(made, [tiny.request(made, tiny.PROMPTS[row], {**settings[row], "max_iterations": at - 1})])

    now = {"t": 0}
    plain_update = LatentReasoner.update

    def broken_update(self, hidden, initial, t, run):
        now["t"] = t
        g, h = plain_update(self, hidden, initial, t, run)
        if t == at and where == "state":
            g, h = g.clone(), h.clone()
            g[row], h[row] = bad, bad
        now["t"] = 0
        return g, h

    def broken_layer(_module, _inputs, output):
        if now["t"] == at and where == "layer":
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[row] = bad
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        return None

    monkeypatch.setattr(LatentReasoner, "update", broken_update)
    layers = made.base.transformer.h if kind == "gpt2" else made.base.model.layers
    # The first layer's output is the second one's keys and values: they stay in the cache.
    layers[0].register_forward_hook(broken_layer)
    results = generate(made, requests)

    broken = results.pop(row)
    expected.pop(row)
    assert [facts(result) for result in results] == [facts(result) for result in expected]
    assert (broken.exit_reason, broken.iterations) == ("diverged", at)
    assert broken.token_ids == last_good.token_ids
    assert broken.stability.converged is False
    assert all(value is None or abs(value) < float("inf") for r in broken.records for value in numbers(r))


def numbers(record):
    return record.relative_change, record.cosine, record.norm, record.contraction, record.kl, record.entropy


# -- gradients -------------------------------------------------------------------------------------------


def test_gradients_reach_every_part(made):
    made = tiny.twin(made).train()
    for module in made.modules():  # GPT-2's dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    context = made.encode(*tiny.batch(tiny.PROMPTS[:4]))
    states = made.unroll(context, 3)
    tokens, present = tiny.batch([tiny.words(1, 2)] * 4)
    answer = made.answer(context, tokens, present.bool(), torch.ones(4, dtype=torch.bool))
    (made.head(states).logsumexp(-1).sum() + answer.logsumexp(-1).sum()).backward()
    assert states.shape == (4, 4, 32)
    without = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_gradients_are_those_of_the_function():
    # Finite differences in double precision, through adapters, timestep and gate (of the tiny models GPT-2 alone
    # computes in double throughout).
    made = tiny.reasoner("gpt2").double()
    parameters = {name: p for name, p in made.named_parameters() if p.requires_grad}
    chosen = [name for name in parameters if "lora_B.loop_02" in name or "gate" in name or "table" in name]
    input_ids, mask = tiny.batch(tiny.PROMPTS[:2])

    def value():
        return made.unroll(made.encode(input_ids, mask), 3).sin().sum()

    value().backward()
    for name in chosen[:2] + chosen[-2:]:
        parameter, step = parameters[name], 1e-6
        with torch.no_grad():
            at = int(parameter.grad.abs().argmax())
            flat = parameter.view(-1)
            flat[at] += step
            up = value()
            flat[at] -= 2 * step
            down = value()
            flat[at] += step
        slope = parameter.grad.view(-1)[at]
        assert float((up - down) / (2 * step)) == pytest.approx(float(slope), rel=1e-4), name

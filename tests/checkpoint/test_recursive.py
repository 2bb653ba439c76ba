"""``slr init --recursive``: a model's own layers as a loop."""

import copy

import pytest
import torch

from slr_core.checkpoint.init import Recursive, init_checkpoint
from slr_core.checkpoint.read import load_checkpoint
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.errors import ConfigError
from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from slr_core.types import Tokens
from tests import tiny
from tests.checkpoint.test_init import settings
from tests.engine.harness import SteppedCore, facts

KINDS = ("llama", "qwen2", "gpt2")
IDS = torch.tensor([tiny.ids(tiny.PROMPTS[3])])


def deep(kind="llama", layers=4):
    """A tiny base of four layers that differ in all they have: weights, biases and norms."""
    config = copy.deepcopy(tiny.base(kind).config)
    config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
    made = type(tiny.base(kind))(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, x in made.named_parameters():
            if x.dim() == 1 and not name.endswith(("q_norm.weight", "k_norm.weight")):
                x.add_(0.3 * torch.randn(x.shape, generator=generator))
    return made


def write(made, folder):
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def logits(made, iterations=None):
    """At every position of the prompt: the answer after its first token is the rest of it."""
    with torch.inference_mode():
        return made(IDS[:, :1], labels=IDS[:, 1:], iterations=iterations).logits[0]


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("llama", "average"),
        pytest.param("llama", "stepwise", marks=pytest.mark.slow),
        pytest.param("llama", "lower", marks=pytest.mark.slow),
        ("qwen2", "average"),
        ("gpt2", "average"),
    ],
)
def test_full_rank_is_the_original(kind, start, tmp_path):
    plain = deep(kind)
    with torch.inference_mode():
        expected = plain(IDS).logits[0, :-1]
    returned = init_checkpoint(write(plain, tmp_path / "plain"), tmp_path / "out", recursive=Recursive(2, start=start))
    made = load_checkpoint(LatentReasoner, tmp_path / "out")
    assert made.base.config.num_hidden_layers == 2
    for ours in (returned, made):
        torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(made, 1), expected, rtol=0.1, atol=0.1)
    # Its loop is on, and the engine computes the same.
    prompt = Tokens(tuple(IDS[0].tolist()))  # transformers makes the tokenizer of Qwen2 a byte-level one
    request = tiny.request(made, prompt)
    (result,) = generate(made, [request])
    assert result.iterations_per_token == (2,) * len(result.token_ids)
    written = plain.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=6)
    assert list(result.token_ids) == written[0, IDS.shape[1] :].tolist()
    stepped = SteppedCore(made, slots=2, capacity=128)
    others = [tiny.request(made, prompt, {"max_iterations": n, "min_iterations": 0}) for n in (0, 1)]
    futures = [stepped.submit(each) for each in (request, *others)]
    stepped.drain()
    assert [facts(future.result(0)) for future in futures] == [facts(x) for x in generate(made, [request, *others])]


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_the_error_falls_with_the_rank(kind, tmp_path):
    plain = deep(kind)
    source = write(plain, tmp_path / "plain")
    with torch.inference_mode():
        expected = plain(IDS).logits[0, :-1].log_softmax(-1)
    errors = []
    for rank in (1, 8, 24, 31):
        made = init_checkpoint(source, tmp_path / str(rank), recursive=Recursive(2, rank))
        found = logits(made).log_softmax(-1)
        errors.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_what_adapters_hold(tmp_path):
    """The best approximation of each matrix that was shared, and biases only where the original has some."""
    plain = deep()
    made = init_checkpoint(write(plain, tmp_path / "plain"), tmp_path / "out", recursive=Recursive(2, 3, "lower"))
    assert (tmp_path / "out" / "loops" / "loop_02" / "adapter_config.json").read_text().count('"lora_bias": false') == 1
    for name, module in made.base.model.layers[1].named_modules():
        if name.endswith("down_proj"):
            before = plain.model.layers[1].get_submodule(name).weight
            lost = (plain.model.layers[3].get_submodule(name).weight - before).detach()
            torch.testing.assert_close(module.base_layer.weight, before)
            left = lost - module.get_delta_weight("loop_02")
            assert torch.linalg.svdvals(left.detach())[0].item() == pytest.approx(
                float(torch.linalg.svdvals(lost)[3]), rel=1e-3
            )
            assert module.get_delta_weight("loop_01").abs().max() == 0
    assert made.config.trained
    assert "differs from the original" in (tmp_path / "out" / "README.md").read_text()


def test_norms_that_nothing_can_hold_are_named(tmp_path):
    plain = deep("qwen3")
    write(plain, tmp_path / "same")
    init_checkpoint(str(tmp_path / "same"), tmp_path / "exact", recursive=Recursive(2))
    assert "computes what the original computed" in (tmp_path / "exact" / "README.md").read_text()
    with torch.no_grad():
        plain.model.layers[0].self_attn.q_norm.weight[:4] = 2
    init_checkpoint(write(plain, tmp_path / "plain"), tmp_path / "out", recursive=Recursive(2))
    assert "share `self_attn.q_norm.weight`" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_shared_is_refused(tmp_path):
    source = write(deep(), tmp_path / "plain")
    with pytest.raises(ConfigError, match="divide the 4 layers, got 3"):
        init_checkpoint(source, tmp_path / "out", recursive=Recursive(3))
    with pytest.raises(ConfigError, match="workspace: a recursive model decides it"):
        init_checkpoint(source, tmp_path / "out", settings(tmp_path, "workspace: token"), recursive=Recursive(2))
    with pytest.raises(ConfigError, match="not of this gemma3_text"):
        init_checkpoint(write(tiny.base("gemma3"), tmp_path / "other"), tmp_path / "out", recursive=Recursive(2))
    assert not (tmp_path / "out").exists()


def test_a_bias_of_an_adapter_acts_in_its_rows_alone(tmp_path):
    made = init_checkpoint(write(deep("qwen2"), tmp_path / "plain"), tmp_path / "out", recursive=Recursive(2, 2))
    batch = LoraBatch(made.base)
    batch.set_adapters([(made.base, name) for name in ("loop_01", "loop_02")])
    layer = batch.layers["model.layers.0.self_attn.q_proj"]
    peft = made.base.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 1, 32)
    expected = [peft.base_layer(x[i]) for i in range(4)]
    for i, name in ((0, "loop_02"), (2, "loop_01"), (3, "loop_02")):
        expected[i] = expected[i] + peft.lora_B[name](peft.lora_A[name](x[i]))
    for method in ("masked", "grouped", "segments"):
        layer.method = method
        batch.use([1, None, 0, 1])
        torch.testing.assert_close(layer(x), torch.stack(expected), rtol=1e-5, atol=1e-5)

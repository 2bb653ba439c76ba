import json

import pytest
import torch

from slr_core import Engine
from slr_core.checkpoint.average import average_checkpoints
from slr_core.checkpoint.folder import DEFAULT_CHECKPOINT
from slr_core.checkpoint.init import init_checkpoint
from slr_core.checkpoint.publish import publish_checkpoint
from slr_core.checkpoint.write import save_checkpoint
from slr_core.errors import CheckpointError, ConfigError
from slr_core.evaluation.run import identify_model
from slr_core.reasoner import LatentReasoner
from tests import tiny


def saved(folder, seed, loop=None):
    reasoner = tiny.reasoner(loop=loop)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reasoner.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_checkpoint(reasoner, folder)
    return reasoner.state_dict()


def test_mean(tmp_path):
    states = [saved(tmp_path / str(seed), seed) for seed in range(3)]
    average_checkpoints([str(tmp_path / str(seed)) for seed in range(3)], tmp_path / "mean")
    written = LatentReasoner.from_pretrained(str(tmp_path / "mean")).state_dict()
    for key, value in written.items():
        torch.testing.assert_close(value, sum(state[key] for state in states) / 3)
    card = (tmp_path / "mean" / "README.md").read_text()
    assert "# mean\n" in card
    for seed in range(3):
        assert f"| `{seed}` | `{identify_model(str(tmp_path / str(seed)))['sha256']}` |" in card


def test_same_twice(tmp_path):
    """The mean of a checkpoint with itself is that checkpoint, to the last bit."""
    average_checkpoints(["prosqa", "prosqa"], tmp_path / "mean")
    before, after = (LatentReasoner.from_pretrained(name).state_dict() for name in ("prosqa", str(tmp_path / "mean")))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "mean/examples.json").read_bytes() == (DEFAULT_CHECKPOINT / "examples.json").read_bytes()
    prompt = "Max is a impus. Every impus is a rompus. Is Max a rompus or lempus?"
    with Engine.from_pretrained(str(tmp_path / "mean")) as engine:
        assert engine.generate(prompt)[0].text == "Max is a rompus."


def test_a_common_base_is_referred_to(package, tmp_path):
    (tmp_path / "loop.yaml").write_text("lora: {kind: shared, covers: all, rank: 2}\n")
    made = init_checkpoint("smollm2", tmp_path / "made", tmp_path / "loop.yaml")
    factors = [p for key, p in made.base.named_parameters() if ".lora_B" in key]
    for value in (1.0, 3.0):
        with torch.no_grad():
            for factor in factors:
                factor.fill_(value)
        save_checkpoint(made, tmp_path / "run")
        publish_checkpoint(str(tmp_path / "run"), tmp_path / f"to{value:.0f}", "smollm2")
    average_checkpoints([str(tmp_path / "to1"), str(tmp_path / "to3")], tmp_path / "mean")
    assert not (tmp_path / "mean/base").exists()
    before, after = (LatentReasoner.from_pretrained(str(tmp_path / name)) for name in ("to1", "mean"))
    assert before.config.base_sha256 == after.config.base_sha256 is not None
    assert all((p == 2.0).all() for key, p in after.base.named_parameters() if ".lora_B" in key)


def test_half_precision(tmp_path):
    """The sum is not taken in half precision, where it would overflow."""
    for seed in range(2):
        reasoner = tiny.reasoner().to(torch.float16)
        with torch.no_grad():
            reasoner.base.get_input_embeddings().weight.fill_(60000.0)
        save_checkpoint(reasoner, tmp_path / str(seed))
    average_checkpoints([str(tmp_path / "0"), str(tmp_path / "1")], tmp_path / "mean")
    mean = LatentReasoner.from_pretrained(str(tmp_path / "mean"))
    assert mean.base.dtype == torch.float16
    assert (mean.base.get_input_embeddings().weight == 60000.0).all()


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ({"workspace": "block"}, r'loop\.workspace is "block" in .*/b and "append" in .*/a'),
        ({"lora": {"rank": 3}}, r"loop\.lora\.rank is 3 in"),
    ],
)
def test_another_loop(tmp_path, loop, message):
    saved(tmp_path / "a", 0)
    saved(tmp_path / "b", 0, loop)
    with pytest.raises(ConfigError, match=message):
        average_checkpoints([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("base/config.json", {"rms_norm_eps": 0.5}, r"base\.rms_norm_eps is 0\.5 in"),
        ("loops/loop_01/adapter_config.json", {"lora_alpha": 64}, r"adapters\.loop_01\.lora_alpha is 64 in"),
        ("slr_config.json", {"trained": False}, r"trained is false in"),
    ],
)
def test_another_computation(tmp_path, file, edit, message):
    for name in "ab":
        saved(tmp_path / name, 0)
    path = tmp_path / "b" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(ConfigError, match=message):
        average_checkpoints([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "mean")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, r"tokenizer\.normalizer is .*Lowercase.* in .*/b and null in"),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, r'tokenizer\.pre_tokenizer\.type is "BertPreTokenizer" in'),
        ({"decoder": {"type": "Fuse"}}, r"tokenizer\.decoder is .*Fuse"),
    ],
)
def test_another_tokenizer(tmp_path, edit, message):
    for name in "ab":
        saved(tmp_path / name, 0)
    tiny.edit_json(tmp_path / "b/tokenizer.json", **edit)
    with pytest.raises(ConfigError, match=message):
        average_checkpoints([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "mean")


def test_another_chat_template_is_allowed(tmp_path):
    for name in "ab":
        saved(tmp_path / name, 0)
    (tmp_path / "b/chat_template.jinja").write_text("{{ messages[0].content }}")
    average_checkpoints([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "mean")
    assert not (tmp_path / "mean/chat_template.jinja").exists()


def test_long_settings_are_shortened(tmp_path):
    for name, decode in (("a", False), ("b", True)):
        save_checkpoint(tiny.reasoner(decode=decode), tmp_path / name)
    with pytest.raises(ConfigError, match=r"adapters\.decode is .* \.\.\. in .*/b and null in") as caught:
        average_checkpoints([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "mean")
    assert len(str(caught.value)) < 300 + 4 * len(str(tmp_path))


def test_when_the_loop_stops_may_differ(tmp_path):
    saved(tmp_path / "a", 0)
    saved(tmp_path / "b", 1, {"convergence": {"threshold": 0.125}, "max_iterations": 5, "min_iterations": 2})
    average_checkpoints([str(tmp_path / "b"), str(tmp_path / "a")], tmp_path / "mean")
    loop = LatentReasoner.from_pretrained(str(tmp_path / "mean")).config.loop
    assert (loop.convergence.threshold, loop.max_iterations, loop.min_iterations) == (0.125, 5, 2)


def test_another_number_format(tmp_path):
    saved(tmp_path / "a", 0)
    save_checkpoint(tiny.reasoner().to(torch.bfloat16), tmp_path / "b")
    with pytest.raises(ConfigError, match=r'weights\..* is "torch\.bfloat16 .* and "torch\.float32'):
        average_checkpoints([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "mean")


def test_another_base(tmp_path):
    saved(tmp_path / "a", 0)
    with pytest.raises(ConfigError, match="cannot be averaged"):
        average_checkpoints([str(tmp_path / "a"), "prosqa"], tmp_path / "mean")


def test_an_output_inside_of_a_checkpoint_is_refused(tmp_path):
    saved(tmp_path / "a", 0)
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(ConfigError, match=r"inside: expected a folder outside of .*a, which is read"):
        average_checkpoints(["prosqa", str(tmp_path / "a")], tmp_path / "link/new/inside")
    assert not (tmp_path / "a/new").exists()


def test_an_unreadable_file_of_a_checkpoint_is_named(tmp_path):
    saved(tmp_path / "a", 0)
    (tmp_path / "a/examples.json").mkdir()
    with pytest.raises(CheckpointError, match=r"a/examples\.json"):
        average_checkpoints([str(tmp_path / "a"), str(tmp_path / "a")], tmp_path / "mean")


def test_refused(tmp_path):
    with pytest.raises(ConfigError, match="models: expected two or more checkpoints, got prosqa"):
        average_checkpoints(["prosqa"], tmp_path / "mean")
    with pytest.raises(CheckpointError):
        average_checkpoints(["prosqa", str(tmp_path / "nothing")], tmp_path / "mean")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="empty"):
        average_checkpoints(["prosqa", "prosqa"], tmp_path / "full")

import pytest
import torch

from slr_core import Engine
from slr_core.checkpoint.average import average_checkpoints
from slr_core.checkpoint.write import save_checkpoint
from slr_core.errors import CheckpointError, ConfigError
from slr_core.reasoner import LatentReasoner
from tests import tiny


def saved(folder, seed, loop=None):
    torch.manual_seed(seed)
    reasoner = tiny.reasoner(loop=loop)
    with torch.no_grad():
        for parameter in reasoner.parameters():
            parameter.copy_(torch.randn_like(parameter))
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
    assert "`0`, `1`, `2`" in card


def test_same_twice(tmp_path):
    """The mean of a checkpoint with itself is that checkpoint, to the last bit."""
    average_checkpoints(["prosqa", "prosqa"], tmp_path / "mean")
    before, after = (LatentReasoner.from_pretrained(name).state_dict() for name in ("prosqa", str(tmp_path / "mean")))
    assert all(torch.equal(before[key], after[key]) for key in before)
    prompt = "Max is a impus. Every impus is a rompus. Is Max a rompus or lempus?"
    with Engine.from_pretrained(str(tmp_path / "mean")) as engine:
        assert engine.generate(prompt)[0].text == "Max is a rompus."


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
        ({"workspace": "block"}, r"settings loop\.workspace differ"),
        ({"lora": {"rank": 3}}, r"settings loop\.lora differ"),
    ],
)
def test_another_loop(tmp_path, loop, message):
    saved(tmp_path / "a", 0)
    saved(tmp_path / "b", 0, loop)
    with pytest.raises(ConfigError, match=message):
        average_checkpoints([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_another_base(tmp_path):
    saved(tmp_path / "a", 0)
    with pytest.raises(ConfigError, match="cannot be averaged"):
        average_checkpoints([str(tmp_path / "a"), "prosqa"], tmp_path / "mean")


def test_refused(tmp_path):
    with pytest.raises(ConfigError, match="two or more"):
        average_checkpoints(["prosqa"], tmp_path / "mean")
    with pytest.raises(CheckpointError):
        average_checkpoints(["prosqa", str(tmp_path / "nothing")], tmp_path / "mean")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="empty"):
        average_checkpoints(["prosqa", "prosqa"], tmp_path / "full")

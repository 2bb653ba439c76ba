"""Export: what is written can be imported again, and is then the same."""

import shlex

import pytest
import torch

from slr_core.checkpoint.importers import Import, import_checkpoint
from slr_core.checkpoint.importers.export import export_checkpoint
from slr_core.checkpoint.importers.peer import ImportOptions
from slr_core.checkpoint.read import load_checkpoint
from slr_core.errors import ConfigError
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.checkpoint.importers import published

LENGTHS = {"coconut": ImportOptions(latents=3), "lotus": ImportOptions(latents=6, iterations=3)}


def imported(peer, made, out):
    import_checkpoint(Import(peer, str(made.checkpoint), str(made.base), out, LENGTHS[peer]))
    return load_checkpoint(LatentReasoner, out)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("peer", "form"), [("coconut", "coconut"), ("coconut", "hf"), ("lotus", "hf")])
def test_import_of_the_export(peer, form, kind, tmp_path, run):
    """The command that the export prints gives the same config, tokenizer and weights."""
    first = imported(peer, published.coconut(tmp_path, kind), tmp_path / "first")
    code, out, err = run("export", "--model", tmp_path / "first", "--to", form, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    command = shlex.split(out.splitlines()[-1].replace("DIR", str(tmp_path / "again")))
    assert run(*command[1:])[0] == 0
    again = load_checkpoint(LatentReasoner, tmp_path / "again")
    assert again.config == first.config
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert again.state_dict().keys() == first.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


REFUSED = {
    "adapters": (lambda made: tiny.reasoner(), r"loop\.\w+ cannot be expressed"),
    "projection": (lambda made: change(made, loop={"projection": {"kind": "rms_match"}}), r"loop\.projection"),
    "elastic": (lambda made: change(made, loop={"min_iterations": 1}), r"loop\.min_iterations"),
    "text": (lambda made: change(made, text={"prompt_prefix": "w1 "}), r"text\.prompt_prefix"),
}


def change(made, **changes):
    made.config = made.config.replace(**changes)
    return made


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    """What the form cannot express is named, and nothing is written."""
    edit, message = REFUSED[case]
    made = edit(imported("coconut", published.coconut(tmp_path), tmp_path / "first"))
    made.save_pretrained(str(tmp_path / "changed"))
    with pytest.raises(ConfigError, match=message):
        export_checkpoint(str(tmp_path / "changed"), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_lotus_vectors(tmp_path):
    """Latent vectors that are not the latent token's row cannot be expressed; nor can a block be Coconut's."""
    made = imported("lotus", published.coconut(tmp_path), tmp_path / "first")
    with pytest.raises(ConfigError, match="--to hf"):
        export_checkpoint(str(tmp_path / "first"), tmp_path / "out", "coconut")
    with torch.no_grad():
        made.workspace.vectors[0] += 1
    made.save_pretrained(str(tmp_path / "changed"))
    with pytest.raises(ConfigError, match="the latent vectors"):
        export_checkpoint(str(tmp_path / "changed"), tmp_path / "out", "hf")


def test_an_output_inside_of_the_checkpoint_is_refused(tmp_path):
    imported("coconut", published.coconut(tmp_path), tmp_path / "first")
    with pytest.raises(ConfigError, match=r"expected a folder outside of .*first"):
        export_checkpoint(str(tmp_path / "first"), tmp_path / "first/inside", "hf")

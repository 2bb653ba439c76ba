"""LOTUS: a block of latent positions, refined in place with the latent token's embedding added in every pass."""

import pytest
import torch

from slr_core.checkpoint.importers import Import, import_checkpoint
from slr_core.checkpoint.importers.peer import ImportOptions
from slr_core.checkpoint.read import load_checkpoint
from slr_core.errors import SLRError
from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.checkpoint.importers import plain, published
from tests.checkpoint.importers.test_coconut import states


def load(made, out, **options):
    chosen = ImportOptions(**{"latents": 6, "iterations": 3, **options})
    import_checkpoint(Import("lotus", str(made.checkpoint), str(made.base), out, chosen))
    return load_checkpoint(LatentReasoner, out, dtype=torch.float64)


def as_folder(made, folder, *, markers):
    """The published form: a transformers folder whose tokenizer may have the three tokens."""
    made.model.save_pretrained(folder)
    words = tiny.tokenizer().__class__.from_pretrained(made.base)
    if markers:
        words.add_tokens(list(published.COCONUT))
    words.save_pretrained(folder)
    made.checkpoint = folder


@pytest.mark.parametrize("form", ["pickle", "with markers", "without markers"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_same_as_plain(kind, form, tmp_path):
    """States and tokens are those of plain transformers calls, in float64."""
    made = published.coconut(tmp_path, kind, {"ia_decoder.x": torch.zeros(2)})
    if form != "pickle":
        as_folder(made, tmp_path / "hf", markers=form == "with markers")
    ours, model = load(made, tmp_path / "out"), made.model.double()
    vector = model.get_input_embeddings().weight[made.vocab + 2]
    for text in tiny.PROMPTS[:3]:
        prompt, request = made.prompt(text, 0), tiny.request(ours, text, max_new_tokens=8)
        assert list(request.prompt_ids) == prompt
        embeds, passes = plain.refined(model, prompt, vector, 6, 3)
        found = states(ours, prompt)
        torch.testing.assert_close(found[1:] - found[0], passes[:-1], rtol=0, atol=1e-9)
        (result,) = generate(ours, [request])
        assert list(result.token_ids) == plain.write(model, embeds, [made.vocab + 1], 8, tiny.EOS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": None}, "--iterations is needed: the number of loops"),
        ({"latents": None}, "--latents is needed: all latent positions"),
        ({"latents": 7}, r"--latents must be a multiple of --iterations \(3\), got 7"),
        ({"latents": 1026}, "block_size"),
        ({"lora_alpha": 2.0}, "--lora-alpha says nothing"),
    ],
)
def test_options(options, message, tmp_path):
    with pytest.raises(SLRError, match=message):
        load(published.coconut(tmp_path), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_empty_config(tmp_path):
    made = published.coconut(tmp_path)
    as_folder(made, tmp_path / "hf", markers=True)
    (tmp_path / "hf" / "config.json").write_text("")
    with pytest.raises(SLRError, match="not readable as JSON"):
        load(made, tmp_path / "out")

import pytest
import torch
import torch.nn.functional as F

from slr_core.config import LatentDecoderConfig
from slr_core.errors import ConfigError
from slr_core.loop.latent_decoder import LatentDecoder
from tests import tiny

SMALL = {"hidden_size": 16, "layers": 2, "heads": 2}


def decoder(size=12, **config):
    torch.manual_seed(0)
    return LatentDecoder(LatentDecoderConfig(**{**SMALL, **config}), size).eval()


def inputs(rows=2, states=3, tokens=4, size=12):
    generator = torch.Generator().manual_seed(1)
    memory, embeds = (torch.randn(rows, n, size, generator=generator) for n in (states, tokens))
    return memory, torch.ones(rows, states, dtype=torch.bool), embeds


@pytest.mark.parametrize("tokens", [0, 1, 4])
@pytest.mark.parametrize("states", [1, 3])
def test_a_state_for_the_start_and_for_each_token(states, tokens):
    assert decoder()(*inputs(states=states, tokens=tokens)).shape == (2, tokens + 1, 12)


def test_a_later_token_changes_no_earlier_state():
    made, (memory, present, embeds) = decoder(), inputs()
    changed = embeds.clone()
    changed[:, 2] += 1.0
    with torch.no_grad():
        before, after = made(memory, present, embeds), made(memory, present, changed)
        shorter = made(memory, present, embeds[:, :2])
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    torch.testing.assert_close(before[:, :3], shorter, rtol=1e-5, atol=1e-5)
    assert all((before[:, i] - after[:, i]).abs().max() > 1e-3 for i in (3, 4))


@pytest.mark.parametrize("filler", [0.0, 7.0, 1e4])
def test_padding_of_the_memory_does_not_matter(filler):
    made, (memory, present, embeds) = decoder(), inputs()
    padded = torch.cat([memory, torch.full((2, 2, 12), filler)], dim=1)
    seen = torch.cat([present, torch.zeros(2, 2, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(made(padded, seen, embeds), made(memory, present, embeds), rtol=1e-5, atol=1e-5)
        assert (made(padded, ~seen, embeds) - made(memory, present, embeds)).abs().max() > 1e-4


def test_states_and_order_matter():
    made, (memory, present, embeds) = decoder(), inputs()
    with torch.no_grad():
        whole = made(memory, present, embeds)
        assert (made(memory.flip(1), present, embeds) - whole).abs().max() > 1e-4
        assert (made(-memory, present, embeds) - whole).abs().max() > 1e-3
        torch.testing.assert_close(made(50 * memory, present, embeds), whole, rtol=1e-3, atol=1e-4)


def test_rows_do_not_see_each_other():
    made, (memory, present, embeds) = decoder(), inputs(rows=3)
    with torch.no_grad():
        together = made(memory, present, embeds)
        for row in range(3):
            alone = made(memory[[row]], present[[row]], embeds[[row]])
            torch.testing.assert_close(together[[row]], alone, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_weight_the_states_and_the_tokens():
    made, (memory, present, embeds) = decoder(), inputs()
    memory.requires_grad_()
    embeds.requires_grad_()
    made(memory, present, embeds).square().sum().backward()
    still = [name for name, p in made.named_parameters() if not p.grad.abs().sum() > 0]
    assert still == []
    assert memory.grad.abs().sum() > 0
    assert (embeds.grad.abs().sum(-1) > 0).all()


def test_the_result_has_the_dtype_of_the_states():
    memory, present, embeds = inputs()
    assert decoder().bfloat16()(memory.bfloat16(), present, embeds.bfloat16()).dtype == torch.bfloat16


def test_its_size_does_not_depend_on_the_vocabulary():
    made = decoder(size=64)
    assert all(len(tiny.WORDS) not in p.shape for p in made.parameters())


# -- in a reasoner ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner(loop={"decoder": {"latent_decoder": SMALL}})


def test_tokens_come_in_by_the_embeddings_and_leave_by_the_head(made):
    memory, present = torch.randn(2, 3, 32), torch.ones(2, 3, dtype=torch.bool)
    ids = torch.tensor([[4, 5], [6, 7]])
    with torch.no_grad():
        logits = made.decode_latent(memory, present, ids)
        expected = made.head(made.decoder(memory, present, made.embed(ids)))
    assert logits.shape == (2, 3, len(tiny.WORDS))
    assert torch.equal(logits, expected)


def test_a_model_without_one_says_so():
    with pytest.raises(ConfigError, match="no latent decoder"):
        tiny.reasoner().decode_latent(torch.zeros(1, 1, 32), torch.ones(1, 1, dtype=torch.bool), torch.tensor([[3]]))


def test_it_learns_to_put_a_state_into_words():
    # Each of eight states has two words of its own; the states are the model's, and only the decoder learns.
    made = tiny.reasoner(loop={"decoder": {"latent_decoder": SMALL}})
    with torch.no_grad():
        states = made.unroll(made.encode(*tiny.batch(tiny.PROMPTS)), 2)[:, -1]
    present = torch.ones(8, 1, dtype=torch.bool)
    words = torch.stack([3 + torch.arange(8), 20 + torch.arange(8).flip(0), torch.full((8,), tiny.EOS)], dim=1)

    def loss():
        return F.cross_entropy(made.decode_latent(states, present, words[:, :-1]).transpose(1, 2), words)

    made.requires_grad_(False)
    made.decoder.requires_grad_(True)
    optimizer = torch.optim.Adam(made.decoder.parameters(), lr=5e-3)
    first = loss().item()
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.05 < 1 < first
    written = torch.zeros(8, 0, dtype=torch.long)
    with torch.no_grad():
        for _ in range(3):
            logits = made.decode_latent(states, present, written)[:, -1]
            written = torch.cat([written, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written, words)

"""``LatentReasoner.forward`` and ``LatentReasoner.generate`` against the base model and against each other."""

import pytest
import torch
import torch.nn.functional as F

from slr_core.errors import RequestError
from slr_core.params import LoopParams, SamplingParams
from tests import tiny

KINDS = ("llama", "qwen2", "gpt2")
ANSWERS = torch.tensor([[3, 9, 27], [20, 5, -100], [7, -100, -100], [30, 31, 32]])
T = 4
FIXED = LoopParams(max_iterations=T, criterion="fixed")
SPOKEN = {"decoder": {"answers": "latent_decoder", "latent_decoder": tiny.LATENT_DECODER}}


@pytest.fixture(scope="module")
def made():
    found = {}

    def get(kind="llama", workspace="append", loop=None, **options):
        key = (kind, workspace, str(loop), str(options))
        if key not in found:
            found[key] = tiny.reasoner(kind, {**tiny.WORKSPACES[workspace], **(loop or {})}, **options)
        return found[key]

    return get


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_iterations_it_is_the_base_model(made, kind, workspace, side):
    ids, mask = tiny.batch(tiny.PROMPTS[:4], side)
    with torch.no_grad():
        output = made(kind, workspace, decode=True)(ids, mask, ANSWERS, iterations=0)
        plain = tiny.base(kind)
        for row, prompt in enumerate(tiny.PROMPTS[:4]):
            prompt_ids, answer = tiny.ids(prompt), ANSWERS[row][ANSWERS[row] >= 0]
            whole = torch.tensor([[*prompt_ids, *answer.tolist()]])
            expected = plain(input_ids=whole).logits[0, len(prompt_ids) - 1 : -1]
            torch.testing.assert_close(output.logits[row, : len(answer)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"decode": True}, {"loop": SPOKEN}], ids=["head", "decode", "latent"])
@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_its_logits_choose_the_tokens_of_generate(made, kind, workspace, options):
    model = made(kind, workspace, **options)
    ids, mask = tiny.batch(tiny.PROMPTS)
    results = model.generate(ids, mask, loop_params=FIXED, max_new_tokens=5)
    labels = [[*result.token_ids, *[-100] * (5 - len(result.token_ids))] for result in results]
    with torch.no_grad():
        chosen = model(ids, mask, torch.tensor(labels), iterations=T).logits.argmax(-1)
    for result, row in zip(results, chosen.tolist(), strict=True):
        assert tuple(row[: len(result.token_ids)]) == result.token_ids
    assert len({result.token_ids for result in results}) > 1, "answers that are all alike would prove nothing"


@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_part_of_the_loop(kind, workspace):
    loop = {"residual": {"mix": "gated"}, "projection": {"kind": "linear"}}
    model = tiny.reasoner(kind, {**tiny.WORKSPACES[workspace], **loop}).train()
    ids, mask = tiny.batch(tiny.PROMPTS[:4])
    model(ids, mask, ANSWERS, iterations=3).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_loss_and_states(made):
    model = made()
    ids, mask = tiny.batch(tiny.PROMPTS[:4])
    with torch.no_grad():
        output = model(ids, mask, ANSWERS, iterations=T)
        states = model.unroll(model.encode(ids, mask), T)
    assert output.loss == F.cross_entropy(output.logits[ANSWERS >= 0], ANSWERS[ANSWERS >= 0])
    assert output.states.shape == (4, T + 1, 1, 32)
    assert torch.equal(output.states, states)
    assert output[0] is output["loss"] is output.loss


def test_defaults(made):
    model = made()
    ids, mask = tiny.batch([tiny.PROMPTS[1]])
    with torch.no_grad():
        output = model(ids)
        expected = model(ids, mask, ANSWERS[:1], iterations=model.config.loop.max_iterations)
    assert output.loss is None
    assert output.logits.shape == (1, 1, len(tiny.WORDS))
    torch.testing.assert_close(output.logits, expected.logits[:, :1])
    torch.testing.assert_close(output.states, expected.states)


def test_past_the_last_trained_iteration():
    model = tiny.reasoner(loop={"lora": {"past_end": "error"}, "max_iterations": 3})
    with pytest.raises(RequestError, match="last trained iteration"):
        model(*tiny.batch(tiny.PROMPTS[:2]), iterations=4)


def test_generate_takes_texts_and_ids(made):
    model = made(text={"prompt_prefix": "w7 "})
    texts = list(tiny.PROMPTS[:3])
    results = model.generate(texts, loop_params=FIXED, max_new_tokens=3)
    (alone,) = model.generate(texts[1], loop_params=FIXED, max_new_tokens=3)
    raw = model.generate(*tiny.batch([f"w7 {text}" for text in texts]), loop_params=FIXED, max_new_tokens=3)
    assert alone.token_ids == results[1].token_ids
    assert [r.token_ids for r in results] == [r.token_ids for r in raw]
    assert [r.prompt_tokens for r in results] == [len(tiny.ids(text)) + 1 for text in texts]
    (same,) = model.generate(tiny.batch([f"w7 {texts[1]}"])[0], loop_params=FIXED, max_new_tokens=3)
    assert same.token_ids == alone.token_ids


def test_generate_passes_its_settings_on(made):
    model, prompt = made(), tiny.PROMPTS[1]
    (result,) = model.generate(prompt, max_new_tokens=2, trace=True, top_tokens=3)
    assert (len(result.token_ids), len(result.records[0].top_tokens)) == (2, 3)
    assert model.generate(prompt, loop_params=LoopParams(max_iterations=0))[0].iterations == 0
    params = SamplingParams(temperature=2.0, seed=3)
    one, other = (model.generate(prompt, sampling_params=params)[0] for _ in range(2))
    assert one.token_ids == other.token_ids != model.generate(prompt)[0].token_ids

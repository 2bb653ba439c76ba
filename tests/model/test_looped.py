import math

import pytest
import torch

from slr_core.checkpoint.read import load_weights
from slr_core.errors import RequestError
from slr_core.generation.reference import generate
from slr_core.model import adapted
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams
from tests import tiny

WORKSPACES = ("append", "block", "prompt")
END = 7


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner()


def settings(made, **loop):
    return LoopParams(**loop).resolve(made.config)


def run(made, prompts, *loops, **options):
    with torch.no_grad():
        return loop_until_exit(
            made, made.encode(*tiny.batch(prompts)), [settings(made, **loop) for loop in loops], **options
        )


# -- records ---------------------------------------------------------------------------------------------


def of(workspace, **loop):
    return tiny.reasoner(loop={"workspace": workspace, "block_size": 3, "halting_head": True, **loop})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_records_are_measured_on_the_states(workspace, side):
    made = of(workspace)
    fixed = LoopParams(max_iterations=4, criterion="fixed").resolve(made.config)
    with torch.no_grad():
        # Beside a longer row, so that there is padding.
        context = made.encode(*tiny.batch([tiny.PROMPTS[1], tiny.PROMPTS[3]], side))
        output = loop_until_exit(made, context, [fixed] * 2, read_head=True)
        h, records = output.states[0], output.records[0]
        alpha, log_p = made.residual.gate.sigmoid(), made.head(h[:, -1]).log_softmax(-1)
    width = {"append": 1, "block": 3, "prompt": 5}[workspace]
    assert h.shape == (5, width, 32)
    assert [record.t for record in records] == [1, 2, 3, 4]
    assert [record.adapter for record in records] == ["loop_01", "loop_02", "loop_03", "loop_03"]
    first = 1 if workspace == "append" else 2  # h_0 may be an input: nothing compares with it
    steps = {}
    for t, record in enumerate(records, start=1):
        assert record.norm == pytest.approx(h[t].norm().item(), rel=1e-4)
        assert record.entropy == pytest.approx(-(log_p[t].exp() * log_p[t]).sum().item(), rel=1e-3)
        assert record.duration_s >= 0
        if t < first:
            assert record.relative_change is record.cosine is record.contraction is record.kl is None
            continue
        g = (h[t] - (1 - alpha) * h[t - 1]) / alpha  # the `previous` residual: what moved is g
        steps[t] = (g - h[t - 1]).norm().item()
        assert record.relative_change == pytest.approx(steps[t] / h[t - 1].norm().item(), rel=1e-3)
        cosine = torch.cosine_similarity(g.flatten(), h[t - 1].flatten(), dim=0).item()
        assert record.cosine == pytest.approx(1 - cosine, rel=1e-3)
        assert record.contraction == (None if t == first else pytest.approx(steps[t] / steps[t - 1], rel=1e-3))
        kl = (log_p[t - 1].exp() * (log_p[t - 1] - log_p[t])).sum().item()
        assert record.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    contractions = [record.contraction for record in records if record.t > first]
    rate = math.prod(contractions) ** (1 / len(contractions))
    assert output.stability[0].contraction_rate == pytest.approx(rate, rel=1e-4)
    assert output.durations_s[0] >= 0.999 * sum(record.duration_s for record in records)


@pytest.mark.parametrize("source", ["none", "initial"])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_compared_state_without_residual(source, workspace):
    made = of(workspace, residual={"source": source})
    output = run(made, [tiny.PROMPTS[1]], {"max_iterations": 3, "criterion": "fixed"})
    h = output.states[0]
    measured = [record for record in output.records[0] if record.relative_change is not None]
    assert len(measured) == (3 if workspace == "append" else 2)
    for record in measured:
        before, after = h[record.t - 1], h[record.t]
        assert record.relative_change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_top_tokens_are_the_heads_likeliest_at_the_last_position(workspace):
    made = of(workspace)
    output = run(made, tiny.PROMPTS[1:4], *[{"max_iterations": 2, "criterion": "fixed"}] * 3, top_tokens=3)
    for states, records in zip(output.states, output.records, strict=True):
        for state, record in zip(states[1:], records, strict=True):
            top = made.head(state[-1]).softmax(-1).topk(3)
            assert [token for token, _ in record.top_tokens] == [tiny.WORDS[i] for i in top.indices]
            assert [p for _, p in record.top_tokens] == pytest.approx(top.values.tolist(), rel=1e-4)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_a_limit_cycle_is_told(workspace, monkeypatch):
    made = of(workspace, residual={"source": "none"})
    iterate = made.workspace.run

    def flip(model, context, u, active, t):
        iterate(model, context, u, active, t)
        flip.sign = -flip.sign
        return torch.ones_like(u) + 0.5 * flip.sign

    flip.sign = 1
    monkeypatch.setattr(made.workspace, "run", flip)
    if workspace == "block":
        with torch.no_grad():
            made.workspace.vectors.fill_(1.5)  # h_2: but an input is no state to come back to
    # h_1 is the first state of the cycle: h_3 and h_4 come back.
    for most in (3, 4, 5):
        fixed = {"max_iterations": most, "criterion": "fixed"}
        summaries = run(made, tiny.PROMPTS[1:3], fixed, fixed).stability
        assert [summary.oscillating for summary in summaries] == [most > 3] * 2


def test_more_top_tokens_than_the_vocabulary_are_the_vocabulary(made):
    output = run(made, [tiny.PROMPTS[1]], {"max_iterations": 1}, top_tokens=10_000)
    assert len(output.records[0][0].top_tokens) == len(tiny.WORDS)


def test_the_head_is_not_read_unless_asked(made):
    output = run(made, [tiny.PROMPTS[1]], {"max_iterations": 2, "criterion": "fixed"})
    assert all(r.kl is None and r.entropy is None and r.top_tokens == () for r in output.records[0])


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize(
    "criterion", ["relative_change", "cosine", "kl", "entropy_change", "argmax_stable", "end_token"]
)
def test_the_recorded_criterion_explains_the_exit(workspace, criterion):
    made = of(workspace, convergence={"end_token_id": END})
    first = 1 if workspace == "append" or criterion == "end_token" else 2
    threshold = {"relative_change": 0.8, "cosine": 0.3, "kl": 0.3, "entropy_change": 0.2, "argmax_stable": 0.5}
    threshold["end_token"] = 0.98
    loop = {"max_iterations": 12, "criterion": criterion, "threshold": threshold[criterion]}
    output = run(made, tiny.PROMPTS, *[loop] * len(tiny.PROMPTS), read_head=True)
    reasons = set()
    for states, records, reason in zip(output.states, output.records, output.exit_reasons, strict=True):
        log_p = made.head(states[:, -1]).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        values = {
            "relative_change": [r.relative_change for r in records],
            "cosine": [r.cosine for r in records],
            "kl": [r.kl for r in records],
            "entropy_change": (entropy[1:] - entropy[:-1]).abs().tolist(),
            "argmax_stable": (log_p.argmax(-1)[1:] != log_p.argmax(-1)[:-1]).float().tolist(),
            "end_token": (1 - log_p[1:, END].exp()).tolist(),
        }[criterion]
        below = [t >= first and value < threshold[criterion] for t, value in enumerate(values, start=1)]
        assert not any(below[:-1])
        assert below[-1] == (reason == "converged")
        reasons.add(reason)
    assert "converged" in reasons


# -- exits in a batch ------------------------------------------------------------------------------------


def test_a_finished_row_is_left_as_it_was(made):
    loops = [{"max_iterations": n, "criterion": "fixed"} for n in (1, 6, 3)]
    output = run(made, tiny.PROMPTS[:3], *loops)
    assert output.iterations == output.kept_iterations == [1, 6, 3]
    context = output.context
    for row, (prompt, iterations) in enumerate(zip(tiny.PROMPTS[:3], (1, 6, 3), strict=True)):
        length = len(tiny.ids(prompt))
        torch.testing.assert_close(context.hidden[row], output.states[row][-1], rtol=0, atol=0)
        assert int(context.next_position[row]) == length + iterations
        assert int(context.visible[row].sum()) == length + iterations


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_an_inactive_row_stays_as_it_is(workspace):
    made = of(workspace, timestep={"noise_level": True})
    with torch.no_grad():
        context = made.encode(*tiny.batch(tiny.PROMPTS[:2]))
        made.iterate(context, 1)
        before, positions, change = context.hidden, context.next_position, context.change
        g, h = made.iterate(context, 2, torch.tensor([True, False]))
    assert torch.equal(h[1], before[1])
    assert not torch.equal(h[0], before[0])
    assert torch.equal(context.hidden, h)
    assert (context.next_position - positions).tolist() == [int(workspace == "append"), 0]
    assert g.shape == h.shape
    torch.testing.assert_close(context.change[1], change[1], equal_nan=True)
    assert context.change[0].isfinite()


def test_as_many_settings_as_rows(made):
    with pytest.raises(RequestError, match="loop parameters for 2 rows, got 1"):
        run(made, tiny.PROMPTS[:2], {})


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_a_fork_and_its_origin_do_not_see_each_other(workspace):
    made = of(workspace)
    with torch.inference_mode():
        origin = made.encode(*tiny.batch(tiny.PROMPTS[:2]))
        fork = origin.fork()
        first = made.unroll(origin, 3)
        second = made.unroll(fork, 3)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_unrolling_is_the_loop_without_exits(workspace):
    made = of(workspace)
    with torch.inference_mode():
        context = made.encode(*tiny.batch(tiny.PROMPTS[:3]))
        states = made.unroll(context, 4)
    output = run(made, tiny.PROMPTS[:3], *[{"max_iterations": 4, "criterion": "fixed"}] * 3)
    for row, expected in enumerate(output.states):
        torch.testing.assert_close(states[row][:, context.valid_mask[row]], expected, rtol=1e-5, atol=1e-5)


PAUSE = {
    "projection": {"kind": "pause"},
    "timestep": {"kind": "none"},
    "lora": {"kind": "shared", "rank": 2, "alpha": 4},
    "residual": {"source": "none", "norm": True},
}


@pytest.mark.parametrize("backprop", [None, 2])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_pauses_run_in_one_pass_are_those_run_one_by_one(kind, backprop):
    made = tiny.reasoner(kind, PAUSE)
    results = []
    for one_by_one in (True, False):
        made.zero_grad()
        context = made.encode(*tiny.batch(tiny.PROMPTS[:3]))
        if one_by_one:  # whoever asks for the passes gets each of them
            context.passes = []
        states = made.unroll(context, 5, backprop)
        states[:, -1].square().sum().backward()
        grads = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
        results.append((states.detach(), context.hidden.detach(), context.next_position, context.visible, grads))
        assert context.passes is None or len(context.passes) == 5
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_thoughts_never_run_in_one_pass():
    for change in (
        {"projection": {"kind": "identity"}},
        {"residual": {"source": "initial"}},
        {"timestep": {"kind": "learned"}},
        {"timestep": {"kind": "none", "noise_level": True}},
        {"lora": {"kind": "per_iteration", "rank": 2, "alpha": 4}},
    ):
        assert not tiny.reasoner(loop={**PAUSE, **change})._independent_iterations


def test_the_answer_in_one_pass_is_the_answer_token_by_token():
    made = tiny.reasoner(decode=True)
    tokens, present = tiny.batch([tiny.words(7, 8, 9), tiny.words(1, 2), tiny.words(3, 4, 5)])
    looped = torch.tensor([True, False, True])
    loops = [{"max_iterations": n, "criterion": "fixed"} for n in (3, 0, 2)]
    at_once = made.answer_logits(run(made, tiny.PROMPTS[:3], *loops).context, tokens, present.bool(), looped)
    context = run(made, tiny.PROMPTS[:3], *loops).context
    singly = [made.answer_logits(context, tokens[:, [i]], present[:, [i]].bool(), looped) for i in range(3)]
    torch.testing.assert_close(at_once[present.bool()], torch.cat(singly, dim=1)[present.bool()], rtol=1e-4, atol=1e-4)


def test_the_decode_adapter_acts_after_a_loop_and_only_then():
    made = tiny.reasoner(decode=True)
    tokens = torch.tensor([[5]])
    logits = {}
    for iterations in (0, 2):
        for looped in (False, True):
            context = run(made, tiny.PROMPTS[:1], {"max_iterations": iterations, "criterion": "fixed"}).context
            logits[iterations, looped] = made.answer_logits(
                context, tokens, torch.tensor([[True]]), torch.tensor([looped])
            )
    assert (logits[2, True] - logits[2, False]).abs().max() > 1e-3
    requests = [tiny.request(made, tiny.PROMPTS[1], {"max_iterations": 0}, max_new_tokens=10)]
    plain = generate(tiny.reasoner(), requests)
    assert generate(made, requests)[0].token_ids == plain[0].token_ids


# -- eager attention, precision, modes -------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_attention_implementation_does_not_matter(kind):
    loops = [{"max_iterations": n, "criterion": "fixed"} for n in (2, 3)]
    sdpa = tiny.reasoner(kind)
    eager = tiny.twin(sdpa)
    eager.base.set_attn_implementation("eager")
    a, b = (run(made, tiny.PROMPTS[2:4], *loops).states for made in (sdpa, eager))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


ABLATIONS = [
    {"timestep": {"kind": "learned", "combine": "concat"}},
    {"timestep": {"kind": "sinusoidal"}},
    {"projection": {"kind": "linear"}},
    {"projection": {"kind": "mlp"}},
    {"residual": {"norm": True}},
    {"residual": {"mix": "convex", "source": "initial"}},
    {"workspace": "block", "timestep": {"noise_level": True}},
    {"workspace": "prompt", "halting_head": True, "convergence": {"criterion": "learned"}},
    {"decoder": {"answers": "latent_decoder", "latent_decoder": {"hidden_size": 16, "heads": 2}}},
]


@pytest.mark.parametrize("loop", ABLATIONS, ids=str)
def test_every_part_runs_on_a_base_model_in_half_precision(loop):
    made = tiny.reasoner(loop=loop, plain=tiny.base().to(torch.bfloat16))
    requests = [tiny.request(made, prompt, {"max_iterations": 3}, trace=True) for prompt in tiny.PROMPTS[:2]]
    results = generate(made, requests)
    assert all(result.iterations >= 1 and result.exit_reason != "diverged" for result in results)


def test_gradients_flow_after_an_answer_was_generated():
    # What eval mode keeps must not come out of inference mode.
    made = tiny.reasoner()
    generate(made, [tiny.request(made, tiny.PROMPTS[1], {"max_iterations": 1})])
    states = made.unroll(made.encode(*tiny.batch(tiny.PROMPTS[:2])), 2)
    states.sum().backward()
    assert made.residual.gate.grad.abs().sum() > 0


def test_training_mode_follows_a_changed_embedding_table():
    made = tiny.reasoner()
    before = made.embedding_rms().item()
    made.train()
    with torch.no_grad():
        made.base.get_input_embeddings().weight.mul_(3)
    assert made.embedding_rms().item() == pytest.approx(3 * before)
    assert made.eval().embedding_rms().item() == pytest.approx(3 * before)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_embedding_rms_is_of_what_the_model_is_fed(kind, monkeypatch):
    """Gemma scales its embeddings. Measured once while the table stays as it is, in training too."""
    made = tiny.reasoner(kind, plain=tiny.base(kind))
    made.base.requires_grad_(False)
    with torch.no_grad():
        expected = made.embed(torch.arange(made.vocab_size)).pow(2).mean().sqrt()
    torch.testing.assert_close(made.embedding_rms(), expected)
    measured, measure = [], adapted._embedding_rms
    monkeypatch.setattr(adapted, "_embedding_rms", lambda *args: (measured.append(1), measure(*args))[1])
    for _ in range(2):
        made.train()
        made.unroll(made.encode(*tiny.batch(tiny.PROMPTS[:2])), 3)
    assert measured == []
    with torch.no_grad():
        made.base.get_input_embeddings().weight.mul_(3)
    torch.testing.assert_close(made.embedding_rms(), 3 * expected)


@pytest.mark.parametrize("fused", [False, True])
def test_embedding_rms_follows_the_optimizer(fused):
    """A fused optimizer changes the table without a new version of the tensor."""
    made = tiny.reasoner().train()
    table = made.base.get_input_embeddings().weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([table], lr=1.0, fused=fused)
    with torch.no_grad():  # as in the iterations without gradients
        made.embedding_rms()
        table.grad = torch.ones_like(table)
        optimizer.step()
        expected = made.embed(torch.arange(made.vocab_size)).pow(2).mean().sqrt()
        torch.testing.assert_close(made.embedding_rms(), expected)
        made.eval().embedding_rms()
        made.train()
        optimizer.step()
        expected = made.embed(torch.arange(made.vocab_size)).pow(2).mean().sqrt()
        torch.testing.assert_close(made.eval().embedding_rms(), expected)


def test_weights_loaded_in_eval_mode_take_effect_at_once(tmp_path):
    other, made = tiny.reasoner(seed=5), tiny.reasoner()
    with torch.no_grad():
        other.base.get_input_embeddings().weight.mul_(3)
    other.save_pretrained(str(tmp_path))
    made.embedding_rms()
    load_weights(made, tmp_path)
    torch.testing.assert_close(made.embedding_rms(), other.eval().embedding_rms())
    loop = {"max_iterations": 3, "criterion": "fixed"}
    a, b = (run(x, tiny.PROMPTS[:1], loop).states[0] for x in (made, other))
    torch.testing.assert_close(a, b)


def test_sizes():
    made = tiny.reasoner()
    assert made.max_positions == tiny.POSITIONS
    assert tiny.reasoner("gpt2").max_positions == tiny.POSITIONS
    assert made.device == torch.device("cpu")
    assert made.state_values(7, 3) == 3 * 32
    assert of("block").state_values(7, 3) == 3 * 3 * 32
    assert of("prompt").state_values(7, 3) == 3 * 7 * 32


def test_end_tokens_are_the_tokenizers_the_bases_and_the_configs():
    assert tiny.reasoner().end_tokens == {tiny.EOS}
    plain = tiny.base()
    plain.generation_config.eos_token_id = [tiny.EOS, 7]
    assert tiny.reasoner(plain=plain, text={"stop_token_ids": [9]}).end_tokens == {tiny.EOS, 7, 9}


def test_overlong_left_padding():
    # GPT-2 looks positions up in a table: padding must not reach past its end.
    made = tiny.reasoner("gpt2")
    long = tiny.words(*range(30), *range(28))
    output = run(made, [tiny.PROMPTS[0], long], {"max_iterations": 3, "criterion": "fixed"}, {"max_iterations": 0})
    assert output.iterations == [3, 0]


JACOBI = {
    "workspace": "block",
    "block_size": 6,
    "feedback": "shifted",
    "projection": {"kind": "expected_embedding", "top_tokens": 1},
    "lora": {"kind": "none"},
    "timestep": {"kind": "none"},
    "residual": {"source": "none"},
    "trained_iterations": 8,
    "max_iterations": 8,
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_fixed_point_of_expected_embeddings_is_greedy_decoding(kind):
    """Iteration t has the first t tokens right at the latest, the prompt's own among them: Jacobi decoding."""
    made = tiny.reasoner(kind, JACOBI)
    ids = torch.tensor([[5, 9, 4, 11]])
    written = made.base.generate(ids, max_new_tokens=7, min_new_tokens=7, do_sample=False)[0, 4:]
    with torch.no_grad():
        context = made.encode(ids, torch.ones_like(ids))
        first = made.head(context.state).argmax(-1)
        states = made.unroll(context, 8)[0, 1:]
    assert first == written[0]
    read = made.head(states).argmax(-1)  # position p is fed token p, and reads token p + 1
    for t in range(1, 8):  # the input of position 0 is right from the second iteration on
        assert read[t - 1, : t - 1].tolist() == written[1:t].tolist()
    torch.testing.assert_close(states[7], states[6])


def test_an_expected_embedding_is_the_mean_of_the_most_likely_tokens():
    made = tiny.reasoner()
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2)) / 4
    table, probs = made.base.get_input_embeddings().weight, made.head(hidden).softmax(-1)
    logits = made.head(hidden)
    every = made.expected_embedding(logits, 10_000)
    torch.testing.assert_close(every, probs @ table)
    kept = probs.masked_fill(probs < probs.sort(-1, descending=True).values[..., 2:3], 0)
    torch.testing.assert_close(
        made.expected_embedding(logits.log_softmax(-1), 3), kept / kept.sum(-1, keepdim=True) @ table
    )


def test_token_embeddings_fed_back_raw_get_their_positions():
    """A raw state holds the base's learned position embeddings, a mean token embedding does not."""
    made = tiny.reasoner(
        "gpt2",
        {
            "workspace": "token",
            "feedback": "raw",
            "projection": {"kind": "expected_embedding", "top_tokens": 1},
            "timestep": {"kind": "none"},
            "lora": {"kind": "none"},
            "residual": {"source": "none"},
        },
    )
    fed, gpt2 = [], made.base.transformer
    gpt2.h[0].register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        context = made.encode(prompt, torch.ones_like(prompt))
        _, states = made.iterate(context, 1)
        made.iterate(context, 2)
        expected = gpt2.wte(made.head(states).argmax(-1)) + gpt2.wpe(torch.arange(4))
    torch.testing.assert_close(fed[-1], expected, rtol=1e-5, atol=1e-5)

"""The semantics table, row by row, on what the base model is asked to run."""

from dataclasses import dataclass

import pytest
import torch

from slr_core.config import LoopConfig
from slr_core.loop.modules import build_workspace
from slr_core.loop.workspace import readout
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams
from tests import tiny

WORKSPACES = ("append", "block", "prompt")
K = 3
PROMPT = tiny.PROMPTS[1]
P = 5


def reasoner(workspace, loop=None, **options):
    return tiny.reasoner(loop={"workspace": workspace, "block_size": K, **(loop or {})}, **options)


@pytest.fixture(scope="module")
def made():
    return {workspace: reasoner(workspace) for workspace in WORKSPACES}


@dataclass
class Pass:
    """One forward pass of the base model."""

    inputs: torch.Tensor
    positions: list[list[int]]
    cached: int
    adapter: str | None


class Watch:
    """Notes every pass of a model inside its block."""

    def __init__(self, made):
        self.made, self.passes = made, []

    def __enter__(self):
        self.hook = self.made.base.base_model.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def _note(self, module, args, kwargs):
        active = self.made.adapters.layers[0]._active_adapter
        cached = kwargs["past_key_values"].get_seq_length()
        self.passes.append(
            Pass(kwargs["inputs_embeds"], kwargs["position_ids"].tolist(), cached, active[0] if active else None)
        )

    @property
    def shown(self):
        """Per pass of a lone row: positions, columns in the cache before it, adapter."""
        return [(run.positions[0], run.cached, run.adapter) for run in self.passes]


def loop(made, prompts, *iterations, side="right"):
    settings = [LoopParams(max_iterations=n, criterion="fixed").resolve(made.config) for n in iterations]
    with torch.no_grad():
        return loop_until_exit(made, made.encode(*tiny.batch(list(prompts), side)), settings)


def write(made, context, looped):
    """Logits of the first token and of one that follows w7."""
    rows = len(context.state)
    with torch.no_grad():
        tokens, present = torch.full((rows, 1), 10), torch.ones(rows, 1, dtype=torch.bool)
        return made.head(context.state), made.answer_logits(context, tokens, present, torch.tensor(looped))[:, 0]


# -- h_0 -------------------------------------------------------------------------------------------------


def test_h_0(made):
    ids, mask = tiny.batch([PROMPT])
    with torch.no_grad():
        base = tiny.base().base_model(input_ids=ids).last_hidden_state
        expected = {"append": base[:, -1:], "block": made["block"].workspace.vectors[None], "prompt": None}
        expected["prompt"] = made["prompt"].embed(ids)
        for workspace in WORKSPACES:
            context = made[workspace].encode(ids, mask)
            torch.testing.assert_close(context.hidden, expected[workspace], rtol=1e-4, atol=1e-5, msg=workspace)
            assert context.initial is context.hidden
            assert context.valid_mask.all()
            assert context.change.isnan().all()
            output = loop(made[workspace], [PROMPT], 2)
            torch.testing.assert_close(output.states[0][0], expected[workspace][0], rtol=1e-4, atol=1e-5)
            assert made[workspace].is_state(0) == (workspace == "append")


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_h_0_of_one_row_is_that_of_a_batch(made, workspace):
    model = made[workspace]
    ids, mask = tiny.batch([PROMPT, tiny.PROMPTS[3]])
    with torch.no_grad():
        context = model.encode(ids, mask)
        for row, prompt in enumerate((PROMPT, tiny.PROMPTS[3])):
            ids = torch.tensor([tiny.ids(prompt)])
            before = tiny.base().base_model(input_ids=ids).last_hidden_state[0, -1]
            first = model.workspace.initial_state(before if model.workspace.prefills else model.embed(ids)[0])
            assert first.shape[0] == model.workspace.width(ids.shape[1])
            torch.testing.assert_close(first, context.initial[row][context.valid_mask[row]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_which_workspaces_prefill(made, workspace):
    with Watch(made[workspace]) as watch, torch.no_grad():
        made[workspace].encode(*tiny.batch([PROMPT]))
    assert made[workspace].workspace.prefills == bool(watch.passes)


# -- what runs -------------------------------------------------------------------------------------------

PREFILL = (list(range(P)), 0, None)
BLOCK = [5, 6, 7]


def whole(adapter):
    return (list(range(P)), 0, adapter)


RUNS = {
    ("append", 0): [PREFILL],
    ("append", 3): [PREFILL, ([5], 5, "loop_01"), ([6], 6, "loop_02"), ([7], 7, "loop_03")],
    ("block", 0): [PREFILL],
    ("block", 3): [PREFILL, *[(BLOCK, 5, f"loop_0{t}") for t in (1, 2, 3)], (BLOCK, 5, None)],
    ("prompt", 0): [PREFILL],
    ("prompt", 3): [whole("loop_01"), whole("loop_02"), whole("loop_03"), whole(None)],
}
FIRST_TOKEN = {("append", 3): P + 3, ("block", 3): P + K}


@pytest.mark.parametrize(("workspace", "iterations"), RUNS)
def test_the_passes_of_a_lone_request(made, workspace, iterations):
    model = made[workspace]
    with Watch(model) as watch:
        context = loop(model, [PROMPT], iterations).context
    assert watch.shown == RUNS[workspace, iterations]
    first = FIRST_TOKEN.get((workspace, iterations), P)
    assert context.next_position.tolist() == [first]
    assert int(context.visible.sum()) == first
    looping, kept = model.workspace, int(iterations > 0)
    assert looping.passes(iterations) + looping.closing_passes(iterations) == len(watch.passes)
    assert looping.closing_passes(iterations) == {"append": 0, "block": kept, "prompt": 1}[workspace]
    with Watch(model) as watch:
        write(model, context, [iterations > 0])
    assert watch.shown == [([first], first, None)]


@pytest.mark.parametrize(("workspace", "iterations"), RUNS)
def test_after_a_loop_and_only_then_the_adapter_decode_writes(workspace, iterations):
    model = reasoner(workspace, {"lora": {"decode_rank": 2}})
    with Watch(model) as watch:
        context = loop(model, [PROMPT], iterations).context
        write(model, context, [iterations > 0])
    adapters = [run.adapter for run in watch.passes]
    expected = [adapter for _, _, adapter in RUNS[workspace, iterations]]
    if iterations and workspace != "append":
        expected[-1] = "decode"
    assert adapters == [*expected, "decode" if iterations else None]


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_timestep_in_iterations_only(made, workspace):
    model = made[workspace]
    with Watch(model) as watch:
        states = loop(model, [PROMPT], 3).states[0]
    started = int(workspace != "prompt")
    with torch.no_grad():
        for t, run in enumerate(watch.passes[started : started + 3], start=1):
            torch.testing.assert_close(run.inputs[0], model.timestep(model.project_in(states[t - 1]), t))
        if workspace != "append":
            torch.testing.assert_close(watch.passes[-1].inputs[0], model.project_in(states[3]))


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_the_residual_reads_what_it_names(workspace):
    model = reasoner(workspace, {"residual": {"source": "initial", "mix": "convex", "alpha": 0.75}})
    with torch.no_grad():
        context = model.encode(*tiny.batch([PROMPT]))
        h_0 = context.hidden
        for t in (1, 2):
            g, h = model.iterate(context, t)
            torch.testing.assert_close(h, 0.75 * g + 0.25 * h_0)


# -- the cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workspace", "during", "after"), [("append", P + 2, P + 2), ("block", P, P + K)])
def test_what_the_cache_holds(made, workspace, during, after):
    model = made[workspace]
    with torch.no_grad():
        context = model.encode(*tiny.batch([PROMPT]))
        states = model.unroll(context, 2)
        assert context.cache.get_seq_length() == context.visible.shape[1] == during
        prompt = [(keys[:, :, :P].clone(), values[:, :, :P].clone()) for _, keys, values in context.layers()]
        model.close(context, states, torch.tensor([2]))
        assert context.cache.get_seq_length() == context.visible.shape[1] == after
        plain = tiny.base().base_model(input_ids=torch.tensor([tiny.ids(PROMPT)]), use_cache=True).past_key_values
    for (_, keys, values), (k, v), layer in zip(context.layers(), prompt, plain.layers, strict=True):
        assert torch.equal(keys[:, :, :P], k)
        assert torch.equal(values[:, :, :P], v)
        torch.testing.assert_close(k, layer.keys, rtol=1e-4, atol=1e-5)


def test_the_prompt_workspace_keeps_nothing_until_it_closes(made):
    model = made["prompt"]
    with torch.no_grad():
        context = model.encode(*tiny.batch([PROMPT]))
        states = model.unroll(context, 2)
        assert (context.cache.get_seq_length(), context.visible.shape) == (0, (1, 0))
        model.close(context, states, torch.tensor([2]))
        assert context.cache.get_seq_length() == P


@pytest.mark.parametrize("workspace", ["block", "prompt"])
def test_closing_pass(made, workspace):
    model = made[workspace]
    output = loop(model, [PROMPT], 3)
    first, second = write(model, output.context, [True])
    with torch.no_grad():
        u = model.project_in(output.states[0][-1:])
        before = [model.embed(torch.tensor([tiny.ids(PROMPT)]))] if workspace == "block" else []
        embeds = torch.cat([*before, u, model.embed(torch.tensor([[10]]))], dim=1)
        logits = tiny.base()(inputs_embeds=embeds).logits
    torch.testing.assert_close(first, logits[:, -2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, logits[:, -1], rtol=1e-4, atol=1e-4)


def test_a_chain_is_read_at_its_last_thought_as_it_is(made):
    output = loop(made["append"], [PROMPT], 3)
    assert torch.equal(output.context.state, output.states[0][-1])


@pytest.mark.parametrize("workspace", ["block", "prompt"])
def test_attention_is_causal_inside_a_workspace(made, workspace):
    model = made[workspace]
    with torch.no_grad():
        context = model.encode(*tiny.batch([PROMPT]))
        fork = context.fork()
        changed = context.hidden.clone()
        changed[:, 1] += 1.0
        fork.hidden = changed
        (_, h), (_, other) = model.iterate(context, 1), model.iterate(fork, 1)
    assert torch.equal(h[:, 0], other[:, 0])
    assert all((h[:, i] - other[:, i]).abs().max() > 1e-4 for i in range(1, h.shape[1]))


# -- batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_rows_of_a_batch_are_the_rows_alone(made, workspace, side):
    model, prompts, depths = made[workspace], tiny.PROMPTS[:4], (2, 0, 4, 1)
    output = loop(model, prompts, *depths, side=side)
    logits = write(model, output.context, [n > 0 for n in depths])
    for row, (prompt, depth) in enumerate(zip(prompts, depths, strict=True)):
        single = loop(model, [prompt], depth)
        torch.testing.assert_close(output.states[row], single.states[0], rtol=1e-4, atol=1e-4)
        assert output.states[row].shape[:2] == (depth + 1, model.workspace.width(len(tiny.ids(prompt))))
        assert output.context.next_position[row] - 1 == single.context.next_position[0]
        for x, y in zip(logits, write(model, single.context, [depth > 0]), strict=True):
            torch.testing.assert_close(x[row], y[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_closing_is_as_if_the_loop_had_ended_there(workspace):
    model = reasoner(workspace, decode=True)
    with torch.no_grad():
        context = model.encode(*tiny.batch(tiny.PROMPTS[:3]))
        model.close(context, model.unroll(context, 5), torch.tensor([2, 5, 0]))
    logits = write(model, context, [True, True, False])
    for row, kept in enumerate((2, 5, 0)):
        single = loop(model, [tiny.PROMPTS[row]], kept)
        torch.testing.assert_close(
            context.hidden[row][context.valid_mask[row]], single.states[0][-1], rtol=1e-4, atol=1e-5
        )
        for x, y in zip(logits, write(model, single.context, [kept > 0]), strict=True):
            torch.testing.assert_close(x[row], y[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_without_iterations_it_is_the_base_model(workspace):
    model = reasoner(workspace, decode=True)
    output = loop(model, tiny.PROMPTS[:3], 0, 0, 0)
    first, second = write(model, output.context, [False] * 3)
    for row, prompt in enumerate(tiny.PROMPTS[:3]):
        with torch.no_grad():
            logits = tiny.base()(input_ids=torch.tensor([[*tiny.ids(prompt), 10]])).logits[0]
        torch.testing.assert_close(first[row], logits[-2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second[row], logits[-1], rtol=1e-4, atol=1e-4)


# -- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workspace", "positions", "width", "passes", "closing"),
    [
        ("append", [0, 1, 6], 1, [1, 2, 7], [0, 0, 0]),
        ("block", [0, K, K], K, [1, 2, 7], [0, 1, 1]),
        ("prompt", [0, 0, 0], 11, [0, 1, 6], [1, 1, 1]),
    ],
)
def test_sizes(workspace, positions, width, passes, closing):
    made = build_workspace(LoopConfig(workspace=workspace, block_size=K), 8)
    assert [made.loop_positions(t) for t in (0, 1, 6)] == positions
    assert made.width(11) == width
    assert [made.passes(t) for t in (0, 1, 6)] == passes
    assert [made.closing_passes(t) for t in (0, 1, 6)] == closing
    assert [x.shape for x in made.parameters()] == ([(K, 8)] if workspace == "block" else [])


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_cache_after_the_loop(workspace):
    made = build_workspace(LoopConfig(workspace=workspace, block_size=K), 8)
    states = torch.randn(5, made.width(4), 8)
    expected = states[1:4, 0] if workspace == "append" else states[3]
    assert torch.equal(made.memory(states, 3), expected)


def test_the_last_own_position_is_read():
    hidden = torch.arange(4.0)[:, None].expand(3, 4, 2)
    valid_mask = torch.tensor([[True, True, False, False], [False, False, True, True], [False, True, False, False]])
    assert torch.equal(readout(hidden, valid_mask), torch.tensor([[1.0, 1.0], [3.0, 3.0], [1.0, 1.0]]))
    unrolled = hidden[:, None] + 10 * torch.arange(2.0)[:, None, None]
    assert readout(unrolled, valid_mask)[:, :, 0].tolist() == [[1, 11], [3, 13], [1, 11]]

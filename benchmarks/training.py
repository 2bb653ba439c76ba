"""Training throughput, in two comparisons.

    python -m benchmarks.training > benchmarks/results/training.md
    python -m benchmarks.training --base runs/fresh > benchmarks/results/training_language_model.md

The first compares a cached prompt with a direct loop, which trains continuous thoughts without a cache: every pass runs
the prompt and all thoughts so far. The second, with ``--base``, trains the adapters of a loop on a frozen language
model: the plain loss of ``LatentReasoner.forward``, in fp32 over an ordinary cache, against what ``slr train`` runs, in
fp32 and in bfloat16. All sides train the same weights on the same batch and take turns: in one process, with ``--base``
in one each, since ``slr train`` also keeps freed memory. Before timing, the benchmark checks that their losses and
gradients agree. Seconds are processor time of one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_core.config import LoopConfig
from slr_core.model.base_support import hidden_size
from slr_core.reasoner import LatentReasoner
from slr_core.training.build import build
from slr_core.training.config import TrainConfig
from slr_core.training.data import LoopPlan
from slr_core.training.loss_module import LossModule
from slr_core.training.memory import keep_freed_memory
from slr_core.training.objectives import Rollout, losses
from slr_core.validation import validated

# As in Coconut: the state is the next input, without loop modules. A direct loop can run this, too.
LOOP = validated(
    LoopConfig,
    {
        "projection": {"kind": "identity"},
        "timestep": {"kind": "none"},
        "lora": {"kind": "none"},
        "residual": {"source": "none"},
        "trained_iterations": 12,
        "max_iterations": 12,
    },
)
ANSWER, BATCH = 4, 8


@dataclass(frozen=True)
class Case:
    """Sizes of a model and of its batch."""

    width: int
    layers: int
    prompt: int
    thoughts: int


CASES = (Case(128, 2, 64, 6), Case(128, 2, 192, 6), Case(128, 2, 192, 12), Case(384, 6, 64, 6), Case(384, 6, 192, 6))


def main() -> None:
    """Time every case and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of timed steps of each side")
    parser.add_argument("--base", help="folder or hub id of a language model, as for base.from of a recipe")
    parser.add_argument("--batch", type=int, default=64, help="with --base: questions per step")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    torch.set_num_threads(1)
    if arguments.base:
        _language_model(arguments.base, arguments.batch, rounds)
        return
    print(
        f"# Training throughput\n\ntorch {torch.__version__}, CPU, one thread; batch {BATCH}, {ANSWER} answer tokens;"
    )
    print(f"forward and backward, median of {rounds} steps each, in turn in one process; questions per second.\n")
    print("| hidden size | layers | prompt tokens | thoughts | direct loop | cached prompt | ratio |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        direct_s, cached_s = _time(case, rounds)
        print(
            f"| {case.width} | {case.layers} | {case.prompt} | {case.thoughts} | {BATCH / direct_s:.2f} "
            f"| {BATCH / cached_s:.2f} | {direct_s / cached_s:.2f} |",
            flush=True,
        )


def _time(case: Case, rounds: int) -> tuple[float, float]:
    config = TrainConfig.model_validate(
        {
            "output_dir": "unused",
            "base": {
                "hidden_size": case.width,
                "intermediate_size": 2 * case.width,
                "num_hidden_layers": case.layers,
                "num_attention_heads": 4,
                "max_position_embeddings": 512,
            },
            "loop": LOOP,
            "stages": (
                {
                    "steps": 1,
                    "iterations": case.thoughts,
                    "data": ({"task": "prosqa", "generator_options": {"nodes": 8, "max_hops": 3}},),
                },
            ),
        }
    )
    reasoner = build(config).train()
    batch = _batch(BATCH, case.prompt, case.thoughts, len(reasoner.tokenizer))

    def cached() -> Tensor:
        return losses(Rollout(reasoner, batch, config))["answer"].value

    def direct() -> Tensor:
        return _direct(reasoner, batch, case.thoughts)

    _agree(reasoner, direct, cached)
    spent: dict[Callable[[], Tensor], list[float]] = {direct: [], cached: []}
    for _ in range(rounds):
        for step, seconds in spent.items():
            seconds.append(_step(reasoner, step))
    return median(spent[direct]), median(spent[cached])


PROMPT, THOUGHTS, RANK = 60, 6, 16
SIDES = ("plain, fp32", "slr train, fp32", "slr train, bf16")


def _language_model(base: str, batch: int, rounds: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as pool:
        pool.apply(_check, (base, batch))
    with ExitStack() as stack:
        pools = {side: stack.enter_context(spawn.Pool(1)) for side in SIDES}  # a process for each, for all its steps
        memory = [pool.apply(_first_step, (base, batch, side)) for side, pool in pools.items()]
        print("memory in GB:", dict(zip(SIDES, memory, strict=True)), file=sys.stderr, flush=True)
        spent: dict[str, list[float]] = {side: [] for side in SIDES}
        for turn in range(rounds):
            for side, pool in pools.items():
                spent[side].append(pool.apply(_next_step))
                print(f"round {turn + 1}, {side}: {spent[side][-1]:.2f} s", file=sys.stderr, flush=True)
    typical = {side: median(times) for side, times in spent.items()}
    _, reasoner = _sides(base, batch)
    multiply_s = _multiply_seconds()
    operations = _operations(reasoner, batch)
    print(
        f"# Training throughput of a language model\n\ntorch {torch.__version__}, CPU, one thread; the frozen base "
        f"`{Path(base).name}`, adapters of rank {RANK}, workspace `append`, {THOUGHTS} iterations, {batch} questions "
        f"of {PROMPT} tokens with {ANSWER} answer tokens;\nforward and backward, median of {rounds} steps each, in "
        f"turn in a process of its own; processor time. Memory is what a first step adds to the loaded model at its "
        f"peak.\n"
    )
    print("| | prompt tokens/s | questions/s | of the plain loss | memory, GB | share of the fp32 matrix rate |")
    print("|---|---|---|---|---|---|")
    for side, peak in zip(SIDES, memory, strict=True):
        print(
            f"| {side} | {batch * PROMPT / typical[side]:.0f} | {batch / typical[side]:.2f} "
            f"| {typical[SIDES[0]] / typical[side]:.2f} | {peak:.2f} | {operations * multiply_s / typical[side]:.2f} |",
            flush=True,
        )


def _sides(base: str, batch: int) -> tuple[dict[str, Callable[[], Tensor]], LatentReasoner]:
    config = TrainConfig.model_validate(
        {
            "output_dir": "unused",
            "base": {"from": base},
            "train": "adapters",
            "loop": {"trained_iterations": THOUGHTS, "max_iterations": THOUGHTS, "lora": {"rank": RANK}},
            "stages": ({"steps": 1, "iterations": THOUGHTS, "data": ({"task": "word_problems"},)},),
        }
    )
    reasoner = build(config).train()
    data = _batch(batch, PROMPT, THOUGHTS, len(reasoner.tokenizer))
    modules = [LossModule(reasoner, config.model_copy(update={"bf16": half})) for half in (False, True)]

    def plain() -> Tensor:
        loss = reasoner(data["input_ids"], data["attention_mask"], data["labels"], THOUGHTS).loss
        assert isinstance(loss, Tensor)
        return loss

    def trained(module: LossModule) -> Callable[[], Tensor]:
        return lambda: module(data)[0]["answer"].value

    return dict(zip(SIDES, (plain, *map(trained, modules)), strict=True)), reasoner


def _check(base: str, batch: int) -> None:
    torch.set_num_threads(1)
    steps, reasoner = _sides(base, batch)
    _agree_closely(reasoner, steps[SIDES[0]], steps[SIDES[1]])


_worker: list[tuple[LatentReasoner, Callable[[], Tensor]]] = []
"""In the process of a side: its model and its step."""


def _first_step(base: str, batch: int, side: str) -> float:
    """Memory in GB that a first step takes at its peak beside the loaded model. Linux only."""
    torch.set_num_threads(1)
    if side != SIDES[0]:
        keep_freed_memory()
    steps, reasoner = _sides(base, batch)
    _worker.append((reasoner, steps[side]))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now the present size
    before = _status("VmRSS")
    _next_step()
    return _status("VmHWM") - before


def _next_step() -> float:
    return _step(*_worker[0])


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e6


def _multiply_seconds() -> float:
    """Processor seconds of a multiplication and addition in a large matrix product in fp32."""
    x, y = torch.randn(512, 576), torch.randn(576, 1536)
    times = []
    for _ in range(10):
        began = time.process_time()
        x @ y
        times.append(time.process_time() - began)
    return min(times) / (512 * 576 * 1536)


def _operations(reasoner: LatentReasoner, batch: int) -> float:
    """Multiplications and additions of a step in the base's matrices, without the adapters' and attention's."""
    head = int(reasoner.base.get_output_embeddings().weight.numel())  # type: ignore[no-untyped-call]
    base = sum(p.numel() for name, p in reasoner.base.named_parameters() if ".lora_" not in name)
    layers = base - reasoner.vocab_size * hidden_size(reasoner.base)  # without embeddings; the head is tied to them
    # The prompt has no backward pass; that of frozen matrices costs as much as the forward pass.
    return batch * (layers * (PROMPT + 2 * (THOUGHTS + ANSWER - 1)) + 2 * head * ANSWER)


def _agree_closely(reasoner: LatentReasoner, *steps: Callable[[], Tensor]) -> None:
    """Check that the gradients of two steps agree to 1e-3 of the length of each parameter's gradient."""
    found = []
    for step in steps:
        reasoner.zero_grad()
        step().backward()  # type: ignore[no-untyped-call]
        found.append({name: p.grad.clone() for name, p in reasoner.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        difference = float((found[1][name] - gradient).norm())
        if difference > 1e-3 * float(gradient.norm()):
            raise AssertionError(f"{name}: the gradients differ by {difference:.3g} of {float(gradient.norm()):.3g}")


def _batch(rows: int, length: int, thoughts: int, vocabulary: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, vocabulary, (rows, length), generator=generator)
    answer = torch.randint(3, vocabulary, (rows, ANSWER), generator=generator)
    return {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "answer_ids": answer,
        "labels": answer,
        "exits": torch.full((rows,), thoughts),
        "plan": LoopPlan(thoughts),
    }


def _direct(reasoner: LatentReasoner, batch: dict[str, Any], thoughts: int) -> Tensor:
    embeds, answer = reasoner.embed(batch["input_ids"]), batch["answer_ids"]
    for _ in range(thoughts):
        states = reasoner.base.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        embeds = torch.cat([embeds, states[:, -1:]], dim=1)
    inputs = torch.cat([embeds, reasoner.embed(answer[:, :-1])], dim=1)
    states = reasoner.base.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    return F.cross_entropy(reasoner.head(states[:, -answer.shape[1] :]).flatten(0, 1), answer.flatten())


def _agree(reasoner: LatentReasoner, *steps: Callable[[], Tensor]) -> None:
    found = []
    for step in steps:
        reasoner.zero_grad()
        loss = step()
        loss.backward()  # type: ignore[no-untyped-call]
        table = reasoner.base.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        assert table.grad is not None
        found.append((loss.detach(), table.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def _step(reasoner: LatentReasoner, step: Callable[[], Tensor]) -> float:
    reasoner.zero_grad()
    began = time.process_time()
    step().backward()  # type: ignore[no-untyped-call]
    return time.process_time() - began


if __name__ == "__main__":
    main()

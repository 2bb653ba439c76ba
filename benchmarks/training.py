"""Training throughput with a cached prompt, compared with a direct loop that runs the prompt for every thought.

    python -m benchmarks.training > benchmarks/results/training.md

The direct loop trains continuous thoughts without a cache: every pass runs the prompt and all thoughts so far. Both
train the same weights on the same batch and alternate in one process. Before timing, the benchmark checks that their
losses and gradients agree.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_core.config import LoopConfig, validated
from slr_core.model.reasoner import LatentReasoner
from slr_core.training.build import build
from slr_core.training.config import TrainConfig
from slr_core.training.data import LoopPlan
from slr_core.training.objectives import Rollout, losses

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
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
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
    batch = _batch(case, len(reasoner.tokenizer))

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


def _batch(case: Case, vocabulary: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, vocabulary, (BATCH, case.prompt), generator=generator)
    answer = torch.randint(3, vocabulary, (BATCH, ANSWER), generator=generator)
    return {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "answer_ids": answer,
        "labels": answer,
        "exits": torch.full((BATCH,), case.thoughts),
        "plan": LoopPlan(case.thoughts),
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
    began = time.perf_counter()
    step().backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

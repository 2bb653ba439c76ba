"""Models and load of the engine benchmark.

Models: the bundled checkpoint, whose passes are so short that overhead shows; and a Llama model of 135M parameters (30
layers, hidden size 576, vocabulary 49,152) with random weights and 8 loop adapters of rank 16 on all linear layers.
Load L: 32 requests at once, prompts of 16 tokens, exits spread evenly over 1 to 16 iterations, 1 to 32 new tokens.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slr_core import LatentReasoner
from slr_core.config import SLRConfig
from slr_core.engine import Engine
from slr_core.engine.statistics import StepStats
from slr_core.params import ResolvedLoopParams, SamplingParams
from slr_core.types import Request

SEED = 20261124
ROWS, PROMPT, ITERATIONS, TOKENS = 32, 16, 16, 32


class EndlessReasoner(LatentReasoner):
    """A model without end tokens: answers always have ``max_new_tokens`` tokens."""

    end_tokens = frozenset()


def bundled() -> LatentReasoner:
    """The bundled checkpoint."""
    return EndlessReasoner.from_pretrained(None)


def llama(layers: int) -> LatentReasoner:
    """A Llama model with random weights and ``layers`` layers."""
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )
    config = SLRConfig.from_dict(
        {"loop": {"trained_iterations": 8, "max_iterations": 16, "lora": {"rank": 16}, "timestep": {"kind": "learned"}}}
    )
    base.eval()  # type: ignore[no-untyped-call]
    reasoner = EndlessReasoner(base, LatentReasoner.from_pretrained(None).tokenizer, config).eval()
    with torch.no_grad():
        for key, weight in reasoner.base.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.02)
    return reasoner


def load(count: int, prompt: int = PROMPT) -> list[Request]:
    """Requests of load L."""
    rng = random.Random(SEED)
    exits = [1 + i % ITERATIONS for i in range(count)]
    rng.shuffle(exits)
    return [replace(fixed(exit_at, rng.randint(1, TOKENS)), prompt_ids=tokens(rng, prompt)) for exit_at in exits]


def fixed(iterations: int, new_tokens: int) -> Request:
    """A request that loops for exactly ``iterations`` and then generates ``new_tokens``."""
    return Request(
        prompt_ids=tokens(random.Random(iterations), PROMPT),
        answer_prefix_ids=(),
        loop=ResolvedLoopParams(iterations, iterations, "fixed", 0.0, 1),
        max_new_tokens=new_tokens,
        sampling=SamplingParams(),
        stop=(),
        trace=False,
        top_tokens=0,
        include_states=False,
    )


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    """Random token ids for a prompt."""
    return tuple(rng.randrange(4, 40) for _ in range(count))


def count_row_passes(requests: list[Request]) -> int:
    """Number of row passes that requests need: prompt, iterations, and every token but the first."""
    return sum(r.loop.max_iterations + r.max_new_tokens for r in requests)


class StepRecorder:
    """Records end and number of rows of an engine's steps; for ``Engine(on_step=...)``."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []

    def __call__(self, step: StepStats) -> None:
        """Record a step."""
        self.steps.append((time.perf_counter(), step.rows))

    def run(self, engine: Engine, requests: list[Request]) -> float:
        """Answer the requests; returns seconds per row pass while all slots were taken."""
        self.steps.clear()
        began = time.perf_counter()
        for future in [engine.submit(request) for request in requests]:
            future.result()
        # At the end, when no request waits, slots become free: that part does not count.
        last = max(i for i, (_, rows) in enumerate(self.steps) if rows == ROWS)
        return (self.steps[last][0] - began) / sum(rows for _, rows in self.steps[: last + 1])

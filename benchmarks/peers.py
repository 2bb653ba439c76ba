"""An imported Coconut model against its published way of generating: questions a second, same weights, one run.

    python -m benchmarks.peers --out benchmarks/results/peers      (about 15 minutes on one thread)

*Plain* is Coconut's published generation, re-stated from its description: one question at a time; the question in one
pass, then one pass for each thought over cached keys and values, the last one together with the closing marker; after
that, every new token runs the whole sequence again without a cache. The model is a random one of GPT-2's small shape in
fp32, with 6 thoughts; prompts have 29 to 104 tokens, as GSM8K's questions have. The engine answers 32 questions at
once, or one at a time. Both sides run on one thread. Processor time is that of the whole process: a busy machine slows
wall time alone, so the best turn of each side counts. Both sides must write the same tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from slr_core import LatentReasoner
from slr_core.checkpoint.importers.coconut import chain
from slr_core.config import SLRConfig
from slr_core.engine import Engine
from slr_core.generation.prepare import prepare
from slr_core.types import Request, Tokens

SEED = 20261128
THOUGHTS, VOCABULARY = 6, 50_260
START, END = VOCABULARY - 3, VOCABULARY - 2
QUESTIONS, SHORTEST, LONGEST = 32, 29, 104
PLAIN_QUESTIONS = {4: 8, 16: 8, 64: 4}
"""Questions that are answered one at a time, by the number of new tokens: a long answer takes a minute."""
TARGETS = {4: "6.0x", 16: "15.0x", 64: "-"}


class EndlessReasoner(LatentReasoner):
    """A model whose answers are as long as asked."""

    end_tokens = frozenset()


@dataclass(frozen=True)
class Rate:
    """Questions a second.

    Attributes:
        new_tokens: length of every answer.
        side: ``plain``, ``engine, 32 together`` or ``engine, one at a time``.
        questions: number of questions.
        wall: questions per second of wall time.
        processor: questions per second of processor time.
    """

    new_tokens: int
    side: str
    questions: int
    wall: float
    processor: float


def build(layers: int, width: int) -> LatentReasoner:
    """The random model with the loop of an imported Coconut checkpoint."""
    torch.manual_seed(SEED)
    shape = GPT2Config(
        vocab_size=VOCABULARY, n_embd=width, n_layer=layers, n_head=max(1, width // 64), initializer_range=0.05
    )
    base = GPT2LMHeadModel(shape)
    base.train(False)
    tokenizer = LatentReasoner.from_pretrained(None).tokenizer
    return EndlessReasoner(base, tokenizer, SLRConfig.from_dict({"loop": chain(THOUGHTS)})).eval()


def make_requests(reasoner: LatentReasoner, new_tokens: int) -> list[Request]:
    """Questions of lengths spread evenly, in random order, each with the opening marker at its end."""
    draw = random.Random(SEED)
    lengths = [SHORTEST + (LONGEST - SHORTEST) * i // (QUESTIONS - 1) for i in range(QUESTIONS)]
    draw.shuffle(lengths)
    prompts = [(*(draw.randrange(START) for _ in range(length)), START) for length in lengths]
    return [
        replace(prepare(reasoner, Tokens(prompt), max_new_tokens=new_tokens), answer_prefix_ids=(END,))
        for prompt in prompts
    ]


@torch.inference_mode()
def generate_plainly(model: GPT2LMHeadModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Coconut's published generation for one question, greedy."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    embeds = table[torch.tensor([prompt])]
    cache, fed = DynamicCache(), embeds
    for _ in range(THOUGHTS):
        output = model(inputs_embeds=fed, past_key_values=cache, use_cache=True, output_hidden_states=True)
        fed = output.hidden_states[-1][:, -1:]
        embeds = torch.cat([embeds, fed], dim=1)
    closing = table[torch.tensor([[END]])]
    output = model(inputs_embeds=torch.cat([fed, closing], dim=1), past_key_values=cache, use_cache=True)
    embeds, tokens = torch.cat([embeds, closing], dim=1), [int(output.logits[0, -1].argmax())]
    while len(tokens) < new_tokens:
        embeds = torch.cat([embeds, table[torch.tensor([tokens[-1:]])]], dim=1)
        tokens.append(int(model(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()))
    return tokens


def measure(reasoner: LatentReasoner, engine: Engine, new_tokens: int, count: int, turns: int) -> list[Rate]:
    """The three rates for one answer length, each the best of some turns.

    Raises:
        SystemExit: the two sides write different tokens.
    """
    requests = make_requests(reasoner, new_tokens)
    # Every few of them by length, so that the mean length is about that of all.
    alone = sorted(requests, key=lambda request: len(request.prompt_ids))[:: QUESTIONS // count]
    model = reasoner.base
    assert isinstance(model, GPT2LMHeadModel)
    rates: list[Rate] = []
    answers: dict[tuple[int, ...], list[int]] = {}
    sides: dict[str, tuple[list[Request], Callable[[list[Request]], list[list[int]]]]] = {
        "plain": (alone, lambda asked: [generate_plainly(model, r.prompt_ids, new_tokens) for r in asked]),
        f"engine, {QUESTIONS} together": (requests, lambda asked: _submit(engine, asked)),
        "engine, one at a time": (alone, lambda asked: [_submit(engine, [r])[0] for r in asked]),
    }
    for side, (asked, run) in sides.items():
        walls, processors = [], []
        for _ in range(turns):
            wall, processor = time.perf_counter(), time.process_time()
            written = run(asked)
            walls.append(time.perf_counter() - wall)
            processors.append(time.process_time() - processor)
            for request, tokens in zip(asked, written, strict=True):
                if answers.setdefault(request.prompt_ids, tokens) != tokens:
                    raise SystemExit(f"{side} writes other tokens than another side")
        rates.append(Rate(new_tokens, side, len(asked), len(asked) / min(walls), len(asked) / min(processors)))
    return rates


def _submit(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return [list(future.result().token_ids) for future in [engine.submit(request) for request in requests]]


def table(rates: Sequence[Rate]) -> list[str]:
    """The rows of the table: rates, and ratios to the plain side."""
    plain = {rate.new_tokens: rate for rate in rates if rate.side == "plain"}
    lines = [
        "| new tokens | side | questions/s | per s of processor time | ratio to plain | of processor time | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for rate in rates:
        base = plain[rate.new_tokens]
        target = TARGETS.get(rate.new_tokens, "-") if "together" in rate.side else "-"
        lines.append(
            f"| {rate.new_tokens} | {rate.side} | {rate.wall:.3f} | {rate.processor:.3f} | "
            f"{rate.wall / base.wall:.1f}x | {rate.processor / base.processor:.1f}x | {target} |"
        )
    return lines


def main() -> None:
    """Measure everything, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the table goes: this path with .md and .json")
    parser.add_argument("--layers", type=int, default=12, help="layers of the random model, to try things out")
    parser.add_argument("--width", type=int, default=768, help="its width")
    parser.add_argument("--turns", type=int, default=2, help="how often each side is measured; the best turn counts")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(PLAIN_QUESTIONS), help="lengths of the answers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    reasoner = build(options.layers, options.width)
    rates: list[Rate] = []
    with Engine(reasoner, slots=QUESTIONS, capacity=256, prefix_gib=0, threads=1) as engine:
        _submit(engine, make_requests(reasoner, 1))  # a first pass is slower
        for new_tokens in options.tokens:
            rates += measure(reasoner, engine, new_tokens, PLAIN_QUESTIONS.get(new_tokens, 8), options.turns)
            print(*table(rates)[-3:], sep="\n", flush=True)
    if options.out:
        write(options.out, table(rates), rates, options)


def write(path: Path, lines: Sequence[str], rates: Sequence[Rate], options: argparse.Namespace) -> None:
    """Write the table as Markdown, and the rates as JSON."""
    assert __doc__ is not None
    machine = f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}"
    text = [
        "# Generation of a published latent reasoner",
        "",
        *__doc__.strip().splitlines()[4:],
        "",
        machine,
        "",
        *lines,
    ]
    path.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    data = {"layers": options.layers, "width": options.width, "machine": machine, "rates": [asdict(r) for r in rates]}
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

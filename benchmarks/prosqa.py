"""Figures of the bundled checkpoint's model card: with the loop, without it, controls, and the shortcut rule.

    python -m benchmarks.prosqa --control no_thought=runs/no_thought --control pause_as_thought=runs/pause_as_thought \\
        --data ../shared/data --out benchmarks/results/prosqa.json

Data sets that are missing are left out. `slr compare` does the same for one set and more methods.

On standard error, the benchmark says how many answers it needs and shows its progress with the time that is left.
With the default numbers of questions these are 138,000 answers: about ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from transformers.utils import logging

from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import METHODS, Method, MethodSettings
from slr_core.evaluation.outcomes import Outcome
from slr_core.evaluation.run import run_method
from slr_core.evaluation.statistics import summarize, summarize_by_difficulty
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.base import Example, read_jsonl
from slr_core.tasks.prosqa import GraphSpec, ProsQA, generate_prosqa

SEED = 20261123
FULL_SIZE = GraphSpec(28, 3, 6, True)
GENERATED = {
    "generated balanced, at most 28 nodes, 3 to 6 hops": FULL_SIZE,
    "generated balanced, at most 28 nodes, 7 hops": GraphSpec(28, 7, 7, True),
    "generated balanced, at most 10 nodes, 2 to 4 hops": GraphSpec(10, 2, 4, True),
    "generated balanced, at most 40 nodes, 7 to 8 hops": GraphSpec(40, 7, 8, True),
}
DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32)
"""Numbers of forced iterations: up to four times the eight of the training."""
FILES = ("prosqa_balanced/valid", "prosqa/valid", "prosqa_ood/len7", "prosqa_ood/large")


class Bar:
    """Progress on standard error: a bar on a terminal, else one line a minute."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.shown = Console(stderr=True)
        self.progress = Progress(
            *Progress.get_default_columns(),
            MofNCompleteColumn(),
            console=self.shown,
            disable=not self.shown.is_terminal,
        )
        self.task = self.progress.add_task("answers", total=total)

    def __enter__(self) -> Self:
        self.shown.print(f"{self.total:,} answers to compute")
        self.began = self.reported = time.perf_counter()
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.shown.print(f"{self.done:,} answers in {_minutes(time.perf_counter() - self.began)}")

    def advance(self, count: int) -> None:
        """Count further answers."""
        self.done += count
        self.progress.advance(self.task, count)
        now = time.perf_counter()
        if not self.shown.is_terminal and self.done and now - self.reported >= 60:
            left = (now - self.began) * (self.total - self.done) / self.done
            self.shown.print(f"{self.done:,} of {self.total:,} answers, about {_minutes(left)} left")
            self.reported = now


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def main() -> None:
    """Run every method on every set, print Markdown tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the bundled checkpoint)")
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="METHOD=DIR",
        help="a control of `slr compare` and the checkpoint trained for it; repeatable",
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--out", type=Path, help="file to write the figures to, as JSON")
    parser.add_argument("--questions", type=int, default=2000, help="number of generated questions per set")
    parser.add_argument(
        "--divergence", type=int, default=10_000, help="number of generated questions to look for divergence"
    )
    options = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    sets = {
        name: list(islice(generate_prosqa(spec, SEED), options.questions)) for name, spec in GENERATED.items()
    } | _read(options.data)
    tested = Local(LatentReasoner.from_pretrained(options.model))
    methods = {
        "with its loop": (tested, METHODS["slr"]),
        "the same model, max_iterations 0": (tested, METHODS["no_cot"]),
    }
    for given in options.control:
        name, _, folder = given.partition("=")
        methods[name] = (Local(LatentReasoner.from_pretrained(folder)), METHODS[name])
    total = sum(map(len, sets.values())) * (len(methods) + len(DEPTHS)) + options.divergence

    with Bar(total) as bar:
        figures: dict[str, dict[str, Any]] = {}
        print("| questions | n | depth rule |", *(f"{method} |" for method in methods))
        print("|---|---|---|" + "---|" * len(methods))
        looped: dict[str, list[Outcome]] = {}
        for name, examples in sets.items():
            row = {label: _answer(bar, backend, method, examples) for label, (backend, method) in methods.items()}
            looped[name] = row["with its loop"]
            rule = sum(ProsQA().baselines(example)["depth_rule"] for example in examples) / len(examples)
            figures[name] = {label: _figures(outcomes) | {"depth_rule": rule} for label, outcomes in row.items()}
            print(f"| {name} | {len(examples)} | {rule:.3f} |", *(f"{_cell(outcomes)} |" for outcomes in row.values()))
        for name, outcomes in looped.items():
            _print_levels(name, outcomes)
        forced = _forced(bar, tested, sets)
        diverged = _diverged(bar, tested, options.divergence)
    print(f"\nOf {options.divergence} more generated questions of 3 to 6 hops, {diverged} diverged.")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "seed": SEED,
            "sha256": _hashes(options.data),
            "figures": figures,
            "forced": forced,
            "diverged": {"questions": options.divergence, "diverged": diverged},
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _read(folder: Path | None) -> dict[str, list[Example]]:
    paths = {name: folder / f"{name}.jsonl.gz" for name in FILES} if folder else {}
    return {name: read_jsonl(path) for name, path in paths.items() if path.is_file()}


def _hashes(folder: Path | None) -> dict[str, str]:
    paths = {name: folder / f"{name}.jsonl.gz" for name in FILES} if folder else {}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in paths.items() if p.is_file()}


def _answer(
    bar: Bar, backend: Local, method: Method, examples: list[Example], loop: dict[str, Any] | None = None
) -> list[Outcome]:
    return run_method(method, backend, ProsQA(), examples, MethodSettings(loop or {}), progress=bar.advance)


def _forced(bar: Bar, backend: Local, sets: dict[str, list[Example]]) -> dict[str, dict[int, float]]:
    """Accuracy of loops that are forced to a number of iterations, without early exit."""
    print("\nForced to t iterations (trained to 8), accuracy:\n")
    print("| questions |", *(f"{t} |" for t in DEPTHS))
    print("|---|" + "---|" * len(DEPTHS))
    accuracies: dict[str, dict[int, float]] = {}
    for name, examples in sets.items():
        accuracies[name] = {}
        for t in DEPTHS:
            outcomes = _answer(bar, backend, METHODS["slr_fixed"], examples, {"max_iterations": t, "min_iterations": t})
            accuracies[name][t] = summarize(outcomes).accuracy
        print(f"| {name} |", *(f"{accuracy:.3f} |" for accuracy in accuracies[name].values()))
    return accuracies


def _diverged(bar: Bar, backend: Local, count: int) -> int:
    examples = list(islice(generate_prosqa(FULL_SIZE, SEED + 1), count))
    outcomes = _answer(bar, backend, METHODS["slr"], examples)
    return sum(outcome.exit_reason == "diverged" for outcome in outcomes)


def _figures(outcomes: list[Outcome]) -> dict[str, Any]:
    levels = {level: asdict(summary) for level, summary in summarize_by_difficulty(outcomes).items()}
    return {"overall": asdict(summarize(outcomes)), "by_difficulty": levels}


def _cell(outcomes: list[Outcome]) -> str:
    summary = summarize(outcomes)
    low, high = summary.interval
    return f"{summary.accuracy:.3f} ({low:.3f} to {high:.3f})"


def _print_levels(name: str, outcomes: list[Outcome]) -> None:
    print(f"\n{name}, with its loop, by hops:\n")
    head = "| hops | n | accuracy | mean iterations | converged | passes | relative change at t = 1, 2, ... |"
    print(head + "\n|---|---|---|---|---|---|---|")
    for hops, summary in [*summarize_by_difficulty(outcomes).items(), ("all", summarize(outcomes))]:
        changes = " ".join("-" if change is None else f"{change:.2f}" for change in summary.relative_change)
        print(
            f"| {hops} | {summary.questions} | {summary.accuracy:.3f} | {summary.iterations:.2f} "
            f"| {summary.converged:.1%} | {summary.forward_passes:.2f} | {changes} |"
        )


if __name__ == "__main__":
    main()

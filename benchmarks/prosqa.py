"""The figures of the bundled checkpoint's model card: with the loop, without it, and the shortcut rule.

    python -m benchmarks.prosqa --control runs/prosqa_no_loop --data ../shared/data --out benchmarks/results/prosqa.json

Data sets that are not there are left out. `slr compare` does the same for one set and more methods.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from transformers.utils import logging

from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import METHODS, Method, Settings
from slr_core.evaluation.outcomes import Outcome
from slr_core.evaluation.run import run_method
from slr_core.evaluation.statistics import by_difficulty, summarize
from slr_core.model import LatentReasoner
from slr_core.tasks.base import Example, read_jsonl
from slr_core.tasks.prosqa import GraphSpec, ProsQA, generate

SEED = 20261123
GENERATED = {
    "generated balanced, at most 10 nodes, 2 to 4 hops": GraphSpec(10, 2, 4, True),
    "generated balanced, at most 28 nodes, 3 to 6 hops": GraphSpec(28, 3, 6, True),
}
FILES = ("prosqa_balanced/valid", "prosqa/valid", "prosqa_ood/len7", "prosqa_ood/large")


def main() -> None:
    """Run every method on every set, print Markdown tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="checkpoint folder (default: the bundled one)")
    parser.add_argument("--control", type=Path, help="the control trained without the loop")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--questions", type=int, default=500, help="generated questions per set")
    options = parser.parse_args()
    logging.disable_progress_bar()

    sets = {name: list(islice(generate(spec, SEED), options.questions)) for name, spec in GENERATED.items()} | _read(
        options.data
    )
    tested = Local(LatentReasoner.from_pretrained(options.model))
    methods = {
        "with its loop": (tested, METHODS["slr"]),
        "the same model, max_iterations 0": (tested, METHODS["no_cot"]),
    }
    if options.control:
        control = Local(LatentReasoner.from_pretrained(str(options.control)))
        methods["trained without the loop"] = (control, METHODS["no_thought"])

    figures: dict[str, dict[str, Any]] = {}
    print("| questions | n | depth rule |", *(f"{method} |" for method in methods))
    print("|---|---|---|" + "---|" * len(methods))
    looped: dict[str, list[Outcome]] = {}
    for name, examples in sets.items():
        row = {label: _answer(backend, method, examples) for label, (backend, method) in methods.items()}
        looped[name] = row["with its loop"]
        rule = sum(ProsQA().baselines(example)["depth_rule"] for example in examples) / len(examples)
        figures[name] = {label: _figures(outcomes) | {"depth_rule": rule} for label, outcomes in row.items()}
        print(f"| {name} | {len(examples)} | {rule:.3f} |", *(f"{_cell(outcomes)} |" for outcomes in row.values()))
    for name, outcomes in looped.items():
        _print_levels(name, outcomes)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"seed": SEED, "sha256": _hashes(options.data), "figures": figures}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _read(folder: Path | None) -> dict[str, list[Example]]:
    paths = {name: folder / f"{name}.jsonl.gz" for name in FILES} if folder else {}
    return {name: read_jsonl(path) for name, path in paths.items() if path.is_file()}


def _hashes(folder: Path | None) -> dict[str, str]:
    paths = {name: folder / f"{name}.jsonl.gz" for name in FILES} if folder else {}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in paths.items() if p.is_file()}


def _answer(backend: Local, method: Method, examples: list[Example]) -> list[Outcome]:
    return run_method(method, backend, ProsQA(), examples, Settings({}))


def _figures(outcomes: list[Outcome]) -> dict[str, Any]:
    levels = {level: asdict(summary) for level, summary in by_difficulty(outcomes).items()}
    return {"overall": asdict(summarize(outcomes)), "by_difficulty": levels}


def _cell(outcomes: list[Outcome]) -> str:
    summary = summarize(outcomes)
    low, high = summary.interval
    return f"{summary.accuracy:.3f} ({low:.3f} to {high:.3f})"


def _print_levels(name: str, outcomes: list[Outcome]) -> None:
    print(f"\n{name}, with its loop, by hops:\n")
    head = "| hops | n | accuracy | mean iterations | converged | passes | relative change at t = 1, 2, ... |"
    print(head + "\n|---|---|---|---|---|---|---|")
    for hops, summary in {**by_difficulty(outcomes), "all": summarize(outcomes)}.items():
        changes = " ".join("-" if change is None else f"{change:.2f}" for change in summary.relative_change)
        print(
            f"| {hops} | {summary.questions} | {summary.accuracy:.3f} | {summary.iterations:.2f} "
            f"| {summary.converged:.1%} | {summary.forward_passes:.2f} | {changes} |"
        )


if __name__ == "__main__":
    main()

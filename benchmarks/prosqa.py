"""The figures of the bundled checkpoint's model card: with the loop, without it, and the shortcut rule.

    python -m benchmarks.prosqa --control runs/prosqa_no_loop --data ../shared/data --out benchmarks/results/prosqa.json

Data sets that are not there are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

from transformers.utils import logging

from slr_core.evaluation.evaluate import Evaluation, evaluate
from slr_core.loop.convergence import LoopSettings
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
    reasoner = LatentReasoner.from_pretrained(options.model)
    methods = {"with its loop": (reasoner, None), "the same model, max_iterations 0": (reasoner, 0)}
    if options.control:
        methods["trained without the loop"] = (LatentReasoner.from_pretrained(str(options.control)), 0)

    figures: dict[str, dict[str, Any]] = {}
    print("| questions | n | depth rule |", *(f"{method} |" for method in methods))
    print("|---|---|---|" + "---|" * len(methods))
    looped: dict[str, Evaluation] = {}
    for name, examples in sets.items():
        row = {method: _score(model, examples, most) for method, (model, most) in methods.items()}
        looped[name] = row["with its loop"]
        figures[name] = {method: report.to_json() for method, report in row.items()}
        rule = looped[name].baselines["depth_rule"]
        print(f"| {name} | {len(examples)} | {rule:.3f} |", *(f"{_cell(report)} |" for report in row.values()))
    for name, report in looped.items():
        _print_levels(name, report)
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


def _score(model: LatentReasoner, examples: list[Example], most: int | None) -> Evaluation:
    return evaluate(model, ProsQA(), examples, settings=LoopSettings.resolve(model.config.loop, max_iterations=most))


def _cell(report: Evaluation) -> str:
    low, high = report.overall.interval
    return f"{report.overall.accuracy:.3f} ({low:.3f} to {high:.3f})"


def _print_levels(name: str, report: Evaluation) -> None:
    print(f"\n{name}, with its loop, by hops:\n")
    head = "| hops | n | accuracy | mean iterations | converged | passes | relative change at t = 1, 2, ... |"
    print(head + "\n|---|---|---|---|---|---|---|")
    for hops, summary in {**report.by_difficulty, "all": report.overall}.items():
        changes = " ".join("-" if change is None else f"{change:.2f}" for change in summary.relative_change)
        print(
            f"| {hops} | {summary.questions} | {summary.accuracy:.3f} | {summary.iterations:.2f} "
            f"| {summary.converged:.1%} | {summary.forward_passes:.2f} | {changes} |"
        )


if __name__ == "__main__":
    main()

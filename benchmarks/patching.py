"""Replace one thought of the bundled checkpoint by the rival's frontier, and count whose answer follows.

python -m benchmarks.patching --out benchmarks/results/findings/patching.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.prosqa import SEED, Bar
from slr_core.evaluation.patching import PATCHES, measure_patching, pair_with_rival
from slr_core.evaluation.run import identify_model
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.prosqa import ProsQA
from slr_core.tasks.sources import load_questions


def main() -> None:
    """Run all patches and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the bundled checkpoint)")
    parser.add_argument("--questions", type=int, default=500, help="number of generated questions")
    parser.add_argument("--hops", type=int, default=5, help="hops of every question")
    parser.add_argument("--iterations", type=int, default=8, help="iterations of every loop")
    parser.add_argument("--out", type=Path, help="file to write the figures to, as JSON")
    options = parser.parse_args()

    graphs = {"nodes": 28, "min_hops": options.hops, "max_hops": options.hops, "balanced": True}
    questions = load_questions(ProsQA(), generate=options.questions, seed=SEED, generator_options=graphs)
    pairs = [pair for example in questions.examples if (pair := pair_with_rival(example)) is not None]
    reasoner = LatentReasoner.from_pretrained(options.model).eval()
    deepest = min(options.hops, options.iterations)
    with Bar(len(pairs) * (1 + deepest * len(PATCHES))) as bar:
        scores = measure_patching(reasoner, pairs, iterations=options.iterations, progress=bar.advance)
    print("| patch | t | n | own answer | rival's answer (95 % interval) |\n|---|---|---|---|---|")
    for s in scores:
        low, high = s.interval
        print(
            f"| {s.patch or 'none'} | {'-' if s.t is None else s.t} | {s.questions} | {s.own:.3f} "
            f"| {s.rival:.3f} ({low:.3f} to {high:.3f}) |"
        )
    if options.out:
        record = {
            "manifest": {
                "command": shlex.join(["python", "-m", "benchmarks.patching", *sys.argv[1:]]),
                "seed": SEED,
                "questions": len(pairs),
                "questions_sha256": questions.sha256,
                "source": questions.source,
                "iterations": options.iterations,
                "model": identify_model(options.model),
            },
            "rows": [asdict(score) for score in scores],
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

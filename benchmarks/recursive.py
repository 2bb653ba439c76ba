"""What recursive conversion buys on a small model: train, evaluate, and build docs/recursive.md.

    python -m benchmarks.recursive                  train and evaluate what is missing, then build the page
    python -m benchmarks.recursive --page           build the page from the committed rows alone

A plain model of four layers (`configs/recursive/plain.yaml`) is trained on p-hop induction. Every other model is made
of it or trained beside it, on the same task. Rows are kept in benchmarks/results/recursive.json, one per model and
seed; finished ones are not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from slr_core import LatentReasoner, LoopParams
from slr_core.checkpoint.info import describe_model
from slr_core.checkpoint.init import Recursive, init_checkpoint
from slr_core.config import Criterion, validated
from slr_core.evaluation.plots import CurvePoint, draw_curves
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.tasks import get_task
from slr_core.training.config import TrainConfig
from slr_core.training.trainer import MANIFEST, train

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs/recursive/plain.yaml"
ROWS = ROOT / "benchmarks/results/recursive.json"
PAGE = ROOT / "docs/recursive.md"
QUESTIONS, EXIT_QUESTIONS, SEED = 1024, 256, 20261128
CRITERIA: dict[Criterion, tuple[float, ...]] = {
    "relative_change": (0.1, 0.3),
    "cosine": (0.01, 0.05),
    "kl": (0.01, 0.1),
    "argmax_stable": (0.5,),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """One model of the study.

    Attributes:
        name: in tables.
        steps: of training, after those of the plain model if it is made of it.
        recursive: the conversion; ``None``: not made of the plain model's layers.
        fresh: settings of the recipe that replace what the conversion starts from: new adapters, or none.
        base: sizes of a model from random weights.
        loops: iterations in training; 0: no loop.
    """

    name: str
    steps: int
    recursive: Recursive | None = None
    fresh: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    loops: int = 2


def loop(loops: int, lora: dict[str, Any]) -> dict[str, Any]:
    """The loop of a recursive model."""
    return {
        "workspace": "token",
        "feedback": "raw",
        **dict.fromkeys(("trained_iterations", "max_iterations"), loops),
        "lora": lora,
        "projection": {"kind": "identity"},
        "timestep": {"kind": "none"},
        "residual": {"source": "none"},
        "convergence": {"criterion": "fixed"},
    }


def models(plain_steps: int, steps: int) -> list[Model]:
    """The models, those of the first table first."""
    new = {"kind": "per_iteration", "rank": 8, "alpha": 8.0}
    return [
        Model("4 layers, trained on", steps, loops=0),
        Model("2 layers x 2, rank 8", steps, Recursive(2, 8)),
        Model("2 layers x 2, rank 8, random adapters", steps, Recursive(2, 8), fresh=loop(2, new)),
        Model("2 layers x 2, no adapters", steps, Recursive(2, 8), fresh=loop(2, {"kind": "none"})),
        Model("2 layers x 2, rank 2", steps, Recursive(2, 2)),
        Model("2 layers x 2, rank 32", steps, Recursive(2, 32)),
        Model("2 layers x 2, full rank", steps, Recursive(2)),
        Model("1 layer x 4, rank 32", steps, Recursive(4, 32), loops=4),
        Model("2 layers from scratch", plain_steps + steps, base={"num_hidden_layers": 2}, loops=0),
        Model(
            "2 layers x 2 from scratch",
            plain_steps + steps,
            base={"num_hidden_layers": 2},
            fresh=loop(2, {"kind": "none"}),
        ),
    ]


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="build the page and run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/recursive", help="folder for the models")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds: 0, 1, ...")
    parser.add_argument("--steps", type=int, default=100, help="steps after those of the plain model")
    options = parser.parse_args()
    if not options.page:
        for seed in range(options.seeds):
            run_seed(options.out, seed, options.steps)
    build_page(read_rows())


def run_seed(out: Path, seed: int, steps: int) -> None:
    """Train and evaluate the models of one seed that have no row yet."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8")) | {"seed": seed}
    plain_steps = recipe["stages"][0]["steps"]
    plain = out / f"plain_{seed}"
    run(recipe | {"output_dir": str(plain)})
    original = LatentReasoner.from_pretrained(str(plain))
    original.tokenizer.save_pretrained(plain / "base")  # a language model of its own
    plan = models(plain_steps, steps)
    done = {(row["model"], row["seed"]) for row in read_rows()}
    if ("4 layers", seed) not in done:
        add_row(evaluate("4 layers", seed, plain_steps, original, 0))
    for number, model in enumerate(plan):
        if (model.name, seed) in done:
            continue
        folder = out / f"{number:02d}_{seed}"
        before: Row = {}
        changes: Row = {"output_dir": str(folder), "log_steps": 10}
        stage = recipe["stages"][0] | {"steps": model.steps}
        if model.loops:
            # Every exit is drawn about as often.
            drawn = {"mean": 1 + model.loops / 2, "sigma": 0.5, "least": 1, "most": model.loops}
            stage, changes["max_iterations"] = stage | {"iterations": drawn}, None
        if model.base is not None:
            changes["base"] = recipe["base"] | model.base
        elif model.recursive is None:
            changes["base"] = {"from": str(plain)}
        else:
            start = out / f"start_{number:02d}_{seed}"
            if not start.exists():
                init_checkpoint(str(plain / "base"), start, recursive=model.recursive)
            if model.fresh is None:
                before = evaluate("", seed, 0, LatentReasoner.from_pretrained(str(start)), model.loops)
            changes |= {"base": {"from": str(start)}, "teacher": str(plain / "base")}
            changes["objectives"] = {"answer": 1.0, "teacher_logits": 1.0}
        if model.base is None:
            changes["loop"] = model.fresh
            changes["optimizer"] = recipe["optimizer"] | {"warmup_steps": 10}
        elif model.fresh is not None:
            changes["loop"] = model.fresh
        run(recipe | changes | {"stages": [stage], "save_steps": model.steps})
        row = evaluate(model.name, seed, model.steps, LatentReasoner.from_pretrained(str(folder)), model.loops)
        if before:
            row["before"] = before["by_iteration"]
        add_row(row | {"training_loss": losses(folder)})


def run(recipe: Row) -> None:
    """Train a recipe unless it is finished; an interrupted run continues."""
    folder = Path(recipe["output_dir"])
    if not (folder / MANIFEST).exists():
        config = validated(TrainConfig, {key: value for key, value in recipe.items() if value is not None})
        train(config, resume=(folder / "steps").is_dir())


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and answer loss of a training, from the Trainer's log."""
    (state,) = folder.glob("steps/checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return [(entry["step"], entry["answer"]) for entry in history if "answer" in entry]


@torch.inference_mode()
def evaluate(name: str, seed: int, steps: int, reasoner: LatentReasoner, loops: int) -> Row:
    """Loss and accuracy of the letter by iterations, also past the trained depth; and early exit by criterion."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    data, task = recipe["stages"][0]["data"][0], get_task("p_hop")
    examples = list(islice(task.generate(SEED, **data["generator_options"]), QUESTIONS))
    tokenizer = reasoner.tokenizer
    prompts = tokenizer([example.question for example in examples], padding=True, return_tensors="pt")
    labels = torch.tensor([tokenizer(example.answer, add_special_tokens=False).input_ids[:1] for example in examples])
    sizes = describe_model(reasoner)
    layers = int(reasoner.base.config.num_hidden_layers)
    by_iteration = []
    for t in (0,) if loops == 0 else range(1, 2 * loops + 1):
        logits = reasoner(prompts.input_ids, prompts.attention_mask, iterations=t).logits[:, 0]
        by_iteration.append(
            {
                "t": t,
                "loss": float(F.cross_entropy(logits, labels[:, 0])),
                "accuracy": float((logits.argmax(-1) == labels[:, 0]).float().mean()),
                "layer_passes": layers * max(1, t),
            }
        )
    return {
        "model": name,
        "seed": seed,
        "steps": steps,
        "loops": loops,
        "parameters": sizes.base_parameters + sizes.added_parameters,
        "by_iteration": by_iteration,
        "exits": list(exits(reasoner, examples[:EXIT_QUESTIONS], loops)) if loops > 2 and name else [],
    }


def exits(reasoner: LatentReasoner, examples: list[Any], loops: int) -> Iterator[Row]:
    """Accuracy and mean iterations with each criterion. No criterion but `survival` can end a loop at t = 1."""
    for criterion, thresholds in CRITERIA.items():
        for threshold in thresholds:
            params = LoopParams(max_iterations=loops, min_iterations=1, criterion=criterion, threshold=threshold)
            requests = [prepare(reasoner, example.question, params, max_new_tokens=1) for example in examples]
            results = generate(reasoner, requests)
            right = [r.text.strip() == example.answer for r, example in zip(results, examples, strict=True)]
            yield {
                "criterion": criterion,
                "threshold": threshold,
                "iterations": fmean(result.iterations for result in results),
                "accuracy": fmean(right),
            }


def read_rows() -> list[Row]:
    """The rows so far."""
    rows: list[Row] = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else []
    return rows


def add_row(row: Row) -> None:
    """Keep a row."""
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    ROWS.write_text(json.dumps([*read_rows(), row], indent=1) + "\n", encoding="utf-8")
    print(row["model"], row["seed"], row["by_iteration"], flush=True)


# -- the page --------------------------------------------------------------------------------------------


def build_page(rows: list[Row]) -> None:
    """Replace the tables of the page, and draw its plots."""
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in (("models", table(rows)), ("start", starts(rows)), ("exits", exit_table(rows))):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = head + begin + "\n".join(lines) + "\n" + end + tail
    PAGE.write_text(text, encoding="utf-8")
    curves = {
        row["model"]: [CurvePoint(step, exp(-loss), (exp(-loss),) * 2) for step, loss in row["training_loss"]]
        for row in rows
        if row["seed"] == 0 and row["model"].startswith("2 layers x 2, rank 8")
    }
    if curves:
        title = "Answer in training, rank 8: from the decomposition, and from random adapters"
        drawn = draw_curves(curves, title=title, x_label="step", y_label="exp(-loss), mean probability of a token")
        (PAGE.parent / "recursive.svg").write_text(drawn, encoding="utf-8")


def table(rows: list[Row]) -> Iterator[str]:
    """Accuracy and loss by number of iterations."""
    yield "| model | seeds | parameters | steps | t | layer passes a token | loss | accuracy |"
    yield "|---|---|---|---|---|---|---|---|"
    for same in by_model(rows):
        first = same[0]
        for i, point in enumerate(first["by_iteration"]):
            loss, accuracy = (fmean(row["by_iteration"][i][key] for row in same) for key in ("loss", "accuracy"))
            name = (
                f"{first['model']} | {len(same)} | {first['parameters']:,} | {first['steps']}" if i == 0 else " | | | "
            )
            past = " (past its depth)" if first["loops"] and point["t"] > first["loops"] else ""
            t = "–" if first["loops"] == 0 else f"{point['t']}{past}"
            yield f"| {name} | {t} | {point['layer_passes']} | {loss:.3f} | {accuracy:.3f} |"


def starts(rows: list[Row]) -> Iterator[str]:
    """Recursive models before any training."""
    yield "| model | loss before training | after | accuracy before | after |"
    yield "|---|---|---|---|---|"
    for same in by_model(row for row in rows if "before" in row):
        t = same[0]["loops"] - 1
        cells = [
            f"{fmean(row[when][t][key] for row in same):.3f}"
            for key in ("loss", "accuracy")
            for when in ("before", "by_iteration")
        ]
        yield f"| {same[0]['model']} | {' | '.join(cells)} |"


def exit_table(rows: list[Row]) -> Iterator[str]:
    """Accuracy against mean iterations, by criterion."""
    yield "| model | criterion | threshold | mean iterations | accuracy |"
    yield "|---|---|---|---|---|"
    for same in by_model(row for row in rows if row["exits"]):
        for i, point in enumerate(same[0]["exits"]):
            iterations, accuracy = (fmean(row["exits"][i][key] for row in same) for key in ("iterations", "accuracy"))
            named = f"{same[0]['model']} | `{point['criterion']}` | {point['threshold']:g}"
            yield f"| {named} | {iterations:.2f} | {accuracy:.3f} |"


def by_model(rows: Any) -> Iterator[list[Row]]:
    """The rows of each model, in the order of their first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["model"], []).append(row)
    yield from groups.values()


if __name__ == "__main__":
    main()

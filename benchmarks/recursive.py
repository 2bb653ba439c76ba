"""What recursive conversion buys on a small model: train, evaluate, and build docs/recursive.md.

    python -m benchmarks.recursive                  train and evaluate what is missing, then build the page
    python -m benchmarks.recursive --page           build the page from the committed rows alone

A plain model of four layers (`configs/recursive/plain.yaml`) is trained on p-hop induction. Every other model is made
of it or trained beside it, on the same task. Some are trained on state tracking and on plain text too. Rows are kept in
benchmarks/results/recursive.json, one per task, model and seed; finished ones are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.recursive_page import Row, build_page
from slr_core import LatentReasoner, LoopParams
from slr_core.checkpoint.info import describe_model
from slr_core.checkpoint.init import Recursive, init_checkpoint
from slr_core.config import Criterion
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.model.looped import IGNORE
from slr_core.tasks import Example, get_task
from slr_core.training.config import TrainConfig
from slr_core.training.sources import CONTINUES, open_source
from slr_core.training.stages import DataConfig
from slr_core.training.trainer import MANIFEST, train
from slr_core.validation import validated
from slr_core.yaml_text import parse_yaml

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs/recursive/plain.yaml"
ROWS = ROOT / "benchmarks/results/recursive.json"
QUESTIONS, EXIT_QUESTIONS, EVALUATION_BATCH, SEED = 1024, 256, 128, 20261128
CRITERIA: dict[Criterion, tuple[float, ...]] = {
    "relative_change": (0.1, 0.3),
    "cosine": (0.01, 0.05),
    "kl": (0.01, 0.1),
    "argmax_stable": (0.5,),
    "entropy_change": (0.03, 0.1, 0.3),
    "survival": (0.3, 0.5, 0.7, 0.9),
}
TEXT_CHARACTERS, TEXT_QUESTIONS = 160, 20_000


@dataclass(frozen=True)
class Study:
    """A task to train on.

    Attributes:
        data: a stage's data in the recipe.
        every: train all models; otherwise those of :data:`FEW`.
        seeds: largest number of training seeds.
    """

    data: dict[str, Any]
    every: bool = False
    seeds: int = 1

    def recipe(self, out: Path, seed: int) -> Row:
        """The plain model's recipe on this task."""
        recipe: Row = parse_yaml(RECIPE.read_text(encoding="utf-8")) | {"seed": seed}
        data = dict(self.data)
        if "text" in data:
            data["text"] = str(write_text(out / "word_problems.txt", 0))
            recipe["objectives"] = {"answer": 1.0, "text": 1.0}
        recipe["stages"][0]["data"] = [data]
        return recipe

    def examples(self, out: Path, count: int) -> list[Example]:
        """Examples that no model was trained on."""
        if "text" in self.data:
            held_out = DataConfig(
                text=str(write_text(out / "word_problems_held_out.txt", SEED)), characters=TEXT_CHARACTERS
            )
            return list(open_source(held_out, SEED).draw(0, count, random.Random(SEED)))
        options = self.data.get("generator_options", {})
        return list(islice(get_task(self.data["task"]).generate(SEED, **options), count))


STUDIES = {
    "p_hop": Study(parse_yaml(RECIPE.read_text(encoding="utf-8"))["stages"][0]["data"][0], every=True, seeds=3),
    "text": Study({"text": "", "characters": TEXT_CHARACTERS}),
    "state_tracking": Study({"task": "state_tracking", "generator_options": {"elements": 3, "length": 3}}),
}
FEW = (
    "4 layers, trained on",
    "2 layers x 2, rank 8",
    "2 layers x 2, rank 8, random adapters",
    "2 layers x 2, no adapters",
    "2 layers from scratch",
    "2 layers x 2 from scratch",
)


def write_text(path: Path, seed: int) -> Path:
    """Write plain text: the questions of generated word problems, one after another."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        examples = islice(get_task("word_problems").generate(seed), TEXT_QUESTIONS)
        path.write_text(" ".join(example.question for example in examples), encoding="utf-8")
    return path


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
        # One iteration without an adapter is the plain model, trained for the same objectives as loops are.
        Model(
            "2 layers from scratch",
            plain_steps + steps,
            base={"num_hidden_layers": 2},
            fresh=loop(1, {"kind": "none"}),
            loops=1,
        ),
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
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of p-hop induction: 0, 1, ...")
    parser.add_argument("--steps", type=int, default=100, help="steps after those of the plain model")
    options = parser.parse_args()
    if not options.page:
        for seed in range(options.seeds):
            for task, study in STUDIES.items():
                if seed < study.seeds:
                    run_seed(options.out, task, seed, options.steps)
    build_page(read_rows())


def run_seed(out: Path, task: str, seed: int, steps: int) -> None:
    """Train and evaluate the models of one task and seed that have no row yet."""
    study, end = STUDIES[task], f"{seed}" if task == "p_hop" else f"{task}_{seed}"
    recipe = study.recipe(out, seed)
    plain_steps = recipe["stages"][0]["steps"]
    plain = out / f"plain_{end}"
    run(recipe | {"output_dir": str(plain)})
    original = LatentReasoner.from_pretrained(str(plain))
    original.tokenizer.save_pretrained(plain / "base")  # a language model of its own
    plan = [model for model in models(plain_steps, steps) if study.every or model.name in FEW]
    done = {(row["task"], row["model"], row["seed"]) for row in read_rows()}
    examples = study.examples(out, QUESTIONS)
    if (task, "4 layers", seed) not in done:
        add_row(
            {"task": task, "model": "4 layers", "seed": seed, "steps": plain_steps} | evaluate(original, examples, 0)
        )
    for number, model in enumerate(plan):
        if (task, model.name, seed) in done:
            continue
        folder = out / f"{number:02d}_{end}"
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
            start = out / f"start_{number:02d}_{end}"
            if not start.exists():
                settings = out / "halting_head.yaml"
                settings.write_text("halting_head: true\n", encoding="utf-8")
                config = settings if model.loops > 2 else None
                init_checkpoint(str(plain / "base"), start, config, recursive=model.recursive)
            if model.fresh is None:
                before = evaluate(LatentReasoner.from_pretrained(str(start)), examples, model.loops)
            changes |= {"base": {"from": str(start)}, "teacher": str(plain / "base")}
            # The halting head learns from states and losses that it does not change.
            halting = {"halting": 1.0} if model.loops > 2 else {}
            changes["objectives"] = recipe["objectives"] | {"teacher_logits": 1.0} | halting
        if model.base is None:
            changes["loop"] = model.fresh
            changes["optimizer"] = recipe["optimizer"] | {"warmup_steps": 10}
        elif model.fresh is not None:
            changes["loop"] = model.fresh
        run(recipe | changes | {"stages": [stage], "save_steps": model.steps})
        trained = LatentReasoner.from_pretrained(str(folder))
        row = {"task": task, "model": model.name, "seed": seed, "steps": model.steps}
        row |= evaluate(trained, examples, model.loops)
        if before:
            row["before"] = before["by_iteration"]
        if model.loops > 2:
            row["exits"] = list(exits(trained, examples[:EXIT_QUESTIONS], model.loops))
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
def evaluate(reasoner: LatentReasoner, examples: list[Example], loops: int) -> Row:
    """Loss per answer token, and the share of answers that are right, by iterations, also past the trained depth.

    Answers are read teacher-forced: an answer is right if all of its tokens are the likeliest ones, as in greedy
    decoding. Of plain text, which has no right answer, it is the share of tokens.
    """
    tokenizer = reasoner.tokenizer
    sizes = describe_model(reasoner)
    layers = int(reasoner.base.config.num_hidden_layers)
    is_text = any(example.extra.get(CONTINUES) for example in examples)
    by_iteration = []
    for t in (0,) if loops == 0 else range(1, 2 * loops + 1):
        total, tokens, right, count = 0.0, 0, 0, 0
        for start in range(0, len(examples), EVALUATION_BATCH):
            batch = examples[start : start + EVALUATION_BATCH]
            prompts = tokenizer([example.question for example in batch], padding=True, return_tensors="pt")
            answers = [torch.tensor(tokenizer(x.answer, add_special_tokens=False).input_ids) for x in batch]
            labels = pad_sequence(answers, batch_first=True, padding_value=IGNORE)
            logits = reasoner(prompts.input_ids, prompts.attention_mask, labels=labels, iterations=t).logits
            present = labels != IGNORE
            total += float(
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
            )
            tokens += int(present.sum())
            hits = (logits.argmax(-1) == labels) | ~present
            right += int(hits[present].sum()) if is_text else int(hits.all(-1).sum())
            count += int(present.sum()) if is_text else len(batch)
        by_iteration.append(
            {"t": t, "loss": total / tokens, "accuracy": right / count, "layer_passes": layers * max(1, t)}
        )
    return {"loops": loops, "parameters": sizes.base_parameters + sizes.added_parameters, "by_iteration": by_iteration}


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


if __name__ == "__main__":
    main()

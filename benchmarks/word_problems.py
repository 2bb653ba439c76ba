"""Word problems: a loop over a language model beside its controls, in accuracy, passes and time.

    python -m benchmarks.word_problems --models runs/word_problems --out benchmarks/results/word_problems

Reads the checkpoints that the recipes of ``configs/word_problems`` leave in one folder; those that are not there have
no row, or that of an earlier run in ``--out``, without its time. All answer the same questions, greedily: held-out
wordings of the generated task, and the first questions of SVAMP, ASDiv and GSM-Hard where the folder ``--data`` has
them; an interrupted run goes on with the rows that it has in ``--out``, if models and questions are the same. Then each
answers the first questions alone, one after another, on one thread, all sides in turn: processor time of an answer.
There, llama.cpp runs the model that writes its steps as equations, too, merged and exported to GGUF in F16 and rounded
to 8 bits. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.engine import _processor as processor
from slr_core.checkpoint.folder import CONFIG
from slr_core.checkpoint.gguf_export import export_gguf
from slr_core.checkpoint.gguf_layout import TensorType
from slr_core.engine.runner.device import load_reasoner
from slr_core.evaluation.backends import GenerationOptions, Local
from slr_core.evaluation.outcomes import MethodAnswer
from slr_core.evaluation.run import identify_model
from slr_core.evaluation.statistics import wilson_interval
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.base import OptionValue
from slr_core.tasks.registry import get_task
from slr_core.tasks.sources import Questions, load_questions

SEED, BATCH, STEP_TOKENS = 20261129, 16, 64
HELD_OUT: dict[str, OptionValue] = {"max_steps": 3, "templates": "held_out"}
TRANSFER = ("svamp", "asdiv", "gsm_hard")
DATA = Path(__file__).parents[2] / "shared" / "data"
WRITES = "steps as equations"
IN_WORDS = "steps in words"
CHAINS = (WRITES, IN_WORDS)


@dataclass(frozen=True)
class Method:
    """A row: a checkpoint's folder, and how it answers.

    Attributes:
        folder: below ``--models``.
        loop: loop parameters of its requests; empty: the checkpoint's own.
        tokens: longest answer; ``None``: the checkpoint's own.
        changes: of the checkpoint's config, as for :meth:`SLRConfig.replace`.
    """

    folder: str
    loop: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The same for methods that can share a loaded model."""
        return f"{self.folder} {self.changes}"


def _fixed(iterations: int) -> dict[str, Any]:
    return {"criterion": "fixed", "max_iterations": iterations, "min_iterations": iterations}


WRITTEN = {"text": {"answer_prefix": ""}}

METHODS = {
    "base, zero-shot": Method("fresh", _fixed(0), STEP_TOKENS),
    "answer at once": Method("no_cot", _fixed(0)),
    "pause, 6 vectors": Method("pause", _fixed(6)),
    "pause as thought, 6 vectors": Method("pause_as_thought", _fixed(6)),
    "loop `append`, 6 thoughts": Method("append", _fixed(6)),
    "loop `block`, 8 iterations": Method("block", _fixed(8)),
    "loop `soft`, 8 thoughts": Method("soft", _fixed(8)),
    "loop `soft`, own exit": Method("soft"),
    "`soft`, its chain written": Method("soft", _fixed(0), STEP_TOKENS, WRITTEN),
    WRITES: Method("cot", _fixed(0), STEP_TOKENS),
    IN_WORDS: Method("cot_words", _fixed(0), 2 * STEP_TOKENS),
}


@dataclass
class Row:
    """What was measured of a method; ``of`` identifies its model, settings and questions."""

    of: str
    right: dict[str, tuple[int, int]] = field(default_factory=dict)
    tokens: float = 0.0
    passes: float = 0.0
    milliseconds: float | None = None


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/word_problems"), help="folder with the checkpoints")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with svamp, asdiv and gsm_hard")
    parser.add_argument("--questions", type=int, default=500, help="held-out questions (default: 500)")
    parser.add_argument("--transfer", type=int, default=200, help="questions of each transfer set (default: 200)")
    parser.add_argument("--alone", type=int, default=20, help="questions answered alone (default: 20)")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="file to write, without its suffix: .md and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = question_sets(options.data, options.questions, options.transfer)
    sides: dict[str, Callable[[str], object]] = {}
    rows: dict[str, Row] = {}
    backends: dict[str, Local] = {}
    known = read_rows(options.out) if options.out is not None else {}
    for name in options.only:
        method = METHODS[name]
        if not (options.models / method.folder / CONFIG).exists():
            print(f"{name}: no checkpoint {options.models / method.folder}", flush=True)
            if name in known and _counts(known[name]) == [len(questions.examples) for _, questions in sets.values()]:
                rows[name] = replace(known[name], milliseconds=None)  # it says nothing beside those of this run
            continue
        if method.model not in backends:
            backends[method.model] = Local(load(options.models / method.folder, method.changes), threads=1)
        sides[name] = _alone(backends[method.model], method)
        rows[name] = Row(_identity(options.models, method, sets))
        if name in known and known[name].of == rows[name].of:
            rows[name] = known[name]
            continue
        for title, (task, questions) in sets.items():
            grade(rows[name], f"{name}, {title}", title, task, questions, backends[method.model], method)
        print(name, rows[name], flush=True)
        if options.out is not None:
            write_rows(options.out, rows)
    with tempfile.TemporaryDirectory() as folder:
        if WRITES in rows:
            kinds: tuple[TensorType, ...] = ("F16", "Q8_0")
            for kind in kinds:
                file = Path(folder) / f"{kind}.gguf"
                export_gguf(str(options.models / METHODS[WRITES].folder), file, "smollm2", kind)
                name = f"{WRITES}, llama.cpp {kind}"
                rows[name] = Row(kind)
                sides[name] = llama_cpp(file, backends[METHODS[WRITES].model], sets["held out"], rows[name])
        time_alone(rows, sides, [example.question for example in sets["held out"][1].examples[: options.alone]])
    lines = table(rows, sets, options.alone)
    print(*lines, sep="\n")
    if options.out is not None:
        options.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_rows(options.out, rows)


def read_rows(out: Path) -> dict[str, Row]:
    """The rows of an earlier run; none if there are none."""
    file = out.with_suffix(".json")
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: Row(**fields) for name, fields in record.items() if "of" in fields}


def write_rows(out: Path, rows: dict[str, Row]) -> None:
    """Write what has been measured so far."""
    record = {name: vars(row) for name, row in rows.items()}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _counts(row: Row) -> list[int]:
    return [count for _, count in row.right.values()]


def _identity(models: Path, method: Method, sets: dict[str, tuple[Any, Questions]]) -> str:
    model = identify_model(str(models / method.folder))["sha256"]
    parts = [model, method, *(questions.sha256 for _, questions in sets.values())]
    return sha256(str(parts).encode()).hexdigest()[:16]


def question_sets(data: Path, held_out: int, transfer: int) -> dict[str, tuple[Any, Questions]]:
    """The questions by name, each with its task."""
    task = get_task("word_problems")
    sets = {"held out": (task, load_questions(task, generate=held_out, seed=SEED, generator_options=HELD_OUT))}
    for name in TRANSFER:
        if (file := data / name / "test.jsonl.gz").is_file() and transfer:
            sets[name] = get_task(name), load_questions(get_task(name), data=file, limit=transfer)
    return sets


def load(folder: Path, changes: dict[str, Any]) -> LatentReasoner:
    """A checkpoint in bfloat16, with changes of its config."""
    reasoner = load_reasoner(str(folder), dtype="bfloat16")
    reasoner.config = reasoner.config.replace(**changes)
    return reasoner


def grade(row: Row, about: str, title: str, task: Any, questions: Questions, backend: Local, method: Method) -> None:
    """Answer a set of questions, many at once, and count the right answers."""
    options, answers = GenerationOptions(method.loop, method.tokens), list[MethodAnswer]()
    for start in track(range(0, len(questions.examples), BATCH), about):
        some = questions.examples[start : start + BATCH]
        found = backend.answer([example.question for example in some], options, range(start, start + len(some)))
        answers += [samples[0] for samples in found]
    right = sum(task.grade(example, a.text) for example, a in zip(questions.examples, answers, strict=True))
    row.right[title] = right, len(answers)
    if title == "held out":
        row.tokens = sum(a.tokens for a in answers) / len(answers)
        row.passes = sum(a.forward_passes for a in answers) / len(answers)


def _alone(backend: Local, method: Method) -> Callable[[str], object]:
    options = GenerationOptions(method.loop, method.tokens)
    return lambda prompt: backend.answer([prompt], options, [0])


def llama_cpp(file: Path, ours: Local, held_out: tuple[Any, Questions], row: Row) -> Callable[[str], object]:
    """Answers by llama.cpp's server, without its HTTP; grades the held-out questions first."""
    import xllamacpp  # type: ignore[import-untyped]

    parameters: Any = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_parallel, parameters.n_ctx = 1, 1024
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.n_gpu_layers, parameters.cache_prompt, parameters.verbosity = 0, False, 0
    server: Any = xllamacpp.Server(parameters)
    wrap, tokenizer = ours.reasoner.config.text.wrap_prompt, ours.reasoner.tokenizer

    def complete(prompt: str) -> Any:
        body = {"n_predict": STEP_TOKENS, "temperature": 0.0, "cache_prompt": False}
        return server.handle_completions({"prompt": tokenizer(wrap(prompt)).input_ids, **body})

    task, questions = held_out
    found = [complete(example.question) for example in track(questions.examples, f"llama.cpp, {file.name}")]
    texts = [answer["choices"][0]["text"] for answer in found]
    right = sum(task.grade(example, text) for example, text in zip(questions.examples, texts, strict=True))
    row.right["held out"] = right, len(texts)
    row.tokens = row.passes = sum(answer["usage"]["completion_tokens"] for answer in found) / len(found)
    return complete


def time_alone(rows: dict[str, Row], sides: dict[str, Callable[[str], object]], prompts: list[str]) -> None:
    """Mean processor time of an answer, each question alone; the sides take turns."""
    spent = dict.fromkeys(sides, 0.0)
    for answer in sides.values():
        answer(prompts[0])
    for prompt in track(prompts, "alone"):
        for name, answer in sides.items():
            began = time.process_time()
            answer(prompt)
            spent[name] += time.process_time() - began
    for name, seconds in spent.items():
        rows[name].milliseconds = 1000 * seconds / len(prompts)


def table(rows: dict[str, Row], sets: dict[str, tuple[Any, Questions]], alone: int) -> list[str]:
    """The figures as Markdown."""
    held_out = sets["held out"][1]
    lines = [
        f"`python -m benchmarks.word_problems`, {processor()}, torch {torch.__version__}, `bfloat16`, one thread",
        "",
        f"{len(held_out.examples)} held-out questions of two or three steps (seed {SEED}, SHA-256 "
        f"`{held_out.sha256[:16]}`); time: processor time of an answer, {alone} questions alone; passes: forward "
        "passes of an answer, that over the prompt included. Rows without a time are those of an earlier run.",
        "",
        f"| | {' | '.join(sets)} | tokens | passes | ms | {' | '.join(f'to {name}' for name in CHAINS)} |",
        "|---" * (4 + len(CHAINS) + len(sets)) + "|",
    ]
    for name, row in rows.items():
        cells = []
        for title in sets:
            if title not in row.right:
                cells.append("-")
                continue
            right, count = row.right[title]
            low, high = wilson_interval(right, count)
            cells.append(f"{right / count:.3f} ({low:.3f} to {high:.3f})")
        time_ms = "-" if row.milliseconds is None else f"{row.milliseconds:.0f}"
        cells += [f"{row.tokens:.1f}", f"{row.passes:.1f}", time_ms]
        for chain in CHAINS:
            base = rows[chain].milliseconds if chain in rows else None
            cells.append("-" if base is None or row.milliseconds is None else f"{row.milliseconds / base:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()

"""``slr generate``."""

from __future__ import annotations

import sys
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slr_core.cli.batch import Input, RayEngines, run_file
from slr_core.cli.options import (
    AsJson,
    CriterionName,
    Device,
    Dtype,
    MaxIterations,
    MaxNewTokens,
    MinIterations,
    Model,
    Output,
    Patience,
    QuantizationName,
    Seed,
    Temperature,
    Threshold,
    TopK,
    TopP,
    load_model,
    show_results,
)
from slr_core.cli.streaming import print_stream
from slr_core.errors import ConfigError
from slr_core.params import LoopParams, SamplingParams

if TYPE_CHECKING:
    from slr_core.reasoner import LatentReasoner
    from slr_core.types import Messages, Result

UseTemplate = Annotated[
    bool, typer.Option("--chat", help="Format the prompt as a user message, with the checkpoint's chat template.")
]


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="Prompt; - reads standard input.", show_default=False)] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: QuantizationName = "none",
    max_iterations: MaxIterations = None,
    min_iterations: MinIterations = None,
    criterion: CriterionName = None,
    threshold: Threshold = None,
    patience: Patience = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    chat: UseTemplate = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is generated.")] = False,
    as_json: AsJson = False,
    output: Output = None,
    source: Input = None,
    ray_engines: RayEngines = None,
) -> None:
    """Answer a prompt, or a file of requests.

    The answer goes to standard output; iterations, exit reason and time go to standard error.
    """
    from slr_core.engine import Engine

    if source is not None:
        given = {"model": model, "device": device, "dtype": dtype, "quantization": quantization}
        run_file(context, source, output, ray_engines, given)
        return
    if prompt is None:
        raise typer.BadParameter("give a prompt, or --input FILE", param_hint="PROMPT")
    if ray_engines is not None:
        raise typer.BadParameter("--ray needs --input FILE")
    if stream and as_json:
        raise ConfigError("--stream and --json exclude each other")
    reasoner = load_model(model, device, dtype, quantization)
    sampling = SamplingParams(temperature, top_k, top_p, seed)
    loop = LoopParams(max_iterations, min_iterations, criterion, threshold, patience)
    text = read_prompt(prompt, chat, reasoner)
    if stream:
        with Engine(reasoner, slots=1) as engine:
            result = print_stream(engine.stream(text, sampling, loop, max_new_tokens=max_new_tokens))
    else:
        result = run_prompt(reasoner, text, loop, sampling=sampling, max_new_tokens=max_new_tokens)

    def print_text() -> None:
        if not stream:
            print(result.text)
        print(f"[{summary(result)}]", file=sys.stderr)

    show_results(result.to_dict(), print_text, as_json, output)


def read_prompt(prompt: str, chat: bool, reasoner: LatentReasoner) -> str | Messages:
    """The prompt, from standard input if it is ``-``; a chat of one user message if ``chat`` is set.

    Prints on standard error how many of its tokens the tokenizer does not know: to the model they are all the same.

    Raises:
        RequestError: the prompt is not valid Unicode.
    """
    from slr_core.generation.prepare import tokenize_text

    text = sys.stdin.read().strip() if prompt == "-" else prompt
    tokens, unknown_id = tokenize_text(reasoner, text), reasoner.tokenizer.unk_token_id
    if unknown := 0 if unknown_id is None else tokens.count(unknown_id):
        print(f"the model does not know {unknown} of the {len(tokens)} tokens of the prompt", file=sys.stderr)
    return [{"role": "user", "content": text}] if chat else text


def run_prompt(reasoner: LatentReasoner, prompt: str | Messages, loop: LoopParams, **options: Any) -> Result:
    """Answer one prompt with the reference implementation; ``options`` are those of :func:`prepare`.

    Raises:
        RequestError: the prompt is empty or too long, or an option is out of range.
    """
    from slr_core.generation.prepare import prepare
    from slr_core.generation.reference import generate

    return generate(reasoner, [prepare(reasoner, prompt, loop, **options)])[0]


def summary(result: Result) -> str:
    """Iterations, exit reason, cost and time in one line."""
    change = "" if result.final_change is None else f", last change {result.final_change:.3f}"
    iterations = f"{result.iterations} iterations"
    if result.iterations_per_token:
        iterations = f"{fmean(result.iterations_per_token):.1f} iterations per token"
    return (
        f"{iterations}, {result.exit_reason}{change}, "
        f"{result.forward_passes} forward passes, {result.timings.total_s * 1000:.0f} ms"
    )

"""``slr chat``."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from slr_core.cli.generate import summary
from slr_core.cli.options import (
    CriterionName,
    Device,
    Dtype,
    MaxIterations,
    MaxNewTokens,
    MinIterations,
    Model,
    Patience,
    QuantizationName,
    Seed,
    Temperature,
    Threshold,
    TopK,
    TopP,
    load_model,
)
from slr_core.cli.streaming import print_stream
from slr_core.errors import RequestError
from slr_core.params import LoopParams, SamplingParams
from slr_core.suggest import did_you_mean

COMMANDS = {"/reset": "start a new conversation", "/help": "list the commands", "/exit": "quit (also Ctrl-D)"}


def chat(
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: QuantizationName = "none",
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
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
) -> None:
    """Chat with a checkpoint.

    Answers are streamed. /reset starts a new conversation, /exit quits, Ctrl-C cancels an answer.
    """
    from slr_core.engine import Engine

    reasoner = load_model(model, device, dtype, quantization)
    sampling = SamplingParams(temperature, top_k, top_p, seed)
    params = sampling, LoopParams(max_iterations, min_iterations, criterion, threshold, patience)
    first = [] if system is None else [{"role": "system", "content": system}]
    with Engine(reasoner, slots=1) as engine:
        # Checks the template and the options.
        engine.prepare([*first, {"role": "user", "content": "Hello"}], *params, max_new_tokens=max_new_tokens)
        if sys.stdin.isatty():
            with suppress(ImportError):  # not on every platform
                import readline  # noqa: F401  # gives input() line editing and a history
            print("Type a message, or /help for the commands.", file=sys.stderr)
        messages = list(first)
        while (line := _read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(first)
            elif line == "/help":
                print("\n".join(f"{name}: {meaning}" for name, meaning in COMMANDS.items()))
            elif line.startswith("/"):
                print(f"slr: unknown command {line}{did_you_mean(line, COMMANDS)}", file=sys.stderr)
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    result = print_stream(engine.stream(messages, *params, max_new_tokens=max_new_tokens))
                except RequestError as error:
                    messages.pop()
                    print(f"slr: {error}", file=sys.stderr)
                except KeyboardInterrupt:
                    messages.pop()
                    print()
                    print("slr: cancelled", file=sys.stderr)
                else:
                    print(f"[{summary(result)}]", file=sys.stderr)
                    messages.append({"role": "assistant", "content": result.text})


def _read_line() -> str | None:
    """The next line of standard input; ``None`` at its end or after Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()
        return None

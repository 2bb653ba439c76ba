"""Options that several commands share, loading the model they name, and printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from typer.core import TyperCommand

from slr_core.config import Criterion
from slr_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from slr_core.reasoner import LatentReasoner

# A file or a pipe has no width: tables are not wrapped at 80 columns there.
console = Console() if sys.stdout.isatty() else Console(width=160)


def complete_model(incomplete: str) -> Iterator[str]:
    """Offer the bundled checkpoints; the shell adds files by itself."""
    from slr_core.checkpoint.folder import bundled_names

    return (name for name in bundled_names() if name.startswith(incomplete))


Model = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint: a folder, a hub id, or a bundled one, such as prontoqa. Default: prosqa.",
        autocompletion=complete_model,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Device: auto, cpu, cuda or cuda:N; auto uses a GPU if there is one.",
        autocompletion=lambda incomplete: [name for name in ("auto", "cpu", "cuda") if name.startswith(incomplete)],
    ),
]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Dtype = Annotated[
    DtypeName,
    typer.Option(
        help="Number format of the weights; auto uses the checkpoint's own if the device computes it natively, and "
        "float32 otherwise."
    ),
]
QuantizationName = Annotated[
    Literal["none", "int8", "int4"],
    typer.Option(
        "--quantization",
        help="Round the weights of linear layers to 8 or 4 bits, on a CPU; not of embeddings, LM head and adapters.",
    ),
]


def finite(value: float | None) -> float | None:
    """Refuse a number that JSON cannot hold."""
    if value is not None and not isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}")
    return value


Prompt = Annotated[str, typer.Argument(help="Prompt; - reads standard input.")]
MaxIterations = Annotated[
    int | None, typer.Option(min=0, max=256, help="Maximum number of iterations; 0 runs the base model without a loop.")
]
MinIterations = Annotated[int | None, typer.Option(min=0, max=256, help="Minimum number of iterations.")]
CriterionName = Annotated[
    Criterion | None, typer.Option("--criterion", help="Exit criterion: the distance compared with --threshold.")
]
Threshold = Annotated[
    float | None, typer.Option(min=0.0, callback=finite, help="Stop when the criterion falls below this value.")
]
Patience = Annotated[
    int | None, typer.Option(min=1, help="Number of consecutive iterations below the threshold before the loop stops.")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Maximum length of the answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 selects the likeliest token.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0 uses all tokens.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens whose probabilities add up to this.")
]
Seed = Annotated[int | None, typer.Option(help="Sampling seed.")]
API_KEY_FLAG = "--api-key"
ApiKey = Annotated[str | None, typer.Option(API_KEY_FLAG, envvar="SLR_API_KEY", help="API key of the server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]


def _check_folder(path: Path | None) -> Path | None:
    # Before the work, not after it.
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"--output {path}: the folder does not exist")
    return path


Output = Annotated[
    Path | None,
    typer.Option("--output", help="File to write the results to, as JSON.", dir_okay=False, callback=_check_folder),
]


class Command(TyperCommand):
    """A command whose ``--output`` must not replace a file that it reads, or one that it continues."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            ConfigError: ``--output`` is the file of another option.
        """
        output = ctx.params.get("output")
        for parameter in self.params:
            value = ctx.params.get(parameter.name or "")
            if parameter.name != "output" and isinstance(value, Path) and isinstance(output, Path):
                check_not_replaced(output, value, parameter.opts[0])
        return super().invoke(ctx)


def check_not_replaced(output: Path, file: Path, name: str) -> None:
    """Check that ``--output`` is not a file that would be lost.

    Raises:
        ConfigError: it is.
    """
    if output.resolve() == file.resolve():
        raise ConfigError(f"--output {output}: it is the file of {name}, which would be replaced; choose another")


def load_model(model: str | None, device: str, dtype: str, quantization: str) -> LatentReasoner:
    """Load the checkpoint that ``--model`` names, as ``--device``, ``--dtype`` and ``--quantization`` say.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ConfigError: the device is unknown or not available, or it has no quantized products.
    """
    from slr_core.engine.runner.device import load_reasoner

    hide_loading_bars()
    return load_reasoner(model, device=device, dtype=dtype, quantization=quantization)


def hide_loading_bars() -> None:
    """Keep the bars of transformers, for reading and writing weights, off standard error."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def progress_bars() -> Progress:
    """Progress bars on standard error, shown only if it is a terminal."""
    shown = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal)


def number(value: float | None) -> str:
    """Format a table cell; ``None`` is a dash."""
    return "-" if value is None else f"{value:.3f}"


def show_results(results: Any, print_text: Callable[[], None], as_json: bool, output: Path | None = None) -> None:
    """Print the results of a command, as ``--json`` says, and write them to the file of ``--output``.

    Args:
        results: what can be written as JSON.
        print_text: prints the results for a reader.
        as_json: print ``results`` as JSON instead.
        output: file to write ``results`` to, as JSON.

    Raises:
        DataError: the file cannot be written; the results are printed all the same.
    """
    text, failure = json.dumps(results, indent=2), None
    if output is not None:
        try:
            output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            failure = error
    if as_json:
        print(text)
    else:
        print_text()
    if failure is not None:
        raise DataError(f"cannot write {output}: {failure.strerror or failure}") from failure

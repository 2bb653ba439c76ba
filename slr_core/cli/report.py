"""``slr report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        Path, typer.Argument(help="Results file of eval, compare, stability, probe or sweep.", exists=True)
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md and the plots.", file_okay=False)] = Path(
        "report"
    ),
) -> None:
    """Write a report from a results file.

    The report is one self-contained HTML page, with a Markdown version and the plots beside it.
    """
    from slr_core.evaluation.report import write_report
    from slr_core.evaluation.store import Store

    for path in write_report(Store(results, read_only=True), out):
        print(path)

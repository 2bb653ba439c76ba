"""Build docs/findings.md, its tables and its plots, from the rows of finished runs.

    python -m benchmarks.findings                # or: make findings

`configs/findings/page.yaml` says what stands on the page: a section per question, and per section its parts. The
answers of all sections stand at the top of the page. A part names a file of rows in benchmarks/results/findings,
which `slr sweep --finished --output`, `slr probe --output` (see --probe) or `python -m benchmarks.patching --out`
wrote. Its sentence, `found`, belongs to one content of that file, `rows_sha256`. If the rows change, the build fails
until somebody has read the sentence again and renewed the hash. A part without rows is on the page as not run.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.findings_tables import TABLES, Pooled, Row, column_name, effects_table, grouped, variant_name
from slr_core.errors import DataError
from slr_core.evaluation.plots import CurvePoint, draw_curves
from slr_core.validation import validated
from slr_core.yaml_text import parse_yaml

ROOT = Path(__file__).parents[1]
CONTENTS = ROOT / "configs/findings/page.yaml"
ROWS = ROOT / "benchmarks/results/findings"
PAGE = ROOT / "docs/findings.md"
PLOTS = "findings"
"""Folder of the plots, beside the page."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PlotSpec(_Model):
    """A plot of a part: accuracy against a number."""

    x: Literal["iterations", "variant"] = Field(
        description="iterations: those that were forced; variant: the last number in the variant's name"
    )
    title: str
    x_label: str
    log: bool = False


class Part(_Model):
    """One study: its rows, what they are shown as, and what was found."""

    rows: str = Field(description="file of rows, without .json")
    kind: Literal["accuracy", "methods", "patching", "lens", "steps"] = "accuracy"
    title: str
    command: str
    found: str | None = Field(
        None, description="what the rows show, in one short sentence and more, a paragraph a line"
    )
    rows_sha256: str | None = Field(None, description="start of the hash of the rows for which `found` was written")
    plot: PlotSpec | None = None


class Section(_Model):
    """A research question and its studies."""

    title: str
    question: str
    answer: str = Field(description="what its studies found together, for the top of the page")
    parts: tuple[Part, ...] = ()
    effects: str | None = Field(
        None, description="what the table of all differences from the recipes shows, which stands before the parts"
    )
    missing: str | None = Field(None, description="what was not run, in words")


class Contents(_Model):
    """The file of contents."""

    introduction: str
    terms: str = Field(description="what the reader of the tables must know; below the answers")
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Built:
    """The page, and functions that draw its plots, by file name."""

    text: str
    plots: dict[str, Callable[[], str]]


def build(contents: Contents, rows: Path) -> Built:
    """Build the page.

    Raises:
        DataError: a file of rows is not one, or its sentence was written for other rows.
    """
    answers = "\n".join(f"- {_link(section.title)}: {section.answer.strip()}" for section in contents.sections)
    lines = [contents.introduction.strip(), answers, contents.terms.strip()]
    plots = dict[str, Callable[[], str]]()
    for section in contents.sections:
        lines += [f"## {section.title}", section.question]
        if section.effects is not None:
            lines += ["### All differences", *section.effects.splitlines(), effects_table(_studies(section, rows))]
        for part in section.parts:
            lines.append(f"### {part.title}")
            file = rows / f"{part.rows}.json"
            if not file.exists():
                lines.append(f"Not run yet. The command: `{part.command}`.")
                continue
            raw = file.read_bytes()
            digest = sha256(raw).hexdigest()
            if part.found is not None and not (part.rows_sha256 and digest.startswith(part.rows_sha256)):
                raise DataError(
                    f"{file.name}: `found` was written for rows of sha256 {part.rows_sha256}, these have "
                    f"{digest[:16]}: read the sentence again, then renew rows_sha256"
                )
            record = json.loads(raw)
            if part.found is not None:
                first, _, rest = part.found.strip().partition(". ")
                lines += [f"**{first.removesuffix('.')}.**", *filter(None, rest.splitlines())]
            lines += TABLES[part.kind](record)
            if part.plot is not None:
                name = f"{part.rows}.svg"
                plots[name] = partial(_draw, part.plot, record["rows"])
                lines.append(f"![{part.plot.title}]({PLOTS}/{name})")
            lines.append(_provenance(part, record, digest))
        if section.missing is not None:
            lines.append(f"Not run yet: {section.missing.strip()}")
    return Built("\n\n".join(lines) + "\n", plots)


def _studies(section: Section, rows: Path) -> list[tuple[str, list[Row]]]:
    files = [(part.title, rows / f"{part.rows}.json") for part in section.parts]
    return [(title, json.loads(file.read_bytes())["rows"]) for title, file in files if file.exists()]


def _link(title: str) -> str:
    """A link to the section of a title, by the rule of GitHub for the anchors of headings."""
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    return f"[{title}](#{anchor})"


def _draw(plot: PlotSpec, rows: Sequence[Row]) -> str:
    curves: dict[str, list[CurvePoint]] = defaultdict(list)
    variants = len(set(map(variant_name, rows)))
    if plot.x == "iterations":

        def position(row: Row) -> float | None:
            depth = row["loop"].get("max_iterations")
            return None if depth is None else float(depth)

        def curve(row: Row) -> str:
            return ", ".join(part for part in ((variant_name(row) if variants > 1 else ""), row["name"] or "") if part)
    else:

        def position(row: Row) -> float | None:
            numbers = re.findall(r"\d+", variant_name(row))
            return float(numbers[-1]) if numbers else None

        def curve(row: Row) -> str:
            base = re.sub(r"\W*\d+\D*$", "", variant_name(row)).strip(" ,=")
            return ", ".join(part for part in (base, column_name(row)) if part)

    placed = [row for row in rows if position(row) is not None]
    for (name, x), same in grouped(placed, curve, position).items():
        pooled = Pooled.of(same)
        curves[name].append(CurvePoint(x, pooled.mean, pooled.interval))
    ordered = {name: sorted(points, key=lambda point: point.x) for name, points in curves.items()}
    return draw_curves(ordered, title=plot.title, x_label=plot.x_label, log_x=plot.log) + "\n"


def _provenance(part: Part, record: dict[str, Any], digest: str) -> str:
    manifest, rows = record["manifest"], record.get("rows", [])
    hashes = {row["questions_sha256"]: row["questions"] for row in rows if "questions_sha256" in row}
    if "questions_sha256" in manifest:
        hashes = {manifest["questions_sha256"]: manifest["questions"]}
    asked = "; ".join(f"{n} of sha256 {digest[:12]}" for digest, n in hashes.items())
    seeds = sorted({row["seed"] for row in rows if row.get("seed") is not None})
    models = {row["variant"]: row["model_sha256"] for row in rows if row.get("model_sha256") and row["seed"] is None}
    if "model" in manifest:
        models = {manifest["model"]["name"]: manifest["model"]["sha256"]}
    weights = "".join(f" Model {name}: sha256 {known[:12]}." for name, known in models.items())
    trained = f" Training seeds: {', '.join(map(str, seeds))}." if seeds else ""
    return (
        f"Command: `{part.command}`. Questions: {asked}.{weights}{trained} Rows: "
        f"`benchmarks/results/findings/{part.rows}.json`, sha256 {digest[:12]}."
    )


def reduce_probe(record: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of the output of ``slr probe``: the lens by iteration, and the scores of the probes."""
    keep = ("t", "questions", "settled", "frontier", "frontier_questions", "thought_is_step")
    lens = [{key: reading[key] for key in keep} for reading in record["lens"]["readings"]]
    return {"manifest": record["manifest"], "accuracy": record["accuracy"], "lens": lens, "probes": record["probes"]}


def read_contents(path: Path = CONTENTS) -> Contents:
    """Read the file of contents.

    Raises:
        ConfigError: a field is unknown or missing.
    """
    return validated(Contents, parse_yaml(path.read_text(encoding="utf-8")))


def _write(built: Built, page: Path) -> Iterator[Path]:
    folder = page.parent / PLOTS
    folder.mkdir(exist_ok=True)
    for old in set(folder.glob("*.svg")) - {folder / name for name in built.plots}:
        old.unlink()
    page.write_text(built.text, encoding="utf-8")
    yield page
    for name, draw in built.plots.items():
        (folder / name).write_text(draw(), encoding="utf-8")
        yield folder / name


def main() -> None:
    """Build the page, or reduce an output of ``slr probe`` to rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write")
    parser.add_argument(
        "--probe", action="append", default=[], metavar="NAME=FILE", help="rows to take from an output of slr probe"
    )
    options = parser.parse_args()
    for given in options.probe:
        name, _, file = given.partition("=")
        record = reduce_probe(json.loads(Path(file).read_text(encoding="utf-8")))
        (ROWS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for path in _write(build(read_contents(), ROWS), options.page):
        print(path)


if __name__ == "__main__":
    main()

"""The results file: JSON lines that an interrupted run goes on with, and every report is made from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from slr_core.errors import DataError
from slr_core.evaluation.outcomes import Outcome


@dataclass
class MethodRun:
    """One method on one set of questions.

    Attributes:
        spec: all that decides its outcomes, as JSON: model and its hash, method and settings, task, data and
            its hash, seed. What only describes it (command, versions) lies in ``about``.
        about: further facts for the manifest.
        outcomes: by question.
    """

    spec: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """A name that two runs share exactly when their specs are equal."""
        return sha256(json.dumps(self.spec, sort_keys=True).encode("utf-8")).hexdigest()[:16]


@dataclass(frozen=True)
class StoredFigure:
    """Something computed beyond single outcomes: a stability study, probes.

    Attributes:
        kind: of figure, which a report knows how to show.
        spec: all that decides it, as for a :class:`MethodRun`.
        data: the figures, as JSON.
        about: further facts for the manifest.
    """

    kind: str
    spec: dict[str, Any]
    data: dict[str, Any]
    about: dict[str, Any]


_STARTS = (b'{"run": "', b'{"of": "', b'{"figure": "')


class Store:
    """A results file, read at once and appended to.

    A line that a crash cut short is dropped, and its question answered again. Without a path, nothing is written.

    Raises:
        DataError: the file is there and is something else.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.runs: dict[str, MethodRun] = {}
        self.figures: list[StoredFigure] = []
        self._whole: int | None = None
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def open(self, spec: dict[str, Any], about: dict[str, Any] | None = None) -> MethodRun:
        """The run of this spec: what was done of it before, or a new one."""
        run = MethodRun(spec, about or {})
        if run.id not in self.runs:
            self.runs[run.id] = run
            self._append({"run": run.id, "spec": run.spec, "about": run.about})
        return self.runs[run.id]

    def add(self, run: MethodRun, outcome: Outcome) -> None:
        """Keep an outcome, on disk before this returns."""
        run.outcomes[outcome.key] = outcome
        self._append({"of": run.id, **outcome.to_json()})

    def keep(self, kind: str, spec: dict[str, Any], data: dict[str, Any], about: dict[str, Any]) -> None:
        """Keep what was computed beyond single outcomes, in place of an earlier figure of the same kind and spec."""
        figure = StoredFigure(kind, spec, data, about)
        self._replace(figure)
        self._append({"figure": kind, "spec": spec, "data": data, "about": about})

    def kept(self, kind: str, spec: dict[str, Any]) -> dict[str, Any] | None:
        """The figures of this kind and spec, where there are any."""
        # As they come back from a file: a tuple is then a list.
        spec = json.loads(json.dumps(spec))
        return next((f.data for f in self.figures if f.kind == kind and json.loads(json.dumps(f.spec)) == spec), None)

    def _replace(self, figure: StoredFigure) -> None:
        self.figures = [f for f in self.figures if (f.kind, f.spec) != (figure.kind, figure.spec)] + [figure]

    def _append(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._whole is not None:
            # What follows would be glued to the torn line.
            os.truncate(self.path, self._whole)
            self._whole = None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def _read(self, path: Path) -> None:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from error
        whole, newline, torn = raw.rpartition(b"\n")
        if torn:
            # Only what can be one of our lines is cut off later: it could be somebody's file.
            if not any(torn.startswith(start[: len(torn)]) for start in _STARTS):
                raise DataError(f"{path}: not a results file")
            self._whole = len(whole + newline)
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                record = json.loads(line)
                if "run" in record:
                    # Two processes may both have opened it: what came in between is not lost.
                    self.runs.setdefault(record["run"], MethodRun(_object(record, "spec"), _object(record, "about")))
                elif "figure" in record:
                    facts = (_object(record, name) for name in ("spec", "data", "about"))
                    self._replace(StoredFigure(str(record["figure"]), *facts))
                else:
                    outcome = Outcome.from_json(record)
                    self.runs[record["of"]].outcomes[outcome.key] = outcome
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not a line of a results file ({error!r})") from error


def _object(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record[name]
    if not isinstance(value, dict):
        raise TypeError(f"{name} is not an object")
    return value

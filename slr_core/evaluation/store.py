"""The results file: JSON lines from which an interrupted run continues and a report is made."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from slr_core.errors import DataError
from slr_core.evaluation.outcomes import Outcome


@dataclass
class MethodRun:
    """One method on one set of questions.

    Attributes:
        spec: everything that determines the outcomes, as JSON: model and its hash, method and settings, task, data and
            its hash, seed.
        about: what only describes the run, for the manifest: command, versions.
        outcomes: by question.
        line: number of its line in the file that it was read from.
    """

    spec: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    line: int | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        """A hash of the spec: two runs have the same id if and only if their specs are equal."""
        return sha256(json.dumps(self.spec, sort_keys=True).encode("utf-8")).hexdigest()[:16]


@dataclass(frozen=True)
class StoredFigure:
    """Results beyond single outcomes, such as a stability study or probes.

    Attributes:
        kind: by which a report chooses how to show it.
        spec: everything that determines it, as for a :class:`MethodRun`.
        data: the results, as JSON.
        about: what only describes it, for the manifest.
        line: number of its line in the file that it was read from.
    """

    kind: str
    spec: dict[str, Any]
    data: dict[str, Any]
    about: dict[str, Any]
    line: int | None = field(default=None, compare=False)


_STARTS = (b'{"run": "', b'{"of": "', b'{"figure": "')


class Store:
    """A results file; it is read when this is created, and then appended to.

    An incomplete last line, left by a crash, is dropped, and its question is answered again. Several processes may
    append to one file. Without a path, nothing is written.

    Args:
        path: of the file.
        read_only: nothing will be written, so that the file need not be writable.

    Raises:
        DataError: the file exists and is not a results file, or it cannot be written, now or later.
    """

    def __init__(self, path: str | Path | None = None, *, read_only: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self.runs: dict[str, MethodRun] = {}
        self.figures: list[StoredFigure] = []
        if self.path is not None and os.path.exists(self.path):  # unlike Path.exists, of a name of any length
            self._read(self.path)
        if self.path is not None and not read_only:
            self._check_writable(self.path)

    def open(self, spec: dict[str, Any], about: dict[str, Any] | None = None) -> MethodRun:
        """The run of this spec, with its outcomes so far; a new one if there is none."""
        run = MethodRun(spec, about or {})
        if run.id not in self.runs:
            self.runs[run.id] = run
            self._append({"run": run.id, "spec": run.spec, "about": run.about})
        return self.runs[run.id]

    def add(self, run: MethodRun, outcome: Outcome) -> None:
        """Store an outcome; it is in the file when this returns."""
        run.outcomes[outcome.key] = outcome
        self._append({"of": run.id, **outcome.to_json()})

    def save_figure(self, kind: str, spec: dict[str, Any], data: dict[str, Any], about: dict[str, Any]) -> None:
        """Store a figure; it replaces an earlier one of the same kind and spec."""
        figure = StoredFigure(kind, spec, data, about)
        self._replace(figure)
        self._append({"figure": kind, "spec": spec, "data": data, "about": about})

    def find_figure(self, kind: str, spec: dict[str, Any]) -> dict[str, Any] | None:
        """The data of the figure of this kind and spec; ``None`` if there is none."""
        # As read from a file, where a tuple is a list.
        spec = json.loads(json.dumps(spec))
        return next((f.data for f in self.figures if f.kind == kind and json.loads(json.dumps(f.spec)) == spec), None)

    def _replace(self, figure: StoredFigure) -> None:
        self.figures = [f for f in self.figures if (f.kind, f.spec) != (figure.kind, figure.spec)] + [figure]

    def _append(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        line = json.dumps(record, allow_nan=False) + "\n"
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                # Held until the file is closed: what is incomplete then is no line that another process is writing.
                with suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                _cut_torn(file, self.path)
                file.write(line.encode("utf-8"))

    @staticmethod
    def _check_writable(path: Path) -> None:
        """Check before the first line, and leave nothing behind: results take long."""
        with _writing(path):
            if path.exists():
                path.open("a").close()
            else:
                folder = next(folder for folder in path.absolute().parents if os.path.exists(folder))
                TemporaryFile(dir=folder).close()

    def _read(self, path: Path) -> None:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from error
        whole, _, torn = raw.rpartition(b"\n")
        _check_torn(torn, path)
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                record = json.loads(line)
                if "run" in record:
                    # Two processes may both have opened the run: keep the outcomes in between.
                    run = MethodRun(_object(record, "spec"), _object(record, "about"), line=number)
                    self.runs.setdefault(record["run"], run)
                elif "figure" in record:
                    spec, data, about = (_object(record, name) for name in ("spec", "data", "about"))
                    self._replace(StoredFigure(str(record["figure"]), spec, data, about, number))
                else:
                    outcome = Outcome.from_json(record)
                    self.runs[record["of"]].outcomes[outcome.key] = outcome
            except (DataError, ValueError, KeyError, TypeError, RecursionError) as error:
                what = error if isinstance(error, DataError) else repr(error)
                raise DataError(f"{path}, line {number}: not a line of a results file ({what})") from error


def _check_torn(torn: bytes, path: Path) -> None:
    """Check that an incomplete last line can be one of a results file: this could be another file.

    Raises:
        DataError: it cannot.
    """
    if not any(torn.startswith(start[: len(torn)]) for start in _STARTS):
        raise DataError(f"{path}: not a results file")


def _cut_torn(file: BinaryIO, path: Path) -> None:
    """Cut off an incomplete last line, to which the next line would otherwise be appended.

    Raises:
        DataError: it cannot be one of a results file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) in (b"", b"\n"):
        return
    file.seek(0)
    torn = file.read().rpartition(b"\n")[2]
    _check_torn(torn, path)
    file.truncate(size - len(torn))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: the results cannot be written ({error.strerror})") from error


def _object(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record[name]
    if not isinstance(value, dict):
        raise TypeError(f"{name} is not an object")
    return value

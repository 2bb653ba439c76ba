"""Methods that answer on a Ray cluster, through Ray Data. Needs the extra ``ray``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray.data

from slr_core.engine.runner.device import load_reasoner
from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import Batch, BatchPrompts, Method, MethodSettings, get_method
from slr_core.evaluation.outcomes import MethodAnswer
from slr_core.evaluation.run import Answered, BatchRunner
from slr_core.ray_cluster import connect, reported_errors
from slr_core.tasks.base import Task


class RayEngines(BatchRunner):
    """Engines on a cluster, each with one CPU, and a GPU if there are any. A lost one's batches are answered again.

    Args:
        engines: how many.
        model: checkpoint; a folder must exist on every machine.
        device: as of :func:`~slr_core.engine.runner.device.load_reasoner`.
        dtype: the same.
        quantization: the same.
    """

    def __init__(self, engines: int, model: str | None, *, device: str, dtype: str, quantization: str) -> None:
        self._engines, self._gpus = engines, connect(device)
        self._model = {"path_or_id": model, "device": device, "dtype": dtype, "quantization": quantization}

    def run(self, method: Method, task: Task, settings: MethodSettings, batches: Sequence[BatchPrompts]) -> Answered:
        """As :meth:`BatchRunner.run`."""
        if not batches:
            return
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        # As JSON: Ray's tables have no place for ragged lists and missing values.
        rows = [{"batch": json.dumps(asdict(batch))} for batch in batches]
        answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            QuestionAnswerer,  # type: ignore[arg-type]  # a class is called once for each engine
            fn_constructor_args=(self._model, method.name, task, settings),
            concurrency=self._engines,
            num_cpus=1,
            num_gpus=self._gpus,
        )
        with reported_errors():
            for row in answered.iter_rows():
                yield [MethodAnswer(**answer) for answer in json.loads(row["answers"])], row["seconds"]


class QuestionAnswerer:
    """An engine on the cluster. Arguments: of the model; name of the method; task; settings of all methods."""

    def __init__(self, model: dict[str, Any], method: str, task: Task, settings: MethodSettings) -> None:
        self._backend = Local(load_reasoner(**model), threads=1)
        self._method, self._task, self._settings = get_method(method), task, settings
        self._warm = False

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answer a batch: the column ``batch`` becomes ``answers`` and ``seconds``."""
        prompts = BatchPrompts(**json.loads(row["batch"]))
        if not self._warm:
            self._answer(prompts.first())  # starts the engine, which is not a part of the time of an answer
            self._warm = True
        began = time.perf_counter()
        answers = [asdict(answer) for answer in self._answer(prompts)]
        return {"answers": json.dumps(answers), "seconds": time.perf_counter() - began}

    def _answer(self, prompts: BatchPrompts) -> list[MethodAnswer]:
        return self._method.run(Batch.of(prompts, self._backend, self._task, self._settings))

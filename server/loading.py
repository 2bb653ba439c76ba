"""Loads the served model, up to its first answer."""

from __future__ import annotations

import gc
import linecache

from slr_core.engine import Engine
from slr_core.engine.runner.device import return_free_memory
from slr_core.params import LoopParams, SamplingParams
from slr_core.reasoner import LatentReasoner
from slr_core.types import Request

from .observability.metrics import Metrics
from .settings import ServerSettings


def build_engine(settings: ServerSettings, metrics: Metrics) -> Engine:
    """An engine that has given a first answer. Takes long: call it in a thread.

    Args:
        settings: name the model and the engine's options.
        metrics: record its steps.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ConfigError: an option cannot be used.
    """
    engine = Engine.from_pretrained(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        slots=settings.slots,
        cache_gib=settings.cache_gib,
        prefix_gib=settings.prefix_gib,
        threads=settings.threads,
        static_shapes=settings.static_shapes,
        on_step=metrics.record_step,
    )
    try:
        engine.submit(_warmup_request(engine.reasoner)).result()
    except BaseException:
        engine.close()
        raise
    linecache.clearcache()  # source code that libraries read while they were imported
    gc.collect()
    return_free_memory()
    return engine


def _warmup_request(reasoner: LatentReasoner) -> Request:
    """One prompt token, the checkpoint's default loop and one generated token."""
    return Request(
        prompt_ids=(0,),
        answer_prefix_ids=(),
        loop=LoopParams().resolve(reasoner.config),
        max_new_tokens=1,
        sampling=SamplingParams(),
        stop=(),
        trace=False,
        top_tokens=0,
        include_states=False,
    )

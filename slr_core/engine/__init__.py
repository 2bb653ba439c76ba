"""The engine: accepts requests from any thread, and runs them together on a thread that owns the model."""

from slr_core.engine.adapter_sets import DEFAULT_LOOP_SET
from slr_core.engine.engine import Engine
from slr_core.engine.events import Event, FinishedEvent, IterationEvent, TokenEvent
from slr_core.engine.statistics import EngineCounters, StepStats

__all__ = [
    "DEFAULT_LOOP_SET",
    "Engine",
    "EngineCounters",
    "Event",
    "FinishedEvent",
    "IterationEvent",
    "StepStats",
    "TokenEvent",
]

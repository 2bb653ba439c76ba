"""What serves: requests in from any thread, answers out, one thread that owns torch."""

from slr_core.engine.engine import DEFAULT_LOOP_SET, Engine
from slr_core.engine.events import Event, FinishedEvent, IterationEvent, TokenEvent
from slr_core.engine.statistics import Counters, Step

__all__ = ["DEFAULT_LOOP_SET", "Counters", "Engine", "Event", "FinishedEvent", "IterationEvent", "Step", "TokenEvent"]

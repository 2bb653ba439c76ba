"""What serves: requests in from any thread, answers out, one thread that owns torch."""

from slr_core.engine.engine import Engine

__all__ = ["Engine"]

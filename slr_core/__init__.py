"""Stable Latent Reasoning: language models that reason in their hidden states before they write.

from slr_core import Engine

with Engine.from_pretrained() as engine:
    print(engine.generate("Max is a impus. Every impus is a rompus. Is Max a rompus or lempus?")[0].text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slr_core._version import __version__
from slr_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeadlineError,
    EngineError,
    RequestError,
    SLRError,
    TrainingError,
)

if TYPE_CHECKING:
    from slr_core.client import AsyncClient, Client
    from slr_core.config import SLRConfig
    from slr_core.engine import Engine, Event, FinishedEvent, IterationEvent, TokenEvent
    from slr_core.model.looped import ReasonerOutput
    from slr_core.params import LoopParams, ResolvedLoopParams, SamplingParams
    from slr_core.reasoner import LatentReasoner
    from slr_core.types import IterationRecord, Request, Result, Stability, Timings, Tokens, TokenScore

__all__ = [
    "AsyncClient",
    "CheckpointError",
    "Client",
    "ConfigError",
    "DataError",
    "DeadlineError",
    "Engine",
    "EngineError",
    "Event",
    "FinishedEvent",
    "IterationEvent",
    "IterationRecord",
    "LatentReasoner",
    "LoopParams",
    "ReasonerOutput",
    "Request",
    "RequestError",
    "ResolvedLoopParams",
    "Result",
    "SLRConfig",
    "SLRError",
    "SamplingParams",
    "Stability",
    "Timings",
    "TokenEvent",
    "TokenScore",
    "Tokens",
    "TrainingError",
    "__version__",
]

# torch and transformers take seconds to import, so these names are imported when they are first used.
_MODULES = {
    "slr_core.client": ("AsyncClient", "Client"),
    "slr_core.config": ("SLRConfig",),
    "slr_core.engine": ("Engine", "Event", "FinishedEvent", "IterationEvent", "TokenEvent"),
    "slr_core.model.looped": ("ReasonerOutput",),
    "slr_core.params": ("LoopParams", "ResolvedLoopParams", "SamplingParams"),
    "slr_core.reasoner": ("LatentReasoner",),
    "slr_core.types": ("IterationRecord", "Request", "Result", "Stability", "Timings", "TokenScore", "Tokens"),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

"""Stable Latent Reasoning: language models that think in their hidden states.

from slr_core import Engine

with Engine.from_pretrained() as engine:
    print(engine.generate("Max is a impus. Every impus is a rompus. Is Max a rompus or lempus?")[0].text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slr_core._version import __version__
from slr_core.errors import CheckpointError, ConfigError, DataError, EngineError, RequestError, SLRError, TrainingError

if TYPE_CHECKING:
    from slr_core.config import SLRConfig
    from slr_core.engine import Engine
    from slr_core.model.reasoner import LatentReasoner
    from slr_core.params import LoopParams

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Engine",
    "EngineError",
    "LatentReasoner",
    "LoopParams",
    "RequestError",
    "SLRConfig",
    "SLRError",
    "TrainingError",
    "__version__",
]

_LAZY = {
    "Engine": "slr_core.engine",
    "LatentReasoner": "slr_core.model.reasoner",
    "LoopParams": "slr_core.params",
    "SLRConfig": "slr_core.config",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only those who use the model pay for them.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

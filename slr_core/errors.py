"""The exceptions of this project.

    SLRError
      ConfigError       a setting is wrong (also a ValueError)
      CheckpointError   a checkpoint folder cannot be loaded or saved
      DataError         a data file or an example cannot be used
      TrainingError     a training run cannot continue
      RequestError      a request cannot be run (also a ValueError)
      EngineError       the engine failed or is closed
        DeadlineError   the request's deadline passed

Every error that this project raises on purpose derives from :class:`SLRError`. The server maps the classes to HTTP
status codes in :mod:`slr_server.errors`.
"""

from __future__ import annotations


class SLRError(Exception):
    """Base class of the errors that this project raises on purpose."""


class ConfigError(SLRError, ValueError):
    """A setting is wrong. The message names the field and the accepted values."""


class CheckpointError(SLRError):
    """A checkpoint folder cannot be loaded or saved. The message names the path and what is wrong with it."""


class DataError(SLRError):
    """A data file or an example cannot be used."""


class TrainingError(SLRError):
    """A training run cannot continue. Checkpoints that it saved before are valid."""


class RequestError(SLRError, ValueError):
    """A request cannot be run: a prompt or a parameter is invalid.

    Attributes:
        param: the invalid request field; ``None`` if the error is not about a single field.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class EngineError(SLRError):
    """The engine failed or is closed. The request itself is valid: another engine may answer it."""


class DeadlineError(EngineError):
    """The request's deadline passed before its answer was complete."""

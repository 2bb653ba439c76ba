"""The one exception tree.

    SLRError
      ConfigError       a setting is wrong (also a ValueError): the field and what would be accepted
      CheckpointError   a checkpoint folder cannot be used: the path and what is wrong with it
      DataError         a data file or example cannot be used
      TrainingError     a training run cannot go on
      RequestError      a request cannot be run (also a ValueError); ``param`` names its field
      EngineError       the engine failed or is closed; the request was not at fault
        DeadlineError   the request's deadline passed before its answer was there

Every error that this project raises on purpose derives from :class:`SLRError`; the server maps the
tree to HTTP status codes in one place.
"""

from __future__ import annotations


class SLRError(Exception):
    """Base of every deliberate error."""


class ConfigError(SLRError, ValueError):
    """A setting is wrong. The message names the field and what would be accepted."""


class CheckpointError(SLRError):
    """A checkpoint folder cannot be loaded or saved. The message names the path and the fault."""


class DataError(SLRError):
    """A data file or an example cannot be used."""


class TrainingError(SLRError):
    """A training run cannot go on; what it saved before is good."""


class RequestError(SLRError, ValueError):
    """A request cannot be run as asked.

    Attributes:
        param: the request field at fault, where it is one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class EngineError(SLRError):
    """The engine failed or is shut down; repeating the request elsewhere may succeed."""


class DeadlineError(EngineError):
    """The request's deadline passed before its answer was there."""

"""The operator's endpoints, those of the page, and health: bodies."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import Field, StringConstraints

from .schema import RequestModel, ResponseModel

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
LoopSetName = Annotated[str, StringConstraints(pattern=_NAME)]


def is_name(name: str) -> bool:
    """Whether a loop adapter set can have this name."""
    return re.fullmatch(_NAME, name) is not None


class LoadLoopSet(RequestModel):
    """Body of ``POST /admin/loop_sets``."""

    name: LoopSetName = Field(description="a checkpoint folder in the server's --loop-sets folder")


class LoopSetList(ResponseModel):
    """Names of loop adapter sets."""

    loaded: list[str] = Field(description="sets that requests can name, the served model's own first")
    available: list[str] = Field(description="checkpoint folders in the server's --loop-sets folder")


class Readiness(ResponseModel):
    """The answer of ``/readyz``."""

    status: str
    tokenizer_lag_s: float = Field(description="age of the oldest request that is not tokenized yet")
    event_loop_lag_s: float = Field(description="longest delay of the event loop in the last 5 to 10 s")


class HealthStatus(ResponseModel):
    """Body of a health check that passes."""

    status: str


class VersionInfo(ResponseModel):
    """Versions of the server."""

    version: str


class ExamplePrompt(ResponseModel):
    """A prompt that the checkpoint answers well, from its ``examples.json``."""

    prompt: str
    answer: str | None = None


class RequestLimits(ResponseModel):
    """The operator's limits of a request."""

    max_iterations: int
    max_new_tokens: int
    max_top_tokens: int
    max_prompts: int
    max_state_values: int


class CheckpointFacts(NamedTuple):
    """What takes reading the checkpoint's files or rendering its template.

    Attributes:
        chat: whether the chat template shows the model all messages of a chat.
        examples: example prompts.
    """

    chat: bool
    examples: list[ExamplePrompt]


class CheckpointIdentity(ResponseModel):
    """What answers depend on beside the request: the served checkpoint's files, and how its weights are stored."""

    sha256: str | None = Field(
        description="SHA-256 of the checkpoint's config, tokenizer and weights; null for a model of the hub"
    )
    dtype: str = Field(description="number format of the weights, such as float32")
    quantization: str = Field(description="none, int8 or int4")


class CheckpointInfo(ResponseModel):
    """The served checkpoint: the defaults of its loop, and example prompts."""

    model: str
    models: list[str] = Field(description="loaded loop adapter sets, the served model's own first")
    trained: bool = Field(description="false: the loop is untrained, and off unless a request sets a loop parameter")
    chat: bool = Field(description="whether the chat template shows the model earlier messages of a chat")
    workspace: str
    positions: int | None = Field(description="positions that the loop refines; null: those of the prompt")
    hidden_size: int = Field(description="numbers in the state of a position")
    trained_iterations: int
    max_iterations: int = Field(description="default maximum of iterations")
    criterion: str = Field(description="default criterion")
    threshold: float = Field(description="default threshold of the default criterion")
    criteria: dict[str, float] = Field(description="criteria that requests can name, and their default thresholds")
    max_new_tokens: int = Field(description="default maximum number of tokens of an answer")
    limits: RequestLimits
    tasks: list[str] = Field(description="tasks by whose rules `/grade` can grade answers")
    examples: list[ExamplePrompt]


class EndpointInfo(ResponseModel):
    """One endpoint."""

    method: str
    path: str
    summary: str


class Index(ResponseModel):
    """What this server is and which endpoints it has."""

    name: str
    version: str
    model: str
    docs: str = Field(description="path of the full documentation, with every field")
    endpoints: list[EndpointInfo]

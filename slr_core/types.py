"""What the parts of the system hand to one another: a request, its result and the records of its loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from slr_core.params import ResolvedLoopParams, SamplingParams

ExitReason = Literal["converged", "max_iterations", "diverged", "cancelled"]
FinishReason = Literal["stop", "length"]
Messages = Sequence[Mapping[str, str]]
"""A chat: ``{"role": ..., "content": ...}`` each."""


def finite_or_none(value: float | None) -> float | None:
    """JSON has no infinities: a value that is not finite is reported as undefined."""
    return value if value is not None and isfinite(value) else None


@dataclass(frozen=True)
class Request:
    """One prompt, ready to run: tokenized, every setting resolved. Made by :func:`prepare`, which says what each
    field means."""

    prompt_ids: tuple[int, ...]
    answer_prefix_ids: tuple[int, ...]
    loop: ResolvedLoopParams
    max_new_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    trace: bool
    top_tokens: int
    include_states: bool
    logprobs: int | None = None
    score_prompt: bool = False
    forced_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """A prompt that is taken as it is: none of the checkpoint's texts apply to it."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class IterationRecord:
    """One iteration of one request, as ``POST /trace`` shows it.

    Distances are dimensionless except ``norm`` (length of the state), ``entropy`` and ``kl`` (nats) and
    ``duration_s`` (seconds). ``None`` marks what is undefined (whatever compares with a state that is none,
    such as contraction at the first iteration; whatever is not finite) or was not asked for (the head's
    measures outside a trace, ``thought`` without a latent decoder).
    """

    t: int
    relative_change: float | None
    cosine: float | None
    norm: float | None
    contraction: float | None
    kl: float | None
    entropy: float | None
    adapter: str | None
    duration_s: float
    top_tokens: tuple[tuple[str, float], ...] = ()
    thought: str | None = None

    def to_dict(self, state: Tensor | None = None) -> dict[str, Any]:
        """The record as JSON-ready values. Without a thought there is no key ``thought``.

        Args:
            state: h_t ``[W, d]``, written as the key ``state``; ``None``: no such key.
        """
        shown = asdict(self)
        shown["top_tokens"] = [{"token": token, "prob": prob} for token, prob in self.top_tokens]
        if self.thought is None:
            del shown["thought"]
        if state is not None:
            shown["state"] = [[finite_or_none(value) for value in position] for position in state.tolist()]
        return shown


@dataclass(frozen=True)
class Stability:
    """Summary of a trace.

    Attributes:
        contraction_rate: geometric mean of the contractions; below 1 the steps shrink. ``None`` with
            fewer than two iterations.
        oscillating: the loop ended moving between two states: see :func:`is_oscillating`.
        converged: the loop ended because its criterion was met.
    """

    contraction_rate: float | None
    oscillating: bool
    converged: bool


@dataclass(frozen=True)
class TokenScore:
    """A token in its place.

    Attributes:
        token_id: the token.
        logprob: its natural log-probability after what stands before it; ``None`` where nothing does.
        top: the likeliest tokens there and their log-probabilities, best first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Timings:
    """Seconds. ``loop_s`` ends when the request leaves the loop; waiting for its batch counts as decoding."""

    queue_s: float
    prefill_s: float
    loop_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True)
class Result:
    """What became of a request.

    ``final_change`` is the relative change of the last iteration; ``forward_passes`` what the request
    alone would have cost; ``first_token_s`` the seconds from its arrival to its first token. The head's
    measures in ``records`` are complete for a traced request alone.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    iterations: int
    exit_reason: ExitReason
    final_change: float | None
    prompt_tokens: int
    forward_passes: int
    timings: Timings
    first_token_s: float
    records: tuple[IterationRecord, ...]
    stability: Stability
    states: Tensor | None = None
    """h_0 ... h_t as they were, ``[t + 1, W, d]``, on the CPU; where the request asked for them."""
    scores: tuple[TokenScore, ...] = ()
    """Of the tokens written; where the request asked for log-probabilities."""
    prompt_scores: tuple[TokenScore, ...] = ()
    """Of the prompt's tokens by the base model; where the request asked for them."""

    @property
    def completion_tokens(self) -> int:
        """Tokens written, the end token included."""
        return len(self.token_ids)

    def to_dict(self, *, trace: bool = False, states: bool = False) -> dict[str, Any]:
        """The result as JSON-ready values, in the shape of ``POST /generate``.

        Args:
            trace: add the keys ``trace`` (one entry per iteration) and ``stability``, as in ``POST /trace``.
            states: add the states to the entries of ``trace``, where the result has them.
        """
        shown: dict[str, Any] = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "iterations": self.iterations,
            "exit_reason": self.exit_reason,
            "final_change": self.final_change,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "forward_passes": self.forward_passes,
            },
            "timings": asdict(self.timings),
        }
        if trace:
            h = self.states if states else None
            shown["trace"] = [record.to_dict(None if h is None else h[record.t]) for record in self.records]
            shown["stability"] = asdict(self.stability)
        return shown

"""The data that the parts exchange: a request, its result, and the records of its loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from slr_core.params import ResolvedLoopParams, SamplingParams

ExitReason = Literal["converged", "max_iterations", "diverged"]
"""Why a loop ended."""


def combine_exit_reasons(reasons: Iterable[ExitReason]) -> ExitReason:
    """The exit reason of several loops, at least one: `diverged` if any is, else `max_iterations` if any is."""
    found = set(reasons)
    return next(reason for reason in ("diverged", "max_iterations", "converged") if reason in found)


FinishReason = Literal["stop", "length"]
"""Why an answer ended."""
Messages = Sequence[Mapping[str, str]]
"""A chat, one ``{"role": ..., "content": ...}`` per message."""


def finite_or_none(value: float | None) -> float | None:
    """JSON has no infinities: a value that is not finite is reported as undefined."""
    return value if value is not None and isfinite(value) else None


@dataclass(frozen=True)
class Request:
    """One prompt, tokenized, with every setting resolved.

    Made by :func:`slr_core.generation.prepare.prepare`, which documents the fields.
    """

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
    trace_tokens: int = 0


@dataclass(frozen=True)
class Tokens:
    """A prompt of token ids, used as it is: without the checkpoint's prompt prefix, suffix and answer prefix."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class IterationRecord:
    """One iteration of one request, as ``POST /trace`` returns it.

    ``None`` marks values that are undefined (no earlier state to compare with, or not finite) or not computed (the LM
    head's measures outside a trace).

    Attributes:
        t: the iteration, from 1.
        relative_change: norm of the step divided by the norm of the state before.
        cosine: 1 - cosine similarity of the states before and after.
        norm: norm of the new state.
        contraction: norm of the step divided by that of the step before; above 1 the loop expands.
        kl: divergence of the next-token distribution from that of the iteration before, in nats.
        entropy: entropy of the next-token distribution, in nats.
        adapter: name of the loop adapter; ``None``: the plain base model.
        duration_s: seconds.
        top_tokens: the most likely next tokens and their probabilities.
        thought: the state decoded to text; ``None`` outside a trace and without a latent decoder.
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
        shown: dict[str, Any] = dict(vars(self))  # not asdict, which copies each of many top tokens
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
        contraction_rate: geometric mean of the contractions; below 1 the steps shrink. ``None`` if no
            contraction is defined.
        oscillating: whether the loop ended alternating between two states.
        converged: whether the loop ended because its criterion was met.
    """

    contraction_rate: float | None
    oscillating: bool
    converged: bool


@dataclass(frozen=True)
class TokenScore:
    """Log-probability of a token.

    Attributes:
        token_id: the token.
        logprob: its natural log-probability given the tokens before it; ``None`` for the first token of a prompt.
        top: the most likely tokens in its place and their log-probabilities, most likely first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Timings:
    """Durations in seconds.

    ``loop_s`` ends when the request leaves the loop; time spent waiting for its batch after that is part of
    ``decode_s``.
    """

    queue_s: float
    prefill_s: float
    loop_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True)
class Result:
    """The answer to a request.

    Attributes:
        text: the answer, without the stop string that ended it.
        token_ids: its tokens, the end token included.
        finish_reason: why the answer ended.
        iterations: iterations that the loop ran.
        exit_reason: why the loop ended.
        final_change: relative change of the last iteration; ``None`` where undefined.
        prompt_tokens: tokens of the prompt, those that the answer begins with included.
        forward_passes: forward passes that the request would take alone.
        timings: duration of each stage.
        first_token_s: seconds from arrival to the first token.
        records: one per iteration; the LM head's measures are complete only for a traced request.
        stability: summary of the records.
        states: h_0 ... h_t, ``[t + 1, W, d]`` fp32 on the CPU; ``None`` unless requested.
        iterations_per_token: in the workspace ``token``, the iteration at whose state each of ``token_ids`` was read:
            ``iterations``, ``records``, ``states`` and ``stability`` are those of the first one, ``exit_reason`` is
            `diverged` if any loop diverged, else `max_iterations` if any ended so. Empty in other workspaces.
        records_per_token: in the workspace ``token``, the records of the loop before each of the first tokens; as many
            as the request asks for.
        scores: log-probabilities of ``token_ids``; empty unless requested.
        prompt_scores: log-probabilities of the prompt's tokens by the base model; empty unless requested.
        forced_tokens: how many of ``token_ids`` the request gave (``Request.forced_ids``).
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
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()
    iterations_per_token: tuple[int, ...] = ()
    records_per_token: tuple[tuple[IterationRecord, ...], ...] = ()
    forced_tokens: int = 0

    @property
    def completion_tokens(self) -> int:
        """Tokens that were chosen, the end token included."""
        return len(self.token_ids) - self.forced_tokens

    def to_dict(self, *, trace: bool = False, states: bool = False) -> dict[str, Any]:
        """The result as JSON-ready values, in the shape of ``POST /generate``.

        There is a key ``iterations_per_token`` only in the workspace ``token``.

        Args:
            trace: add the keys ``trace`` (one entry per iteration) and ``stability``, as in ``POST /trace``; and
                ``token_traces``, where the result has records of several tokens.
            states: add the states to the entries of ``trace``, where the result has them.
        """
        shown: dict[str, Any] = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "iterations": self.iterations,
            "exit_reason": self.exit_reason,
            "final_change": self.final_change,
            **({"iterations_per_token": list(self.iterations_per_token)} if self.iterations_per_token else {}),
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
            if self.records_per_token:
                shown["token_traces"] = [[record.to_dict() for record in loop] for loop in self.records_per_token]
        return shown

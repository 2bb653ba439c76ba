"""One request while the engine has it."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import inf
from typing import Any

from torch import Tensor

from slr_core.engine.adapter_set import LoopAdapterSet
from slr_core.engine.events import Event
from slr_core.generation.decoding import DecodeState, TokenLoop
from slr_core.loop.diagnostics import LoopTracker
from slr_core.types import Request, Result, TokenScore

logger = logging.getLogger(__name__)


class Phase(enum.Enum):
    """What a running request does in its next step."""

    PREFILL = "prefill"
    LOOP = "loop"
    CLOSE = "close"
    """The closing pass."""
    DECODE = "decode"
    LATENT = "latent"
    """The latent decoder decodes the answer, without a pass of the base model."""
    DONE = "done"
    """Its slot is freed at the end of the step."""


@dataclass
class TokenLoops:
    """The loops of a request in the workspace ``token``: the prompt's, then one for each token that is run.

    Attributes:
        cache_copies: key/value caches in its slot.
        cache_size: positions of each of them.
        shared_cache: whether all iterations use the same one.
        depth: iterations that later positions may run: the maximum, or what was kept of a prompt that diverged.
        trace_tokens: number of loops whose records are kept.
        loops: the finished ones.
        closing_iteration: iteration that its closing pass runs again, since its keys and values were overwritten; 0:
            the base model's pass, without a loop; ``None``: there is no closing pass.
        tracker: the prompt's loop, once it has ended.
        states: h_0 ... h_t ``[1, d]`` at the prompt's last position, up to its exit.
    """

    cache_copies: int
    cache_size: int
    shared_cache: bool
    depth: int
    trace_tokens: int
    loops: list[TokenLoop] = field(default_factory=list)
    closing_iteration: int | None = None
    tracker: LoopTracker | None = None
    states: list[Tensor] = field(default_factory=list)

    def end_loop(self, tracker: LoopTracker, states: list[Tensor]) -> None:
        """Note that a loop has ended; ``states`` are h_0 ... h_t ``[W, d]``."""
        t, records = len(states) - 1, len(tracker.records)
        assert tracker.exit_reason is not None
        if self.tracker is None:
            self.tracker, self.states = tracker, [h[-1:] for h in states[: records + 1]]
            last = self.depth
        else:
            last = max(1, tracker.kept_iterations)
        traced = tracker.records if len(self.loops) < self.trace_tokens else ()
        self.loops.append(TokenLoop(records, tracker.kept_iterations, t, tracker.exit_reason, traced))
        self.closing_iteration = last if last == 0 or (self.shared_cache and last < t) else None

    @property
    def wasted_iterations(self) -> int:
        """Iterations after the last good state of a loop that diverged."""
        return sum(loop.iterations - loop.kept_iterations for loop in self.loops)


@dataclass(eq=False)
class Sequence:
    """A request and its progress.

    Attributes:
        request: the request.
        adapter_set: the loop adapter set that it runs with.
        future: receives the result. It is never marked as running, so it can be cancelled until the end.
        on_event: called with every event, on the engine's thread.
        deadline: ``time.monotonic`` at which the request fails.
        group: requests with the same group share their turns in the queue.
        prefix_keys: keys of the prompt's prefixes, see :mod:`slr_core.engine.prefix_cache`.
        reserved: cache positions that it needs at most.
        answer: the answer while it is decoded.
        tracker: the loop's records, and its exit.
        prefix_in_loop: the answer prefix is run in the pass of the last thought.
        cancelled: the future was cancelled. A copy of the future's state, since every step reads it.
        settled: the future has its outcome.
        arrived_at: ``time.perf_counter`` at its submission.
        bypassed: number of later requests that were admitted before it.
        slot: its index in the cache; -1 while it waits.
        phase: what it does next.
        filled: valid positions of each of its key/value caches. Workspaces that are refined in place lie beyond them
            until the closing pass.
        states: h_0 ... h_t ``[W, d]`` of its loop; in the workspace ``token``, of its current one.
        prompt_state: the base model's state ``[d]`` after the prompt, if the workspace prefills; else the prompt's
            input embeddings ``[P, d]``.
        head: log-probabilities ``[V]`` of the LM head at the last state, if the request reads them.
        read_state: the state ``[d]`` at which this step reads the next token.
        logits: logits ``[V]`` at ``read_state``, up to a constant, if they are known already.
        pending_tokens: tokens to run next.
        token: its loops in the workspace ``token``; ``None`` in the others.
        prompt_scores: scores of the prompt's tokens so far, if the request asks for them.
        admitted_at: ``time.perf_counter`` when it got its slot.
        prefilled_at: the same, when its loop began.
        looped_at: the same, when its loop ended.
    """

    request: Request
    adapter_set: LoopAdapterSet
    future: Future[Result]
    on_event: Callable[[Event], None] | None
    deadline: float
    group: Hashable
    prefix_keys: tuple[bytes, ...]
    reserved: int
    answer: DecodeState
    tracker: LoopTracker
    token: TokenLoops | None = None
    prefix_in_loop: bool = False
    cancelled: bool = False
    settled: bool = False
    arrived_at: float = field(default_factory=time.perf_counter)
    bypassed: int = 0
    slot: int = -1
    phase: Phase = Phase.PREFILL
    filled: int = 0
    states: list[Tensor] = field(default_factory=list)
    prompt_state: Tensor | None = None
    head: Tensor | None = None
    read_state: Tensor | None = None
    logits: Tensor | None = None
    pending_tokens: list[int] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    admitted_at: float = inf
    prefilled_at: float = inf
    looped_at: float = inf

    @property
    def t(self) -> int:
        """Iterations done of its loop; in the workspace ``token``, of its current one."""
        return max(0, len(self.states) - 1)

    @property
    def goes_on(self) -> bool:
        """Whether its loop goes on after its exit: that of the prompt in the workspace ``token``."""
        return self.token is not None and not self.token.loops and self.t < self.token.depth

    @property
    def iterations_run(self) -> int:
        """Iterations run so far, of all its loops."""
        if self.token is None:
            return self.t
        return sum(loop.iterations_run for loop in self.token.loops) + (self.t if self.phase is Phase.LOOP else 0)

    @property
    def adapter_id(self) -> int | None:
        """The adapter of its next pass; ``None``: the base model alone."""
        match self.phase:
            case Phase.LOOP:
                return self.adapter_set.adapter_id(self.t + 1)
            case Phase.CLOSE if self.token is not None:
                iteration = self.token.closing_iteration
                return self.adapter_set.adapter_id(iteration) if iteration else self.adapter_set.default_adapter_id
            case Phase.CLOSE | Phase.DECODE if self.tracker.kept_iterations:
                return self.adapter_set.decode_adapter_id
            case _:
                return self.adapter_set.default_adapter_id

    @property
    def cache_start(self) -> int:
        """The position of its slot at which the key/value cache of its next pass begins."""
        if self.token is None or self.token.shared_cache or self.phase is not Phase.LOOP:
            return 0
        return self.t * self.token.cache_size

    @property
    def used_positions(self) -> int:
        """Valid positions of its slot, all key/value caches together."""
        return self.filled * (1 if self.token is None else self.token.cache_copies)

    @property
    def width(self) -> int:
        """Positions of its workspace."""
        if self.token is not None and self.states:
            return self.states[0].shape[0]
        return self.adapter_set.workspace.width(len(self.request.prompt_ids))

    @property
    def last_change(self) -> float | None:
        """Relative change of the last iteration, if it is defined."""
        return self.tracker.records[-1].relative_change if self.tracker.records else None

    @property
    def reads_head(self) -> bool:
        """Whether every iteration needs the LM head."""
        return self.request.trace or self.request.top_tokens > 0 or self.request.loop.reads_head

    def queries(self) -> int:
        """Positions of its next pass, with the rest of the prompt as one pass; 0 if it needs no pass."""
        match self.phase:
            case Phase.PREFILL:
                return len(self.request.prompt_ids) - self.filled
            case Phase.LOOP | Phase.CLOSE:
                return self.width + len(self.tokens())
            case Phase.DECODE:
                return len(self.pending_tokens)
            case Phase.LATENT | Phase.DONE:
                return 0

    def tokens(self) -> list[int] | tuple[int, ...]:
        """Tokens that its next pass runs, after its workspace positions if it runs any."""
        match self.phase:
            case Phase.PREFILL:
                return self.request.prompt_ids[self.filled :]
            case Phase.LOOP if self.prefix_in_loop and self.t + 1 == self.request.loop.max_iterations:
                return self.request.answer_prefix_ids
            case Phase.DECODE:
                return self.pending_tokens
            case _:
                return ()

    def advance(self) -> None:
        """Enter the next phase. Nothing else changes the phase."""
        kept_iterations = self.tracker.kept_iterations
        match self.phase:
            case _ if self.settled:
                self.phase = Phase.DONE
            case Phase.PREFILL:
                self.phase = Phase.LOOP
            case Phase.LOOP if self.token is not None:
                self.phase = Phase.DECODE if self.token.closing_iteration is None else Phase.CLOSE
            case Phase.DECODE if self.token is not None and self.token.depth:
                self.phase = Phase.LOOP
            case Phase.LOOP if kept_iterations and self.adapter_set.reasoner.answers_from_states:
                self.phase = Phase.LATENT
            case Phase.LOOP if self.adapter_set.workspace.closing_passes(kept_iterations):
                self.phase = Phase.CLOSE
            case Phase.LOOP | Phase.CLOSE:
                self.phase = Phase.DECODE

    def emit(self, event: Event) -> None:
        """Pass an event on. An exception of the callback is logged: it must not stop the step."""
        if self.on_event is None:
            return
        try:
            self.on_event(event)
        except BaseException:  # a callback may raise SystemExit too
            logger.exception("Event callback failed")

    def settle(self, outcome: Result | Exception) -> None:
        """Give the future its outcome, unless it has one."""
        if self.settled:
            return  # an error after the result
        self.settled = True
        if self.future.set_running_or_notify_cancel():
            settle: Any = self.future.set_exception if isinstance(outcome, Exception) else self.future.set_result
            settle(outcome)

    def note_cancelled(self, future: Future[Result]) -> None:
        """Done callback of :attr:`future`."""
        self.cancelled = future.cancelled()

"""One request while the engine has it."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import inf

from torch import Tensor

from slr_core.engine.adapter_set import LoopAdapterSet
from slr_core.engine.events import Event
from slr_core.generation.decoding import DecodeState
from slr_core.loop.diagnostics import LoopTracker
from slr_core.types import Request, Result, TokenScore


class Phase(enum.Enum):
    """What a running request does in its next step."""

    PREFILL = "prefill"
    LOOP = "loop"
    CLOSE = "close"
    DECODE = "decode"
    LATENT = "latent"
    """The latent decoder writes: no pass of the base model."""
    DONE = "done"
    """It leaves its slot at the end of the step."""


@dataclass(eq=False)
class Sequence:
    """A request, what it has run so far, and who waits for it.

    Attributes:
        request: what is asked.
        loops: the loop set that it runs.
        future: where its result goes. Nobody marks it as running: cancelling works until the end.
        cancelled: nobody waits for it any longer; the engine sees it at its next step.
        settled: the future has been told how it ended.
        on_event: hears of every event, on the engine's thread.
        deadline: ``time.monotonic`` after which nobody waits.
        keys: names of its prompt's prefixes, for their reuse; see :mod:`slr_core.engine.prefix_cache`.
        reserved: columns that it may come to need.
        bypassed: requests that were admitted before it though they came later.
        slot: its place in the cache, -1 while it waits.
        filled: columns of its slot that hold what it may attend to. Workspaces that are refined in place lie
            beyond, until their closing pass.
        states: h_0 ... h_t ``[W, d]``.
    """

    request: Request
    loops: LoopAdapterSet
    future: Future[Result]
    on_event: Callable[[Event], None] | None
    deadline: float
    keys: tuple[bytes, ...]
    reserved: int
    answer: DecodeState
    row: LoopTracker
    cancelled: bool = False
    settled: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    bypassed: int = 0
    slot: int = -1
    phase: Phase = Phase.PREFILL
    filled: int = 0
    states: list[Tensor] = field(default_factory=list)
    prompt_state: Tensor | None = None
    """The base model's state ``[d]`` after the prompt, where its workspace prefills."""
    head: Tensor | None = None
    """The head's log-probabilities ``[V]`` at the last state, where the request reads them."""
    state: Tensor | None = None
    """Where the next token is read in this step, ``[d]``."""
    logits: Tensor | None = None
    """The head's at ``state`` ``[V]``, up to a constant, where it was read already."""
    pending: list[int] = field(default_factory=list)
    """Tokens to feed next."""
    prompt_scores: list[TokenScore] = field(default_factory=list)
    """Of its prompt so far, where the request asks for them."""
    admitted: float = inf
    prefilled: float = inf
    looped: float = inf

    @property
    def t(self) -> int:
        """Iterations done."""
        return len(self.row.records)

    @property
    def change(self) -> float | None:
        """The last relative change, where there is one."""
        return self.row.records[-1].relative_change if self.row.records else None

    @property
    def reads_head(self) -> bool:
        """Whether every iteration needs the LM head."""
        return self.request.trace or self.request.top_tokens > 0 or self.request.loop.reads_head

    def queries(self) -> int:
        """Positions that its next pass runs, a prefill as a whole; 0 where it needs no pass."""
        match self.phase:
            case Phase.PREFILL:
                return len(self.request.prompt_ids) - self.filled
            case Phase.LOOP | Phase.CLOSE:
                return self.loops.workspace.width(len(self.request.prompt_ids))
            case Phase.DECODE:
                return len(self.pending)
            case Phase.LATENT | Phase.DONE:
                return 0

    def hear_of_end(self, future: Future[Result]) -> None:
        """For the future's callbacks: looking at a flag is cheaper than at a future, and every step looks."""
        self.cancelled = future.cancelled()

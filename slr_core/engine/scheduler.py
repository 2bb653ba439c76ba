"""Who runs next: continuous batching over the depth of loops. Plain Python, no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from slr_core.engine.sequence import Phase, Sequence

Work = tuple[Sequence, int]
"""A running request and the positions that its next pass runs; 0 where it needs no pass of the base model."""


class Scheduler:
    """First come, first served, with a bounded bypass: see :meth:`schedule`.

    Slots are dense: a request's slot is its index in ``running``, and when one leaves, the last one moves
    into its place.

    Args:
        slots: most requests that run at once.
        max_tokens: most columns that they may come to need together.
        prefill_chunk: most prompt positions in one step.
        max_bypasses: how often a waiting request is overtaken, at most.
        known: how many of a request's prefix keys are at hand.
        enter: called with each request that gets a slot, before it is decided what it runs.
    """

    def __init__(
        self,
        slots: int,
        max_tokens: int,
        *,
        prefill_chunk: int = 512,
        max_bypasses: int = 8,
        known: Callable[[Sequence], int] = lambda sequence: 0,
        enter: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        self.slots, self.max_tokens, self.prefill_chunk = slots, max_tokens, prefill_chunk
        self.max_bypasses, self.known, self.enter = max_bypasses, known, enter
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.reserved = 0

    def schedule(self) -> list[Work]:
        """Decide the next step: who is admitted, and what everyone who then runs does.

        The queue is read in order of arrival while there are slots. Who fits gets one; who does not, or whose
        prompt begins like one that is just being prefilled, keeps its place and may be overtaken, until that
        happened ``max_bypasses`` times. Everyone who runs gets one pass; prompts share ``prefill_chunk``
        positions, in the order of arrival: slots change hands, and whoever moves must not overtake.
        """
        kept: list[Sequence] = []
        for sequence in list(self.waiting):
            if len(self.running) == self.slots:
                break
            patient = sequence.bypassed < self.max_bypasses
            if self.reserved + sequence.reserved > self.max_tokens or (patient and self._prefix_under_way(sequence)):
                kept.append(sequence)
            else:
                self.waiting.remove(sequence)
                sequence.slot = len(self.running)
                self.running.append(sequence)
                self.reserved += sequence.reserved
                self.enter(sequence)
                for overtaken in kept:
                    overtaken.bypassed += 1
            if any(overtaken.bypassed >= self.max_bypasses for overtaken in kept):
                break

        work: list[Work] = []
        budget = self.prefill_chunk
        for sequence in sorted(self.running, key=lambda running: running.arrived):
            queries = sequence.queries()
            if sequence.phase is Phase.PREFILL:
                queries = min(queries, budget)
                budget -= queries
                if not queries:
                    continue
            work.append((sequence, queries))
        return work

    def _prefix_under_way(self, sequence: Sequence) -> bool:
        """Whether waiting for a prefill that runs would spare a part of this one."""
        filling = [other for other in self.running if other.phase is Phase.PREFILL]
        return any(_common(other.keys, sequence.keys) > self.known(sequence) for other in filling)

    def release(self, sequence: Sequence) -> Sequence | None:
        """Take a request off the queue or out of its slot; the one that moves into the slot is returned."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return None
        self.reserved -= sequence.reserved
        slot, last = sequence.slot, self.running.pop()
        sequence.slot = -1
        if last is sequence:
            return None
        self.running[slot], last.slot = last, slot
        return last


def _common(first: tuple[bytes, ...], second: tuple[bytes, ...]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count

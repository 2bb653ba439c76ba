"""Scheduling: which requests have a slot, and what each of them runs in a step. Plain Python, no tensors."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from itertools import count
from typing import NamedTuple

from slr_core.engine.sequence import Phase, Sequence

MAX_BYPASSES = 8
"""A waiting request is overtaken by at most this many later ones."""


class Work(NamedTuple):
    """What one request runs in a step.

    Attributes:
        sequence: the request.
        queries: positions of its forward pass; 0 if it needs none.
    """

    sequence: Sequence
    queries: int


Plan = tuple[Work, ...]
"""One step: each running request at most once, in order of arrival. Prompts beyond the chunk wait for the next one."""


class Scheduler:
    """Groups of requests take turns; within a group, first come, first served. Bypassing is bounded.

    A request whose group has no other waiting request gets its slot after at most one request of each group that
    waited when it arrived, and :data:`MAX_BYPASSES` others.

    Slots are dense: a request's slot is its index in ``running``. When a request is released, the last one moves into
    its slot.

    Args:
        slots: maximum number of running requests.
        max_positions: maximum number of cache positions that they reserve together.
        prefill_chunk: maximum number of prompt positions in one step.
        known_prefixes: returns how many of a request's prefix keys are cached.
        drop: called with each cancelled or expired request; must :meth:`release` it.
        admit: called with each request that gets a slot, before its work is decided.
    """

    def __init__(
        self,
        slots: int,
        max_positions: int,
        *,
        prefill_chunk: int,
        known_prefixes: Callable[[Sequence], int],
        drop: Callable[[Sequence], None],
        admit: Callable[[Sequence], None],
    ) -> None:
        self.slots, self.max_positions, self.prefill_chunk = slots, max_positions, prefill_chunk
        self.known_prefixes, self.drop, self.admit = known_prefixes, drop, admit
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.reserved = 0
        self._turns: dict[Hashable, int] = {}
        """Groups that wait, by when they joined the end of the line."""
        self._next_turn = count()

    def schedule(self) -> Plan:
        """Drop cancelled requests, admit waiting ones, and decide what every running request runs."""
        self._drop_cancelled()
        self._admit_waiting()
        return self._plan()

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        for sequence in [*self.waiting, *self.running]:
            if sequence.cancelled or now > sequence.deadline:
                self.drop(sequence)

    def _admit_waiting(self) -> None:
        """Give slots to waiting requests, one of each group in turn.

        A request that does not fit, or that shares a prefix with a prompt that is being prefilled, stays in the queue
        and may be overtaken :data:`MAX_BYPASSES` times.
        """
        if len(self.running) == self.slots:
            return
        kept: list[Sequence] = []
        for sequence in self._in_line():
            if len(self.running) == self.slots:
                break
            may_wait = sequence.bypassed < MAX_BYPASSES
            fits = self.reserved + sequence.reserved <= self.max_positions
            if not fits or (may_wait and self._shares_running_prefill(sequence)):
                kept.append(sequence)
            else:
                self.waiting.remove(sequence)
                sequence.slot = len(self.running)
                self.running.append(sequence)
                self.reserved += sequence.reserved
                if not any(overtaken.group == sequence.group for overtaken in kept):
                    self._turns[sequence.group] = next(self._next_turn)
                self.admit(sequence)
                for overtaken in kept:
                    overtaken.bypassed += 1
            if any(overtaken.bypassed >= MAX_BYPASSES for overtaken in kept):
                break
        self._forget_turns()

    def _in_line(self) -> list[Sequence]:
        """Waiting requests in the order in which they should be admitted."""
        for sequence in self.waiting:
            if sequence.group not in self._turns:
                self._turns[sequence.group] = next(self._next_turn)
        return _interleave(self.waiting, lambda sequence: self._turns[sequence.group])

    def _forget_turns(self) -> None:
        """Let groups that have left the queue join its end when they come back."""
        waiting = {sequence.group for sequence in self.waiting}
        self._turns = {group: turn for group, turn in self._turns.items() if group in waiting}

    def _plan(self) -> Plan:
        """One pass for every running request; prompts share ``prefill_chunk`` positions, their groups in turn.

        Within a group in order of arrival, not of slots: a request that moves into another slot must not overtake.
        """
        running = sorted(self.running, key=lambda sequence: sequence.arrived_at)
        work = {sequence: sequence.queries() for sequence in running}
        budget = self.prefill_chunk
        prefilling = [sequence for sequence in running if sequence.phase is Phase.PREFILL]
        for sequence in _interleave(prefilling, lambda sequence: sequence.arrived_at):
            work[sequence] = min(work[sequence], budget)
            budget -= work[sequence]
            if not work[sequence]:
                del work[sequence]
        return tuple(Work(sequence, queries) for sequence, queries in work.items())

    def _shares_running_prefill(self, sequence: Sequence) -> bool:
        """Whether a running prefill will put more of this request's prefix into the cache."""
        prefilling = [other for other in self.running if other.phase is Phase.PREFILL]
        return any(
            _common_length(other.prefix_keys, sequence.prefix_keys) > self.known_prefixes(sequence)
            for other in prefilling
        )

    def release(self, sequence: Sequence) -> Sequence | None:
        """Remove a request from the queue or from its slot.

        Returns:
            The request that moves into the slot, if any.
        """
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            self._forget_turns()
            return None
        self.reserved -= sequence.reserved
        slot, last = sequence.slot, self.running.pop()
        sequence.slot = -1
        if last is sequence:
            return None
        self.running[slot], last.slot = last, slot
        return last


def _interleave(sequences: Iterable[Sequence], turn: Callable[[Sequence], float]) -> list[Sequence]:
    """The first request of each group, then the second of each, and so on; those of one rank sorted by ``turn``."""
    ranks: Counter[Hashable] = Counter()
    ranked: list[tuple[int, float, Sequence]] = []
    for sequence in sequences:
        ranked.append((ranks[sequence.group], turn(sequence), sequence))
        ranks[sequence.group] += 1
    return [sequence for *_, sequence in sorted(ranked, key=lambda entry: entry[:2])]


def _common_length(first: tuple[bytes, ...], second: tuple[bytes, ...]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count

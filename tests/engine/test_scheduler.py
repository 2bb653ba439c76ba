"""The scheduler alone: stand-ins for sequences, no model."""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from slr_core.engine.scheduler import Scheduler
from slr_core.engine.sequence import Phase


class Stub:
    """A request with a prompt of so many tokens, whose prefixes are named by ``keys``, and so many passes after it."""

    made = 0

    def __init__(self, prompt=4, reserved=1, keys=(), passes=1):
        Stub.made += 1
        self.arrived = float(Stub.made)
        self.prompt, self.reserved, self.keys, self.passes = prompt, reserved, keys, passes
        self.phase, self.slot, self.bypassed, self.filled = Phase.PREFILL, -1, 0, 0

    def queries(self):
        return self.prompt - self.filled if self.phase is Phase.PREFILL else 1

    def run(self, queries):
        """One pass; whether it has ended."""
        if self.phase is Phase.PREFILL:
            self.filled += queries
            if self.filled == self.prompt:
                self.phase = Phase.DECODE
            return False
        self.passes -= 1
        return self.passes == 0


def scheduler(slots=4, max_tokens=100, **options):
    return Scheduler(slots, max_tokens, **options)


def queue(made, *stubs):
    made.waiting.extend(stubs)
    return stubs


def keys(prompt):
    return tuple(prompt[: i + 1].encode() for i in range(len(prompt)))


# -- admission -------------------------------------------------------------------------------------------


def test_an_idle_scheduler_has_nothing_to_do():
    assert scheduler().schedule() == []


def test_first_come_first_served_as_far_as_there_are_slots():
    made = scheduler(slots=2)
    a, b, c = queue(made, Stub(), Stub(), Stub())
    assert made.schedule() == [(a, 4), (b, 4)]
    assert (a.slot, b.slot, c.slot) == (0, 1, -1)
    assert list(made.waiting) == [c]
    assert c.bypassed == 0


def test_admission_is_told_once_and_before_it_is_decided_what_runs():
    entered = []

    def enter(stub):
        entered.append(stub)
        stub.filled = 3  # most of it was at hand

    made = scheduler(slots=1, enter=enter)
    a, _ = queue(made, Stub(), Stub())
    assert made.schedule() == [(a, 1)]
    made.schedule()
    assert entered == [a]


def test_who_does_not_fit_is_overtaken_but_not_for_ever():
    made = scheduler(slots=9, max_tokens=10, max_bypasses=2)
    running, large, *small = queue(made, Stub(reserved=5), Stub(reserved=6), *[Stub() for _ in range(4)])
    made.schedule()
    assert made.running == [running, *small[:2]]
    assert (large.bypassed, made.reserved) == (2, 7)
    # Two have left and there is room for small ones: but it is the large one's turn.
    for stub in small[:2]:
        made.release(stub)
    made.schedule()
    assert list(made.waiting) == [large, *small[2:]]
    made.release(running)
    made.schedule()
    assert made.running == [large, *small[2:]]
    assert not made.waiting


def test_reserved_columns_are_given_back():
    made = scheduler(max_tokens=10)
    a, b, c = queue(made, Stub(reserved=6), Stub(reserved=5), Stub(reserved=4))
    made.schedule()
    assert (made.running, made.reserved) == ([a, c], 10)
    made.release(a)
    assert made.reserved == 4
    made.schedule()
    assert (made.running, made.reserved) == ([c, b], 9)


def test_nobody_is_lost_when_the_question_what_is_known_fails():
    # The engine has to tell everyone: it must still find them.
    def known(stub):
        raise RuntimeError("broken")

    made = scheduler(known=known)
    stubs = queue(made, *[Stub(keys=keys("ab")) for _ in range(3)])
    with pytest.raises(RuntimeError, match="broken"):
        made.schedule()
    assert sorted([*made.running, *made.waiting], key=id) == sorted(stubs, key=id)


# -- prefixes --------------------------------------------------------------------------------------------


def test_who_can_use_a_prefill_that_runs_waits_for_it_and_lets_others_pass():
    at_hand = set()
    made = scheduler(known=lambda stub: sum(key in at_hand for key in stub.keys))
    first, same, longer, other = queue(
        made, Stub(keys=keys("ab")), Stub(keys=keys("ab")), Stub(keys=keys("abc")), Stub(keys=keys("x"))
    )
    made.schedule()
    assert (made.running, list(made.waiting)) == ([first, other], [same, longer])
    assert (same.bypassed, longer.bypassed) == (1, 1)
    first.run(4)
    at_hand.update(keys("ab"))
    made.schedule()
    assert made.running == [first, other, same, longer]


def test_nobody_waits_for_a_prefill_of_what_is_at_hand_already():
    made = scheduler(known=lambda stub: 1)
    stubs = queue(made, Stub(keys=keys("ab")), Stub(keys=keys("ac")))
    made.schedule()
    assert made.running == list(stubs)


def test_nobody_waits_for_a_prefix_that_only_looks_alike():
    # The second block is the same, what is before it is not.
    made = scheduler()
    stubs = queue(made, Stub(keys=keys("ab")), Stub(keys=keys("xb")))
    made.schedule()
    assert made.running == list(stubs)


def test_nobody_waits_for_who_is_past_its_prompt():
    made = scheduler()
    first, second = Stub(keys=keys("ab")), Stub(keys=keys("ab"))
    queue(made, first)
    made.schedule()
    first.run(4)
    queue(made, second)
    made.schedule()
    assert made.running == [first, second]


def test_waiting_for_a_prefix_ends_when_others_have_passed_often_enough():
    made = scheduler(slots=9, max_bypasses=2, prefill_chunk=1)
    first, same, *others = queue(made, Stub(keys=keys("a")), Stub(keys=keys("a")), *[Stub() for _ in range(4)])
    made.schedule()
    assert made.running == [first, *others[:2]]
    made.schedule()
    assert made.running == [first, *others[:2], same, *others[2:]]


# -- what runs -------------------------------------------------------------------------------------------


def test_prompts_share_a_chunk_and_everyone_else_runs_a_pass():
    made = scheduler(prefill_chunk=6)
    a, b, c, d = queue(made, *[Stub() for _ in range(4)])
    a.phase = Phase.LOOP
    assert made.schedule() == [(a, 1), (b, 4), (c, 2)]
    b.run(4)
    c.run(2)
    assert made.schedule() == [(a, 1), (b, 1), (c, 2), (d, 4)]


def test_a_prompt_longer_than_a_chunk_takes_several_steps():
    made = scheduler(prefill_chunk=4)
    (a,) = queue(made, Stub(prompt=9))
    seen = []
    while a.phase is Phase.PREFILL:
        ((_, queries),) = made.schedule()
        seen.append(queries)
        a.run(queries)
    assert seen == [4, 4, 1]


def test_a_prefill_is_not_starved_by_those_that_came_later():
    # Whoever moves into a freed slot must not overtake: a stream of short answers would hold a prompt up for ever.
    made = scheduler(slots=4, prefill_chunk=4)
    _, _, long, *_ = queue(made, Stub(), Stub(), Stub(prompt=5), *[Stub() for _ in range(20)])
    for _ in range(8):
        for stub, queries in list(made.schedule()):
            if stub.run(queries):
                made.release(stub)
    assert made.waiting
    assert long.phase is not Phase.PREFILL


# -- leaving ---------------------------------------------------------------------------------------------


def test_the_last_moves_into_the_slot_that_is_free():
    made = scheduler()
    a, b, c = queue(made, Stub(), Stub(), Stub())
    made.schedule()
    assert made.release(a) is c
    assert (made.running, a.slot, c.slot) == ([c, b], -1, 0)
    assert made.release(b) is None
    assert made.release(c) is None
    assert (made.running, made.reserved) == ([], 0)


def test_who_waits_can_leave_too():
    made = scheduler(slots=1)
    a, b, c = queue(made, Stub(), Stub(), Stub())
    made.schedule()
    assert made.release(b) is None
    assert (list(made.waiting), made.running, made.reserved) == ([c], [a], 1)


# -- anything --------------------------------------------------------------------------------------------


class AnyLoad(RuleBasedStateMachine):
    """Arrivals, steps and cancellations in any order."""

    SLOTS, TOKENS, CHUNK, BYPASSES = 3, 12, 5, 2

    def __init__(self):
        super().__init__()
        self.at_hand = set()
        self.made = Scheduler(
            self.SLOTS,
            self.TOKENS,
            prefill_chunk=self.CHUNK,
            max_bypasses=self.BYPASSES,
            known=self.known,
            enter=self.enter,
        )
        self.present: list[Stub] = []
        self.overtaken: dict[Stub, int] = {}
        self.entered: list[Stub] = []

    def known(self, stub):
        return next((i for i, key in enumerate(stub.keys) if key not in self.at_hand), len(stub.keys))

    def enter(self, stub):
        self.entered.append(stub)
        stub.filled = min(self.known(stub), stub.prompt - 1)
        for other in self.present:
            if other.arrived < stub.arrived and other.slot < 0:
                self.overtaken[other] += 1

    @rule(
        prompt=st.integers(1, 12),
        reserved=st.integers(1, 12),
        passes=st.integers(1, 5),
        text=st.text("ab", min_size=0, max_size=3),
    )
    def arrive(self, prompt, reserved, passes, text):
        stub = Stub(prompt, reserved, keys(text), passes)
        self.present.append(stub)
        self.overtaken[stub] = 0
        self.made.waiting.append(stub)

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def cancel(self, data):
        self.leave(data.draw(st.sampled_from(self.present)))

    @rule()
    def step(self):
        before = list(self.made.running)
        work = self.made.schedule()
        running = self.made.running
        assert running[: len(before)] == before
        # Everyone who runs has one pass, but prompts that the chunk has no room for.
        assert len({stub.slot for stub, _ in work}) == len(work)
        prefilled = sum(queries for stub, queries in work if stub.phase is Phase.PREFILL)
        assert prefilled <= self.CHUNK
        asked = dict(work)
        for stub in running:
            if stub.phase is not Phase.PREFILL:
                assert asked[stub] == 1
            elif asked.get(stub, 0) < stub.queries():
                assert prefilled == self.CHUNK
            assert stub not in asked or asked[stub] > 0
        self.someone_is_kept_for_a_reason()
        for stub, queries in work:
            if stub.run(queries):
                self.leave(stub)
            elif stub.phase is not Phase.PREFILL:
                self.at_hand.update(stub.keys)

    def someone_is_kept_for_a_reason(self):
        made, stuck = self.made, False
        if len(made.running) == made.slots:
            return
        for stub in made.waiting:
            fits = made.reserved + stub.reserved <= made.max_tokens
            filling = [other for other in made.running if other.phase is Phase.PREFILL]
            useful = any(set(other.keys[self.known(stub) :]) & set(stub.keys) for other in filling)
            assert not fits or (useful and stub.bypassed < self.BYPASSES) or stuck
            stuck = stuck or stub.bypassed >= self.BYPASSES

    def leave(self, stub):
        slot, last = stub.slot, self.made.running[-1] if self.made.running else None
        moved = self.made.release(stub)
        assert moved is (None if slot < 0 or stub is last else last)
        self.present.remove(stub)

    @invariant()
    def nobody_is_lost_or_doubled(self):
        everyone = [*self.made.waiting, *self.made.running]
        assert len(everyone) == len(self.present)
        assert set(everyone) == set(self.present)
        assert len(set(self.entered)) == len(self.entered)

    @invariant()
    def slots_are_dense_and_never_too_many(self):
        assert [stub.slot for stub in self.made.running] == list(range(len(self.made.running)))
        assert all(stub.slot == -1 for stub in self.made.waiting)
        assert len(self.made.running) <= self.SLOTS

    @invariant()
    def what_is_reserved_adds_up(self):
        assert self.made.reserved == sum(stub.reserved for stub in self.made.running) <= self.TOKENS

    @invariant()
    def the_queue_is_in_order_and_nobody_is_overtaken_too_often(self):
        waiting = list(self.made.waiting)
        assert waiting == sorted(waiting, key=lambda stub: stub.arrived)
        assert isinstance(self.made.waiting, deque)
        for stub in waiting:
            assert stub.bypassed == self.overtaken[stub] <= self.BYPASSES

    def teardown(self):
        # Everyone is served in the end, in as many passes as all of them need one after another.
        needed = sum(stub.prompt + stub.passes + 1 for stub in self.present)
        for _ in range(needed):
            self.step()
        assert not self.present


TestAnyLoad = AnyLoad.TestCase
TestAnyLoad.settings = settings(max_examples=60, stateful_step_count=40)

"""The scheduler alone, with stubs in place of sequences and no model."""

from collections import deque
from math import inf
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from slr_core.engine import scheduler as module
from slr_core.engine.scheduler import Scheduler
from slr_core.engine.sequence import Phase


class Stub:
    """A request with a prompt of ``prompt`` tokens, with prefix keys, and ``passes`` passes after its prompt."""

    made = 0

    def __init__(self, prompt=4, reserved=1, prefix_keys=(), passes=1, group=None):
        Stub.made += 1
        self.arrived_at = float(Stub.made)
        self.prompt, self.reserved, self.prefix_keys, self.passes = prompt, reserved, prefix_keys, passes
        self.phase, self.slot, self.bypassed, self.filled = Phase.PREFILL, -1, 0, 0
        self.cancelled, self.deadline = False, inf
        self.group = self if group is None else group

    def queries(self):
        return self.prompt - self.filled if self.phase is Phase.PREFILL else 1

    def run(self, queries):
        """Run one pass; whether it was the last."""
        if self.phase is Phase.PREFILL:
            self.filled += queries
            if self.filled == self.prompt:
                self.phase = Phase.DECODE
            return False
        self.passes -= 1
        return self.passes == 0


def scheduler(slots=4, max_positions=100, prefill_chunk=512, known=lambda stub: 0, admit=lambda stub: None):
    made = Scheduler(
        slots,
        max_positions,
        prefill_chunk=prefill_chunk,
        known_prefixes=known,
        drop=lambda stub: made.release(stub),
        admit=admit,
    )
    return made


@pytest.fixture
def two_bypasses(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYPASSES", 2)


def queue(made, *stubs):
    made.waiting.extend(stubs)
    return stubs


def keys(prompt):
    return tuple(prompt[: i + 1].encode() for i in range(len(prompt)))


# -- admission -------------------------------------------------------------------------------------------


def test_idle():
    assert scheduler().schedule() == ()


def test_first_come_first_served():
    made = scheduler(slots=2)
    a, b, c = queue(made, Stub(), Stub(), Stub())
    assert made.schedule() == ((a, 4), (b, 4))
    assert (a.slot, b.slot, c.slot) == (0, 1, -1)
    assert list(made.waiting) == [c]
    assert c.bypassed == 0


def test_admit_is_called_once_before_planning():
    admitted = []

    def admit(stub):
        admitted.append(stub)
        stub.filled = 3  # most of the prompt was cached

    made = scheduler(slots=1, admit=admit)
    a, _ = queue(made, Stub(), Stub())
    assert made.schedule() == ((a, 1),)
    made.schedule()
    assert admitted == [a]


def test_large_request_is_bypassed_twice(two_bypasses):
    made = scheduler(slots=9, max_positions=10)
    running, large, *small = queue(made, Stub(reserved=5), Stub(reserved=6), *[Stub() for _ in range(4)])
    made.schedule()
    assert made.running == [running, *small[:2]]
    assert (large.bypassed, made.reserved) == (2, 7)
    # There is room for small ones again, but the large one is next.
    for stub in small[:2]:
        made.release(stub)
    made.schedule()
    assert list(made.waiting) == [large, *small[2:]]
    made.release(running)
    made.schedule()
    assert made.running == [large, *small[2:]]
    assert not made.waiting


def test_release_frees_positions():
    made = scheduler(max_positions=10)
    a, b, c = queue(made, Stub(reserved=6), Stub(reserved=5), Stub(reserved=4))
    made.schedule()
    assert (made.running, made.reserved) == ([a, c], 10)
    made.release(a)
    assert made.reserved == 4
    made.schedule()
    assert (made.running, made.reserved) == ([c, b], 9)


def test_error_in_known_prefixes_loses_no_request():
    # The engine has to fail all requests, so it must still find them.
    def known(stub):
        raise RuntimeError("broken")

    made = scheduler(known=known)
    stubs = queue(made, *[Stub(prefix_keys=keys("ab")) for _ in range(3)])
    with pytest.raises(RuntimeError, match="broken"):
        made.schedule()
    assert sorted([*made.running, *made.waiting], key=id) == sorted(stubs, key=id)


# -- groups ----------------------------------------------------------------------------------------------


def test_groups_take_turns():
    made, order = scheduler(slots=1), []
    large = queue(made, *[Stub(group="large") for _ in range(4)])
    made.schedule()
    single, *pair = queue(made, Stub(), *[Stub(group="pair") for _ in range(2)])
    while made.running:
        order += made.running
        made.release(made.running[0])
        made.schedule()
    assert order == [*large[:2], single, pair[0], large[2], pair[1], large[3]]


def test_large_request_gives_way_as_others_keep_coming():
    made, served = scheduler(slots=1), []
    queue(made, *[Stub(group="large") for _ in range(5)])
    for _ in range(10):
        queue(made, Stub())
        made.schedule()
        served.append(made.running[0].group == "large")
        made.release(made.running[0])
    assert "".join("-L"[large] for large in served) == "L-L--L---L"


def test_group_that_comes_back_joins_the_end():
    made = scheduler(slots=1)
    _, again = queue(made, Stub(group="a"), Stub(group="a"))
    made.schedule()
    made.release(again)
    b, again = queue(made, Stub(), Stub(group="a"))
    made.release(made.running[0])
    made.schedule()
    assert (made.running, list(made.waiting)) == ([b], [again])


def test_prefills_of_groups_take_turns():
    made = scheduler(prefill_chunk=6)
    first, second, other = queue(made, Stub(group="large"), Stub(group="large"), Stub())
    assert made.schedule() == ((first, 4), (other, 2))
    first.run(4)
    other.run(2)
    assert made.schedule() == ((first, 1), (second, 4), (other, 2))


# -- prefixes --------------------------------------------------------------------------------------------


def test_waits_for_running_prefill_of_its_prefix():
    cached = set()
    made = scheduler(known=lambda stub: sum(key in cached for key in stub.prefix_keys))
    first, same, longer, other = queue(made, *[Stub(prefix_keys=keys(text)) for text in ("ab", "ab", "abc", "x")])
    made.schedule()
    assert (made.running, list(made.waiting)) == ([first, other], [same, longer])
    assert (same.bypassed, longer.bypassed) == (1, 1)
    first.run(4)
    cached.update(keys("ab"))
    made.schedule()
    assert made.running == [first, other, same, longer]


def test_cached_prefix_is_not_waited_for():
    made = scheduler(known=lambda stub: 1)
    stubs = queue(made, Stub(prefix_keys=keys("ab")), Stub(prefix_keys=keys("ac")))
    made.schedule()
    assert made.running == list(stubs)


def test_other_prefix_is_not_waited_for():
    # The second block is equal, the first is not.
    made = scheduler()
    stubs = queue(made, Stub(prefix_keys=keys("ab")), Stub(prefix_keys=keys("xb")))
    made.schedule()
    assert made.running == list(stubs)


def test_finished_prefill_is_not_waited_for():
    made = scheduler()
    first, second = Stub(prefix_keys=keys("ab")), Stub(prefix_keys=keys("ab"))
    queue(made, first)
    made.schedule()
    first.run(4)
    queue(made, second)
    made.schedule()
    assert made.running == [first, second]


def test_waiting_for_a_prefix_ends_after_two_bypasses(two_bypasses):
    made = scheduler(slots=9, prefill_chunk=1)
    first, same, *others = queue(
        made, Stub(prefix_keys=keys("a")), Stub(prefix_keys=keys("a")), *[Stub() for _ in range(4)]
    )
    made.schedule()
    assert made.running == [first, *others[:2]]
    made.schedule()
    assert made.running == [first, *others[:2], same, *others[2:]]


# -- what runs -------------------------------------------------------------------------------------------


def test_prompts_share_a_chunk():
    made = scheduler(prefill_chunk=6)
    a, b, c, d = queue(made, *[Stub() for _ in range(4)])
    a.phase = Phase.LOOP
    assert made.schedule() == ((a, 1), (b, 4), (c, 2))
    b.run(4)
    c.run(2)
    assert made.schedule() == ((a, 1), (b, 1), (c, 2), (d, 4))


def test_long_prompt_takes_several_steps():
    made = scheduler(prefill_chunk=4)
    (a,) = queue(made, Stub(prompt=9))
    seen = []
    while a.phase is Phase.PREFILL:
        ((_, queries),) = made.schedule()
        seen.append(queries)
        a.run(queries)
    assert seen == [4, 4, 1]


def test_later_requests_do_not_starve_a_prefill():
    # A request that moves into a freed slot must not overtake: short answers would delay a long prompt for ever.
    made = scheduler(slots=4, prefill_chunk=4)
    _, _, long, *_ = queue(made, Stub(), Stub(), Stub(prompt=5), *[Stub() for _ in range(20)])
    for _ in range(8):
        for stub, queries in list(made.schedule()):
            if stub.run(queries):
                made.release(stub)
    assert made.waiting
    assert long.phase is not Phase.PREFILL


# -- leaving ---------------------------------------------------------------------------------------------


def test_last_request_moves_into_freed_slot():
    made = scheduler()
    a, b, c = queue(made, Stub(), Stub(), Stub())
    made.schedule()
    assert made.release(a) is c
    assert (made.running, a.slot, c.slot) == ([c, b], -1, 0)
    assert made.release(b) is None
    assert made.release(c) is None
    assert (made.running, made.reserved) == ([], 0)


def test_release_of_waiting_request():
    made = scheduler(slots=1)
    a, b, c = queue(made, Stub(), Stub(), Stub())
    made.schedule()
    assert made.release(b) is None
    assert (list(made.waiting), made.running, made.reserved) == ([c], [a], 1)


def test_cancelled_and_expired_requests_are_dropped():
    made = scheduler(slots=2)
    a, b, c, d, e = queue(made, *[Stub() for _ in range(5)])
    made.schedule()
    a.cancelled, c.cancelled, d.deadline = True, True, 0.0
    # Their slots are free for the same step.
    assert made.schedule() == ((b, 4), (e, 4))
    assert (made.running, list(made.waiting), made.reserved) == ([b, e], [], 2)


# -- any load --------------------------------------------------------------------------------------------


class AnyLoad(RuleBasedStateMachine):
    """Arrivals, steps and releases in any order."""

    SLOTS, POSITIONS, CHUNK, BYPASSES = 3, 12, 5, 2

    def __init__(self):
        super().__init__()
        self.patch = patch.object(module, "MAX_BYPASSES", self.BYPASSES)
        self.patch.start()
        self.cached = set()
        self.made = scheduler(self.SLOTS, self.POSITIONS, self.CHUNK, self.known, self.admit)
        self.present: list[Stub] = []
        self.overtaken: dict[Stub, int] = {}
        self.line: list[object] = []
        self.places: dict[Stub, tuple[int, int]] = {}
        self.most_ahead: dict[Stub, int] = {}
        self.admitted: list[Stub] = []

    def known(self, stub):
        return next((i for i, key in enumerate(stub.prefix_keys) if key not in self.cached), len(stub.prefix_keys))

    def admit(self, stub):
        self.admitted.append(stub)
        stub.filled = min(self.known(stub), stub.prompt - 1)
        waiting = [other for other in self.present if other.slot < 0]
        for other in waiting:
            if self.places[other] < self.places[stub]:
                self.overtaken[other] += 1
            if other in self.most_ahead:
                self.most_ahead[other] -= 1
        assert self.most_ahead.get(stub, 0) >= 0, "no more come before it than groups were waiting, and bypasses"
        if all(other.group is not stub.group or other.arrived_at > stub.arrived_at for other in waiting):
            self.line.remove(stub.group)
            self.line.append(stub.group)
        self.leave_line(stub.group)

    def place(self, stub):
        """Its place in the queue: its rank in its group, then its group's place in the line."""
        before = [s for s in self.made.waiting if s.group is stub.group and s.arrived_at < stub.arrived_at]
        return len(before), self.line.index(stub.group)

    def leave_line(self, group):
        if group in self.line and all(s.group is not group or s.slot >= 0 for s in self.present):
            self.line.remove(group)

    @rule(
        prompt=st.integers(1, 12),
        reserved=st.integers(1, 12),
        passes=st.integers(1, 5),
        text=st.text("ab", min_size=0, max_size=3),
        group=st.sampled_from([None, "x", "y"]),
    )
    def arrive(self, prompt, reserved, passes, text, group):
        stub = Stub(prompt, reserved, keys(text), passes, group)
        if stub.group not in self.line:
            self.most_ahead[stub] = len(self.line) + self.BYPASSES
            self.line.append(stub.group)
        self.present.append(stub)
        self.overtaken[stub] = 0
        self.made.waiting.append(stub)

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def release(self, data):
        self.leave(data.draw(st.sampled_from(self.present)))

    @rule()
    def step(self):
        before = list(self.made.running)
        self.places = {stub: self.place(stub) for stub in self.made.waiting}
        work = self.made.schedule()
        running = self.made.running
        assert running[: len(before)] == before
        # Every running request has one pass, except prompts that the chunk has no room for.
        assert len({stub.slot for stub, _ in work}) == len(work)
        prefilled = sum(queries for stub, queries in work if stub.phase is Phase.PREFILL)
        assert prefilled <= self.CHUNK
        planned = dict(work)
        for stub in running:
            if stub.phase is not Phase.PREFILL:
                assert planned[stub] == 1
            elif planned.get(stub, 0) < stub.queries():
                assert prefilled == self.CHUNK
            assert stub not in planned or planned[stub] > 0
        self.check_waiting()
        for stub, queries in work:
            if stub.run(queries):
                self.leave(stub)
            elif stub.phase is not Phase.PREFILL:
                self.cached.update(stub.prefix_keys)

    def check_waiting(self):
        made, stuck = self.made, False
        if len(made.running) == made.slots:
            return
        for stub in sorted(made.waiting, key=self.places.__getitem__):
            fits = made.reserved + stub.reserved <= made.max_positions
            filling = [other for other in made.running if other.phase is Phase.PREFILL]
            useful = any(set(other.prefix_keys[self.known(stub) :]) & set(stub.prefix_keys) for other in filling)
            assert not fits or (useful and stub.bypassed < self.BYPASSES) or stuck
            stuck = stuck or stub.bypassed >= self.BYPASSES

    def leave(self, stub):
        slot, last = stub.slot, self.made.running[-1] if self.made.running else None
        moved = self.made.release(stub)
        assert moved is (None if slot < 0 or stub is last else last)
        self.present.remove(stub)
        self.leave_line(stub.group)

    @invariant()
    def each_request_is_there_once(self):
        requests = [*self.made.waiting, *self.made.running]
        assert len(requests) == len(self.present)
        assert set(requests) == set(self.present)
        assert len(set(self.admitted)) == len(self.admitted)

    @invariant()
    def slots_are_dense(self):
        assert [stub.slot for stub in self.made.running] == list(range(len(self.made.running)))
        assert all(stub.slot == -1 for stub in self.made.waiting)
        assert len(self.made.running) <= self.SLOTS

    @invariant()
    def reserved_positions_add_up(self):
        assert self.made.reserved == sum(stub.reserved for stub in self.made.running) <= self.POSITIONS

    @invariant()
    def queue_is_in_order(self):
        waiting = list(self.made.waiting)
        assert waiting == sorted(waiting, key=lambda stub: stub.arrived_at)
        assert isinstance(self.made.waiting, deque)
        for stub in waiting:
            assert stub.bypassed == self.overtaken[stub] <= self.BYPASSES

    def teardown(self):
        # All requests finish, in as many steps as they need one after another.
        try:
            needed = sum(stub.prompt + stub.passes + 1 for stub in self.present)
            for _ in range(needed):
                self.step()
            assert not self.present
        finally:
            self.patch.stop()


TestAnyLoad = AnyLoad.TestCase
TestAnyLoad.settings = settings(max_examples=60, stateful_step_count=40)

import pytest

from slr_core.engine.runner.step_times import MIN_INTERVAL_S, WINDOW, StepTimes


@pytest.fixture
def clock():
    """Seconds, in a list."""
    return [0.0]


@pytest.fixture
def times(clock):
    made = StepTimes(lambda: clock[0])
    record(made, 4, 50, 0.010)  # the reference of this shape
    clock[0] += MIN_INTERVAL_S
    return made


def record(times, rows, width, duration, count=WINDOW):
    for _ in range(count):
        times.record(rows, width, duration)


@pytest.mark.parametrize(("duration", "changed"), [(0.019, False), (0.021, True), (0.006, False), (0.004, True)])
def test_much_slower_or_faster(times, duration, changed):
    record(times, 3, 60, duration)  # rounded up, the same shape
    assert times.changed is changed


def test_single_steps_and_other_shapes_do_not_count(times):
    for _ in range(4):
        record(times, 4, 50, 0.010, WINDOW - 3)
        record(times, 4, 50, 1.0, 3)
    record(times, 32, 50, 0.1)
    record(times, 4, 900, 0.1)
    assert not times.changed


def test_at_most_once_an_interval(times, clock):
    record(times, 4, 50, 0.050)
    assert times.changed
    times.reset()
    record(times, 4, 50, 0.050)  # the new reference
    record(times, 4, 50, 0.200)
    assert not times.changed
    clock[0] += MIN_INTERVAL_S
    record(times, 4, 50, 0.200)
    assert times.changed

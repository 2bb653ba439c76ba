"""A run that diverges is stopped; what only looks like it is not."""

import pytest

from slr_core.errors import TrainingError
from slr_core.training.config import TrainingGuardConfig
from slr_core.training.guard import TrainingGuard


def guard():
    return TrainingGuard(TrainingGuardConfig(loss_factor=10.0, patience=3), 2.0, 1.0)


def test_several_steps_in_a_row_are_wanted():
    watch = guard()
    for step in range(20):
        watch.check_loss(3.0 + step % 2, step)
    for step, value in enumerate([41.0, 41.0, 39.0, 41.0, 41.0]):
        watch.check_loss(value, 20 + step)
        assert watch.is_stable == (value < 40)
    with pytest.raises(TrainingError, match="loss has exploded: 50 at step 25, above 10 times 4 in 3 consecutive"):
        watch.check_loss(50.0, 25)
    with pytest.raises(TrainingError, match="the gradient was not finite at step 3"):
        watch.check_gradient(float("inf"), 3)


def test_forward_passes_of_a_step_count_once():
    watch = guard()
    for step in range(22):
        for value in (1.0, 1.0, 99.0 if step >= 20 else 1.0, 1.0):
            watch.check_loss(value, step)
    assert not watch.is_stable
    watch.check_loss(1.0, 22)
    assert watch.is_stable


def test_loss_that_begins_near_zero_may_rise_to_that_of_a_guess():
    watch = guard()
    for step in range(80):
        watch.check_loss(0.01 if step < 40 else 6.0, step)
        watch.check_gradient(0.001 if step < 40 else 9.0, step)
        assert watch.is_stable
    for step in (80, 81):
        watch.check_loss(1e6, step)
    with pytest.raises(TrainingError, match="above 10 times 2 in 3"):
        watch.check_loss(1e6, 82)

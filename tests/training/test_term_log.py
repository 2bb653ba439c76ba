"""Means between logs."""

from torch import tensor

from slr_core.training.term_log import TermLog


def test_means_are_of_the_steps_since_the_last_log():
    log = TermLog()
    log.add("loss", tensor(1.0))
    log.add("loss", tensor(3.0))
    log.add("late", tensor(5.0))
    assert log.take_means() == {"loss": 2.0, "late": 5.0}
    log.add("loss", tensor(7.0))
    assert log.take_means() == {"loss": 7.0}
    assert log.take_means() == {}


def test_terms_over_nothing_are_named_once():
    log = TermLog()
    for count in (0, 2):
        log.add("some", tensor(0.0), tensor(count))
        log.add("none", tensor(0.0), tensor(0))
        log.add("norm", tensor(0.0))
    assert log.take_empty() == ["none"]
    log.add("none", tensor(0.0), tensor(0))
    log.add("some", tensor(0.0), tensor(0))
    log.add("late", tensor(0.0), tensor(0))
    assert log.take_empty() == ["late"]

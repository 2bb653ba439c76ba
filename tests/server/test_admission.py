import pytest

from slr_server.admission import Admission
from slr_server.errors import QueueFull


class Timed(Admission):
    """With ten places, and a queue and a clock that tests set."""

    waiting, now = 0, 100.0

    def __init__(self):
        super().__init__(10, lambda most: self.waiting, lambda: self.now)


@pytest.fixture
def admission():
    return Timed()


def retry_after(admission, count):
    with pytest.raises(QueueFull) as error, admission.reserve(count):
        pass
    return error.value.retry_after_s


def test_reservation(admission):
    admission.waiting = 4
    with admission.reserve(4):
        with admission.reserve(2):
            retry_after(admission, 1)
        retry_after(admission, 3)
    with admission.reserve(6):
        pass


def test_reservation_ends_on_failure(admission):
    with pytest.raises(ZeroDivisionError), admission.reserve(10):
        raise ZeroDivisionError
    with admission.reserve(10):
        pass


def test_retry_after(admission):
    admission.waiting = 10
    assert retry_after(admission, 1) == 1, "the rate is unknown"
    for _ in range(20):
        admission.record_finished()
        admission.now += 0.5
    assert retry_after(admission, 1) == 6, "the rate is two per second, ten wait before it"
    assert retry_after(admission, 8) == 9
    assert retry_after(admission, 10_000) == 60
    admission.now += 10
    assert retry_after(admission, 1) == 11, "none finished for as long as twenty took before"


def test_idle_time_does_not_slow_the_rate(admission):
    admission.now += 1000
    with admission.reserve(1):
        pass
    admission.now += 2
    admission.record_finished()
    admission.waiting = 10
    assert retry_after(admission, 1) == 22

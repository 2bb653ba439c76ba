import pytest

from slr_server.admission import Admission
from slr_server.errors import QueueFull


@pytest.fixture
def admission():
    made = Admission(10, lambda: made.waiting, lambda: made.now)
    made.waiting, made.now = 0, 100.0
    return made


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
    assert retry_after(admission, 1) == 1
    assert retry_after(admission, 8) == 4, "the rate is two per second"
    assert retry_after(admission, 10_000) == 60

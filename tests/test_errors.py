import inspect

import pytest

from slr_core import errors

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == errors.__name__
}


def test_the_tree_is_what_the_documentation_says():
    assert set(CLASSES) == {
        "SLRError",
        "ConfigError",
        "CheckpointError",
        "DataError",
        "TrainingError",
        "RequestError",
        "EngineError",
        "DeadlineError",
    }
    assert all(name in errors.__doc__ for name in CLASSES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_derives_from_the_one_base(name):
    assert issubclass(CLASSES[name], errors.SLRError)
    assert issubclass(errors.SLRError, Exception)


def test_wrong_values_are_value_errors_too():
    assert {name for name, kind in CLASSES.items() if issubclass(kind, ValueError)} == {"ConfigError", "RequestError"}


def test_a_request_error_names_its_field():
    error = errors.RequestError("too many", param="max_iterations")
    assert (str(error), error.param) == ("too many", "max_iterations")
    assert errors.RequestError("too many").param is None


def test_siblings_do_not_catch_each_other():
    leaves = [kind for name, kind in CLASSES.items() if name not in ("SLRError", "EngineError")]
    assert all(a is b or not issubclass(a, b) for a in leaves for b in leaves)


def test_a_deadline_is_a_fault_of_the_engine_and_of_no_request():
    assert [name for name, kind in CLASSES.items() if issubclass(errors.DeadlineError, kind)] == [
        "SLRError",
        "EngineError",
        "DeadlineError",
    ]

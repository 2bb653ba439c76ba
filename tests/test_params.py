import pytest

from slr_core.errors import RequestError
from slr_core.params import LoopParams, SamplingParams


@pytest.mark.parametrize("kind", [SamplingParams, LoopParams])
@pytest.mark.parametrize("value", ["1", True, [1], 0.5j])
def test_values_that_are_no_numbers(kind, value):
    for name in vars(kind()).keys() - {"criterion"}:
        with pytest.raises(RequestError, match=rf"^{name} must be a (whole )?number, got ") as told:
            kind(**{name: value})
        assert told.value.param == name


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SamplingParams, "top_k"),
        (SamplingParams, "seed"),
        (LoopParams, "max_iterations"),
        (LoopParams, "min_iterations"),
        (LoopParams, "patience"),
        (LoopParams, "noise_seed"),
    ],
)
def test_fractions_of_whole_numbers(kind, name):
    with pytest.raises(RequestError, match=rf"^{name} must be a whole number, got 1\.5$"):
        kind(**{name: 1.5})


@pytest.mark.parametrize("criterion", ["kj", ["kl"], {"kl": 1}, 3])
def test_criteria_that_there_are_not(criterion):
    with pytest.raises(RequestError, match=r"^criterion must be one of ") as told:
        LoopParams(criterion=criterion)
    assert told.value.param == "criterion"


@pytest.mark.parametrize("name", ["threshold", "noise_scale"])
def test_numbers_that_json_cannot_hold(name):
    for value in (float("inf"), float("nan")):
        with pytest.raises(RequestError, match=rf"^{name} ") as told:
            LoopParams(**{name: value})
        assert told.value.param == name

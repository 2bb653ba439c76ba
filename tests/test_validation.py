"""One message for all faults of a setting: see also ``tests/test_suggest.py``."""

import pytest

from slr_core.config import SLRConfig
from slr_core.errors import ConfigError, DataError
from slr_core.validation import from_stored, shortened, validated


@pytest.mark.parametrize("data", [object(), {"a": {1, 2}}, {"loop": {"a": object()}}, {("a", "b"): 1}])
def test_what_is_not_json_like_is_a_config_error(data):
    with pytest.raises(ConfigError):
        validated(SLRConfig, data)


@pytest.mark.parametrize("depth", [50, 500, 900, 2_000, 100_000])
def test_deep_nesting_is_a_config_error(depth):
    data: dict = {}
    for _ in range(depth):
        data = {"loop": data}
    with pytest.raises(ConfigError):
        validated(SLRConfig, data)


def test_long_settings_are_shortened():
    assert shortened("append") == '"append"'
    assert shortened([1, 2]) == "[1, 2]"
    assert shortened(list(range(100))) == "a list of 100"
    assert len(shortened({str(i): i for i in range(100)})) == 104


def test_what_is_stored_is_read_as_it_is():
    assert from_stored(dict[int, tuple[float, ...]], {"3": [1, 0.5]}) == {3: (1, 0.5)}
    for data, message in (({"3": ["1"]}, r"3\.0: Input should be a valid number"), ("x", "^Input should be")):
        with pytest.raises(DataError, match=message):
            from_stored(dict[int, tuple[float, ...]], data)

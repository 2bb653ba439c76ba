import pytest
import yaml

from slr_core.yaml_text import parse_yaml


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "-2e5", "+1e+6", "1.e2", "1.5e-3", "0.001", "12", "1e309"])
def test_numbers(text):
    found = parse_yaml(f"a: {text}")["a"]
    assert isinstance(found, int | float)
    assert found == float(text)


@pytest.mark.parametrize("text", ["1e", "e3", "1e-3x", "loop_01", "12e3e4", "1-e3"])
def test_texts(text):
    assert parse_yaml(f"a: {text}") == {"a": text}


def test_other_loaders_are_as_they_were():
    assert yaml.safe_load("1e-3") == "1e-3"


def test_objects_are_refused():
    with pytest.raises(yaml.YAMLError):
        parse_yaml("!!python/object/apply:os.getcwd []")

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


@pytest.mark.parametrize("text", ["a: 2026-13-45", "a: " + "9" * 5000, "a: " + "[" * 50_000])
def test_what_python_cannot_hold_is_a_yaml_error(text):
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["a: 1\na: 2", "b: {a: 1, c: 2, a: 3}", "- a: 1\n  a: 1", "{<<: {a: 1}, <<: {b: 1}}"])
def test_a_key_given_twice_is_refused(text):
    with pytest.raises(yaml.YAMLError, match=r"(a|<<) is given twice\n.*line \d"):
        parse_yaml(text)


def test_a_key_may_replace_a_merged_one():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {z: {<<: *b, y: 4}}\nd: {<<: [*a, *b]}\n1: 0\n'1': 0"
    assert parse_yaml(text) == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"z": {"x": 1, "y": 4}},
        "d": {"x": 1, "y": 2},
        1: 0,
        "1": 0,
    }

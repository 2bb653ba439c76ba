import pytest
from pydantic import BaseModel, ValidationError

from slr_core.config import LoopConfig
from slr_core.errors import ConfigError
from slr_core.suggest import did_you_mean, known_fields
from slr_core.validation import validated


class Leaf(BaseModel, extra="forbid"):
    width: int = 0


class Other(BaseModel, extra="forbid"):
    height: int


class Tree(BaseModel, extra="forbid"):
    leaves: tuple[Leaf, ...] = ()
    top: Leaf | None = None
    either: Leaf | Other = Leaf()


def test_nearest_name():
    assert did_you_mean("max_iteration", ["min_iterations", "max_iterations"]) == "; did you mean max_iterations?"
    assert did_you_mean("vibes", ["min_iterations"]) == ""


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        ({"leafs": 1}, {"leaves", "top", "either"}),
        ({"leaves": [{"widht": 1}]}, {"width"}),
        ({"top": {"widht": 1}}, {"width"}),
        ({"either": {"widht": 1}}, {"width", "height"}),
    ],
    ids=["top", "in a list", "in a field", "in a union"],
)
def test_known_fields(data, fields):
    with pytest.raises(ValidationError) as raised:
        Tree.model_validate(data)
    locations = [fault["loc"] for fault in raised.value.errors() if fault["type"] == "extra_forbidden"]
    assert locations
    assert all(known_fields(Tree, location) == fields for location in locations)


def test_config_suggests():
    with pytest.raises(ConfigError, match=r"^lora\.rnk: unknown field; did you mean rank\?$"):
        validated(LoopConfig, {"lora": {"rnk": 3}})
    with pytest.raises(ConfigError, match=r"^vibes: unknown field$"):
        validated(LoopConfig, {"vibes": 3})

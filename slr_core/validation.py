"""Validation of settings that people write: one message that names every faulty field."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from slr_core.errors import ConfigError
from slr_core.suggest import did_you_mean, known_fields

M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], data: Any) -> M:
    """Validate ``data`` as JSON-like input for ``model``.

    Raises:
        ConfigError: one line per faulty field, with its dotted name.
    """
    try:
        return model.model_validate_json(json.dumps(data, default=str))  # YAML reads some words as dates
    except ValidationError as error:
        raise ConfigError("; ".join(_fault(model, fault) for fault in _own_faults(error.errors()))) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"config is not JSON-like: {error}") from error


def _own_faults(faults: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without those that follow from others: a list is too short for pydantic when one of its items is faulty."""
    faulty = {fault["loc"][:end] for fault in faults for end in range(len(fault["loc"]))}
    return [fault for fault in faults if fault["type"] != "too_short" or fault["loc"] not in faulty]


def _fault(model: type[BaseModel], fault: ErrorDetails) -> str:
    location = fault["loc"]
    name = ".".join(map(str, location)) or "config"
    if fault["type"] == "value_error":
        return f"{name}: {fault['ctx']['error']}"
    if fault["type"] != "extra_forbidden":
        return f"{name}: {fault['msg']}"
    return f"{name}: unknown field{did_you_mean(str(location[-1]), known_fields(model, location))}"

"""Validation of settings, which names every faulty field, and of stored records; what differs between two settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from slr_core.errors import ConfigError, DataError
from slr_core.suggest import did_you_mean, known_fields

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


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


def from_stored(kind: type[T], data: Any) -> T:
    """Read ``data``, JSON of a file that the project wrote, as a type with annotations; nothing is converted.

    Raises:
        DataError: it is something else; the message names the first faulty field.
    """
    adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]  # for mypy, a type has no hash
    try:
        return adapter.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        raise DataError(": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))) from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


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


def differences(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted names of the settings that differ, with both values; lists of unequal length differ as a whole."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(key, before.get(key), after.get(key)) for key in [*before, *(after.keys() - before)]]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(str(i), old, new) for i, (old, new) in enumerate(zip(before, after, strict=True))]
    else:
        if before != after:
            yield name, before, after
        return
    for key, old, new in pairs:
        yield from differences(old, new, f"{name}.{key}" if name else key)


def shortened(value: Any) -> str:
    """A setting as JSON, for a message: a long list as its length, what is longer than 100 characters cut."""
    text = json.dumps(value)
    if isinstance(value, list) and len(text) > 100:
        return f"a list of {len(value)}"
    return text if len(text) <= 100 else f"{text[:100]} ..."

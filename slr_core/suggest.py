"""Suggest the known name that a mistyped one resembles most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that resembles ``name`` most; ``None`` if none does.

    ``cutoff``, from 0 to 1, is the least similarity, as :func:`difflib.get_close_matches` measures it.
    """
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause to append to an error message about the unknown ``name``; empty if no known name resembles it."""
    found = nearest(name, known)
    return f"; did you mean {found}?" if found else ""


def known_fields(model: type[BaseModel], location: Sequence[int | str]) -> set[str]:
    """Names of the fields beside the one at ``location``, where pydantic reported an error of ``model``."""
    models = {model}
    for part in location[:-1]:
        fields = [field for of in models for name, field in of.model_fields.items() if part in (name, field.alias)]
        # An index, or the name of a union's member, does not lead to another field.
        models = {nested for field in fields for nested in _models(field.annotation)} or models
    return {field.alias or name for of in models for name, field in of.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)

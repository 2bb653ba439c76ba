"""Panics of native code, such as the tokenizers library's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a panic of native code, such as a tokenizer's, as RuntimeError: by itself it is not an ``Exception``."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__module__ != "pyo3_runtime":
            raise
        raise RuntimeError(str(error)) from error

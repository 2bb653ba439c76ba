"""Parsing of server-sent events."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple


class Event(NamedTuple):
    name: str
    data: Any


def parse(lines: Iterable[str]) -> Iterable[Event]:
    """The events in these lines, without comments."""
    name = "message"
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield Event(name, data if data == "[DONE]" else json.loads(data))
        elif not line:
            name = "message"


def of(text: str) -> list[Event]:
    """The events of a whole stream."""
    return list(parse(text.split("\n")))

"""The sentences of generated word problems: for every operation, forms to train on and held-out ones.

Fields: ``{a}`` the person of whom the story tells, ``{b}`` another person, ``{x}`` the things,
``{n}`` and ``{m}`` numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Forms(NamedTuple):
    """Wordings of the same thing: to train on, and held out."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


NAMES: Final = Forms(
    tuple(
        "Anna Ben Carla David Emma Felix Grace Henry Ida Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Walt".split()
    ),
    tuple("Amir Bella Chen Dora Elif Farid Gina Hugo".split()),
)
THINGS: Final = Forms(
    tuple("apples marbles stickers books pencils cookies cards shells buttons eggs balloons stamps".split()),
    tuple("lemons ribbons badges candles postcards peaches".split()),
)
OTHER_THINGS: Final = Forms(("hats", "chairs", "keys", "cousins"), ("mugs", "lamps", "teachers"))

SENTENCES: Final[Mapping[str, Forms]] = {
    "start": Forms(
        (
            "{a} has {n} {x}.",
            "{a} owns {n} {x}.",
            "There are {n} {x} in {a}'s bag.",
            "{a} starts the day with {n} {x}.",
            "{a} got {n} {x} as a present.",
            "At first {a} has {n} {x}.",
        ),
        ("{a} counted {n} {x} in a drawer at home.", "In {a}'s box lie {n} {x}.", "{a} brought {n} {x}."),
    ),
    "add": Forms(
        (
            "{a} buys {n} more {x}.",
            "{a} finds {n} {x}.",
            "Then {a} gets {n} more {x}.",
            "A friend gives {a} {n} {x}.",
            "{a}'s mother brings {n} more {x}.",
            "Later {a} wins another {n} {x}.",
            "{a} picks up {n} more {x} on the way.",
            "{a} receives {n} {x} by mail.",
        ),
        ("An uncle hands {a} {n} extra {x}.", "{a}'s collection grows by {n} {x}.", "{n} new {x} arrive for {a}."),
    ),
    "subtract": Forms(
        (
            "{a} gives away {n} {x}.",
            "{a} loses {n} of the {x}.",
            "{n} of {a}'s {x} get lost.",
            "{a} sells {n} {x}.",
            "Then {a} gives {n} {x} to a neighbor.",
            "{a} leaves {n} {x} at school.",
            "{a}'s brother takes {n} of the {x}.",
            "{a} throws away {n} old {x}.",
        ),
        ("{n} of {a}'s {x} are stolen.", "{a} drops {n} {x} into the river.", "{a} hands {n} of the {x} to a teacher."),
    ),
    "add_packs": Forms(
        (
            "{a} buys {m} packs of {n} {x} each.",
            "{m} friends give {a} {n} {x} each.",
            "For {m} days, {a} gets {n} {x} a day.",
            "{a} finds {m} bags with {n} {x} in each.",
        ),
        ("On each of {m} trips, {a} collects {n} {x}.", "{m} parcels come for {a}, every one with {n} {x}."),
    ),
    "subtract_packs": Forms(
        (
            "{a} gives {n} {x} to each of {m} friends.",
            "{a} sells {m} bags of {n} {x} each.",
            "For {m} days, {a} loses {n} {x} a day.",
            "{m} children take {n} of {a}'s {x} each.",
        ),
        ("{a} puts {n} {x} on each of {m} plates and leaves them there.", "{m} times, {a} gives away {n} {x}."),
    ),
    "double": Forms(
        ("Then {a}'s {x} double in number.", "{a} then doubles the number of {x}.", "{a} finds as many {x} again."),
        ("A week later {a} has twice as many {x} as before.", "The number of {a}'s {x} becomes two times as large."),
    ),
    "more": Forms(
        (
            "{b} has {n} more {x} than {a}.",
            "{b} has {n} {x} more than {a}.",
            "{a} has {n} fewer {x} than {b}.",
            "Compared with {a}, {b} has {n} extra {x}.",
        ),
        ("{b}'s {x} outnumber {a}'s by {n}.", "{a} would need {n} more {x} to have as many as {b}."),
    ),
    "fewer": Forms(
        (
            "{b} has {n} fewer {x} than {a}.",
            "{b} has {n} {x} less than {a}.",
            "{a} has {n} more {x} than {b}.",
            "{b} needs {n} more {x} to have as many as {a}.",
        ),
        ("{a}'s {x} outnumber {b}'s by {n}.", "{b} is {n} {x} behind {a}."),
    ),
    "times": Forms(
        (
            "{b} has {n} times as many {x} as {a}.",
            "{b} owns {n} times as many {x} as {a}.",
            "For each of {a}'s {x}, {b} has {n}.",
            "{b}'s {x} are {n} times as many as {a}'s.",
        ),
        ("Multiply {a}'s {x} by {n}, and you have {b}'s.", "{b} has {n} {x} for every one that {a} has."),
    ),
    "part": Forms(
        (
            "{b} has {n} as many {x} as {a}.",
            "{b} owns only {n} as many {x} as {a}.",
            "{b}'s {x} are {n} as many as {a}'s.",
        ),
        ("The {x} of {b} are {n} the number of {a}'s.", "{b} has collected {n} of what {a} has."),
    ),
    "ask": Forms(
        (
            "How many {x} does {a} have?",
            "How many {x} does {a} have now?",
            "What is the number of {a}'s {x}?",
            "Find the number of {x} that {a} has in the end.",
        ),
        ("How many {x} are {a}'s?", "Count {a}'s {x} at the end."),
    ),
    "ask_together": Forms(
        (
            "How many {x} do {a} and {b} have together?",
            "How many {x} do {b} and {a} have in total?",
            "If {a} and {b} put their {x} together, how many are there?",
        ),
        ("{a} and {b} put their {x} on one shelf. How many lie on it?", "What is the sum of {a}'s and {b}'s {x}?"),
    ),
    "ask_difference": Forms(
        ("How many more {x} does {a} have than {b}?", "How many fewer {x} does {b} have than {a}?"),
        ("By how many {x} is {a} ahead of {b}?", "What is the difference between {a}'s and {b}'s {x}?"),
    ),
    "ask_price": Forms(
        (
            "{a} sells all the {x} for {n} dollars each. How many dollars does {a} get?",
            "Each of the {x} costs {n} dollars. How many dollars are {a}'s {x} worth?",
            "{a} earns {n} dollars for each of the {x}. How much does {a} earn?",
        ),
        ("At {n} dollars apiece, what do {a}'s {x} bring?", "A shop pays {a} {n} dollars for each. How much in all?"),
    ),
    "ask_boxes": Forms(
        (
            "{a} puts the {x} into boxes of {n}. How many boxes does {a} fill?",
            "{a} shares the {x} equally among {n} children. How many does each child get?",
            "How many bags of {n} {x} can {a} make?",
        ),
        ("A tray holds {n} {x}. How many trays does {a} fill?", "{a} lays the {x} in {n} rows. How long is a row?"),
    ),
    "distractor": Forms(
        (
            "{b} is {n} years old.",
            "{b} also has {n} {x}.",
            "It is {n} degrees outside.",
            "The walk to {b}'s house takes {n} minutes.",
            "{b} has {n} {x}.",
        ),
        ("The bus has {n} seats.", "{b} lives at number {n} of the street.", "{b} lent a neighbor {n} {x} last year."),
    ),
}  # fmt: skip
PARTS: Final[Mapping[int, str]] = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}

STEP_WORDS: Final[Mapping[str, str]] = {
    "add": "{a} then has {l} + {r} = {v} {x}.",
    "subtract": "{a} then has {l} - {r} = {v} {x}.",
    "packs": "These are {l} * {r} = {v} {x}.",
    "double": "{a} then has {l} * {r} = {v} {x}.",
    "more": "{b} has {l} + {r} = {v} {x}.",
    "fewer": "{b} has {l} - {r} = {v} {x}.",
    "times": "{b} has {l} * {r} = {v} {x}.",
    "part": "{b} has {l} / {r} = {v} {x}.",
    "ask_together": "Together they have {l} + {r} = {v} {x}.",
    "ask_difference": "The difference is {l} - {r} = {v} {x}.",
    "ask_price": "That is {l} * {r} = {v} dollars.",
    "ask_boxes": "That is {l} / {r} = {v}.",
}
"""How a step says its equation, ``{l}`` and ``{r}`` the operands and ``{v}`` the result."""

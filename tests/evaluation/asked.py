"""Questions that the tiny models can read, and outcomes made by hand."""

from typing import Any

from slr_core.evaluation.outcomes import Outcome
from slr_core.tasks.base import Card, Example, Task
from slr_core.tasks.sources import Questions, fingerprint
from tests import tiny


class Words(Task):
    """The first word counts; whether it is right is a matter of luck, so that a model that knows nothing gets some."""

    name = "words"
    card = Card(origin="made here", licence="none", splits={}, grading="luck")

    def extract(self, text: str) -> str | None:
        return text.split()[0] if text.split() else None

    def grade(self, example: Example, text: str) -> bool:
        return sum(map(ord, example.question + (self.extract(text) or ""))) % 2 == 0

    def baselines(self, example: Example) -> dict[str, float]:
        return {"luck": 0.5}


def examples(count: int = 10) -> tuple[Example, ...]:
    """Prompts of different lengths, all of them different."""
    texts = [tiny.words(i % 37, *tiny.ids(tiny.PROMPTS[i % len(tiny.PROMPTS)])[: 1 + i % 5]) for i in range(count)]
    return tuple(Example(text, ("step",) * (1 + i % 3), "w1") for i, text in enumerate(texts))


def questions(count: int = 10) -> Questions:
    """The same with their source."""
    made = examples(count)
    return Questions(made, "made here", fingerprint(made))


def outcome(key: str = "0:a", **changes: Any) -> Outcome:
    """An outcome, right unless told otherwise."""
    facts: dict[str, Any] = {
        "key": key,
        "difficulty": 2,
        "text": "w1 w2",
        "answer": "w1",
        "correct": True,
        "steps_hold": None,
        "iterations": 3,
        "exit_reason": "converged",
        "relative_change": (None, 0.5, 0.1),
        "contraction_rate": 0.25,
        "oscillating": False,
        "prompt_tokens": 5,
        "tokens": 2,
        "forward_passes": 5,
        "flops": 1e6,
        "added_parameters": 1200,
        "seconds": 0.01,
    }
    return Outcome(**{**facts, **changes})


def spec(method: str = "slr", **changes: Any) -> dict[str, Any]:
    """The spec of a run over two questions."""
    facts: dict[str, Any] = {
        "method": method,
        "settings": {"loop": {}, "samples": 5, "seed": 0},
        "model": {"name": "tiny", "sha256": "ab" * 32},
        "task": "words",
        "source": "made here",
        "questions": 2,
        "questions_sha256": "cd" * 32,
        "slr": "0",
    }
    return {**facts, **changes}

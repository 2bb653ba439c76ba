"""A batch in which every row wants something else."""

import pytest

from tests import tiny

MIXED = (
    {"max_iterations": 0},
    {"max_iterations": 3, "criterion": "fixed"},
    {"max_iterations": 12, "min_iterations": 2, "criterion": "relative_change", "threshold": 0.3},
    {"max_iterations": 9, "criterion": "argmax_stable", "patience": 2},
    {"max_iterations": 0, "min_iterations": 0},
    {"max_iterations": 10, "criterion": "kl", "threshold": 0.5},
    {"max_iterations": 8, "min_iterations": 4, "criterion": "cosine", "threshold": 0.9},
    {"max_iterations": 7, "criterion": "entropy_change", "threshold": 0.3},
)
MEASURES = ("relative_change", "cosine", "norm", "contraction", "kl", "entropy")


def mixed(made, **options):
    """Requests of the tiny prompts, each with a loop of its own."""
    return [
        tiny.request(made, prompt, loop, trace=True, **options)
        for prompt, loop in zip(tiny.PROMPTS, MIXED, strict=True)
    ]


def facts(result):
    """What rounding must not change."""
    return result.token_ids, result.iterations, result.exit_reason, result.finish_reason, result.forward_passes


def near(a, b):
    """Equal numbers, or both undefined."""
    return a is b is None or a == pytest.approx(b, rel=1e-4, abs=1e-5)

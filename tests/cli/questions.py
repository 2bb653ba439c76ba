"""What the commands are asked, and what the reference answers."""

from slr_core.generation.reference import generate
from tests import tiny

QUESTION = "Tom is a rompus. Every rompus is a lempus. Sam is a impus. Is Tom a impus or lempus?"
LOOP = ["--max-iterations", "3", "--criterion", "fixed"]


def expected(made, loop=None):
    loop = {"max_iterations": 3, "criterion": "fixed"} if loop is None else loop
    return generate(made, [tiny.request(made, QUESTION, loop)])[0]

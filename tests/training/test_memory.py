import subprocess
import sys

import pytest

MEASURED = """
import resource, torch
from slr_core.training.memory import keep_freed_memory
{}
def step():
    return [torch.ones(10, 1 << 20) for _ in range(4)]
for _ in range(10):  # the heap grows until every block fits into a gap
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(first):
    ran = subprocess.run([sys.executable, "-c", MEASURED.format(first)], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="GNU's C library")
def test_a_step_reuses_the_memory_of_the_one_before():
    assert page_faults("keep_freed_memory()") < page_faults("") / 4

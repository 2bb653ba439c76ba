"""``slr-serve`` whose engine can be blocked in a phase, or made to fail in it: for tests only.

``SLR_TEST_FREEZE`` names a folder. While it has a file ``freeze-<phase>``, the engine waits before its next pass of a
request in that phase, and creates a file ``reached-<phase>``. A file ``fail-<phase>`` makes that pass raise, once.
``freeze-tokenize`` does the same with the tokenization of prompts.
``die`` ends the engine's thread.
"""

import os
import time
from pathlib import Path
from typing import Any

from slr_core.engine.core import Core
from slr_core.engine.runner.model_runner import ModelRunner
from slr_server import cli, service

FOLDER = Path(os.environ.pop("SLR_TEST_FREEZE"))


def wait(phase: str) -> None:
    while (FOLDER / f"freeze-{phase}").exists():
        (FOLDER / f"reached-{phase}").touch()
        time.sleep(0.002)


def late(preprocess: Any) -> Any:
    def wrapped(*arguments: Any) -> Any:
        wait("tokenize")
        return preprocess(*arguments)

    return wrapped


def frozen(run: Any) -> Any:
    def wrapped(runner: ModelRunner, work: Any) -> Any:
        for phase in {row.phase.value for row, _ in work}:
            wait(phase)
            if (FOLDER / f"fail-{phase}").exists():
                (FOLDER / f"fail-{phase}").unlink()
                raise RuntimeError(f"secret fault in {phase}")
        return run(runner, work)

    return wrapped


def mortal(step: Any) -> Any:
    def wrapped(core: Core) -> None:
        if (FOLDER / "die").exists():
            raise MemoryError("beyond a step")
        step(core)

    return wrapped


if __name__ == "__main__":
    ModelRunner.forward = frozen(ModelRunner.forward)
    Core.step = mortal(Core.step)
    service.preprocess = late(service.preprocess)
    cli.main()

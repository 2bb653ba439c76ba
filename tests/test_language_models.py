"""``docs/language-models.md`` from the base to a server: its commands as they stand, but for fewer training steps."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slr_core.checkpoint.base_model import check_base_files
from tests.server.process import Server
from tests.test_quickstart import ADDRESS, ROOT, SLR

PAGE = (ROOT / "docs" / "language-models.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(folder, kind, block):
    """What a block prints."""
    command = [sys.executable, "-c", block] if kind == "python" else ["bash", "-euc", SLR + block]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def base_hash(folder: Path) -> str:
    check_base_files(folder / "base")
    return hashlib.sha256((folder / "base" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_walk(smollm2, tmp_path):
    pytest.importorskip("openai")
    (_, first), *requests = BLOCKS
    install, init, train, serve = first.strip().splitlines()
    assert install.startswith("pip install -c requirements.lock -e '.[")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    fresh = tmp_path / init.split()[-1]
    fresh.parent.mkdir(parents=True)
    fresh.symlink_to(smollm2)  # what `slr init smollm2` makes
    assert init.startswith("slr init smollm2 --out ")
    assert train.endswith(" --max-steps 20")
    few = train.replace("--max-steps 20", "--max-steps 2 --set held_out=8 --set optimizer.batch_size=4")
    run(tmp_path, "sh", few)
    trained = tmp_path / serve.split()[-1]
    assert base_hash(trained) == base_hash(fresh)
    server = Server(trained, tmp_path / "log")
    try:
        printed = [run(tmp_path, kind, block.replace(ADDRESS, server.url)) for kind, block in requests]
    finally:
        server.kill()
    assert '"iterations":' in printed[0]
    assert "CompletionUsage(" in printed[1]

"""Hub ids work like folders: tried against a mirror on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.checkpoint.importers import published
from tests.checkpoint.importers.mirror import mirror


def slr(url, home, *arguments):
    # In a process of its own: the hub's client reads these variables when it is imported.
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [Path(sys.executable).with_name("slr"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_hub_ids(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first, second = (
        published.coconut(tmp_path / "first"),
        published.codi(tmp_path / "second", shards=True, kind="llama"),
    )
    hub = tmp_path / "hub"
    hub.mkdir()
    first.checkpoint.rename(hub / first.checkpoint.name)
    (hub / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    models = {
        ("owner/coconut", "main"): hub,
        ("owner/base", "main"): first.base,
        ("owner/codi", "v2"): second.checkpoint,
        ("owner/llama", "v2"): second.base,
    }
    with mirror(models) as url:
        done = slr(
            url, tmp_path / "home", "import", "coconut", "owner/coconut", "--base", "owner/base", "--latents", 2,
            "--out", tmp_path / "out",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        card = (tmp_path / "out" / "README.md").read_text()
        assert "slr import coconut owner/coconut --out out --base owner/base --latents 2" in card
        assert "| licence of the checkpoint | mit |" in card

        flags = ["--latents", 2, "--lora-alpha", 3, "--out", tmp_path / "out2", "--base", "owner/llama"]
        missing = slr(url, tmp_path / "home", "import", "codi", "owner/codi", *flags)
        assert missing.returncode == 1
        assert "owner/codi: neither a local path nor a hub id that can be downloaded" in missing.stderr
        assert len(missing.stderr.splitlines()) == 1
        flags += ["--revision", "v2", "--base-revision", "v2"]
        done = slr(url, tmp_path / "home", "import", "codi", "owner/codi", *flags)
        assert done.returncode == 0, done.stderr
        assert "--revision v2 --base-revision v2" in (tmp_path / "out2" / "README.md").read_text()
        assert "model.embed_tokens.weight" in load_file(tmp_path / "out2" / "base" / "model.safetensors")
        flags[5] = tmp_path / "out3"
        again = slr(url, tmp_path / "home", "import", "codi", second.checkpoint, *flags)
        assert "a revision needs a hub id, and this is a local path" in again.stderr

"""``docs/quickstart.md`` as it stands, start to end: its commands, on a tiny base model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.server.process import Server

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "quickstart.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SLR = f'slr() {{ "{sys.executable}" -m slr_core.cli "$@"; }}\n'
ADDRESS = "http://127.0.0.1:8000"


def write_base(folder: Path) -> None:
    """A small model from random weights, with a tokenizer that has a token for every letter."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = ["Ada Bo Cy Dee Eli Fay Gus is the parent of. Who is the grandparent of?"] * 3
    special = ["<|end|>"]
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    torch.manual_seed(0)
    sizes = GPT2Config(
        vocab_size=len(wrapped), n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(sizes).save_pretrained(folder)
    wrapped.save_pretrained(folder)


class Walk:
    """Runs the page's blocks in a folder, in their order; the command that serves runs until the walk ends.

    Args:
        folder: a new folder, which gets a base model and the recipe.
        steps: number of training steps that replaces the recipe's; answers are then short, too.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.server, self.outputs = folder, None, []
        write_base(folder / "path" / "to" / "base")
        recipe = (ROOT / "configs" / "quickstart.yaml").read_text()
        # What has learned nothing does not stop by itself.
        recipe, found = re.subn(r"^text:$", "text:\n  max_new_tokens: 4", recipe, flags=re.MULTILINE)
        assert found == 1
        recipe, found = re.subn(r"- steps: \d+$", f"- steps: {steps}", recipe, flags=re.MULTILINE)
        assert found == 1
        (folder / "configs").mkdir()
        (folder / "configs" / "quickstart.yaml").write_text(recipe)

    def run(self) -> None:
        try:
            for kind, block in BLOCKS:
                if block.startswith("slr serve --model "):
                    self.server = Server(self.folder / block.split()[-1], self.folder / "log")
                else:
                    address = ADDRESS if self.server is None else self.server.url
                    self.outputs.append(self.run_block(kind, block.replace(ADDRESS, address)))
        finally:
            if self.server is not None:
                self.server.kill()

    def run_block(self, kind: str, block: str) -> str:
        """What the block prints. It runs as a user would run it."""
        command = [sys.executable, "-c", block] if kind == "python" else ["bash", "-euc", SLR + block]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=1800, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def check(self) -> dict[str, float]:
        """Check what the walk left and printed; the accuracies of the comparison."""

        def read(name: str) -> list[dict[str, Any]]:
            return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

        questions, held_out = read("questions.jsonl"), read("runs/mine/held_out_text.jsonl")
        assert (len(questions), len(held_out)) == (200, 40)
        assert all(line in questions for line in held_out)
        assert held_out == read("runs/control/held_out_text.jsonl")
        printed = "\n".join(self.outputs)
        for words in (
            *("untrained", "95 % interval", "p (paired with slr)", "exit criteria", "exit_reason"),
            *("chat.completion.chunk", "latency"),
        ):
            assert words in printed
        rows = re.findall(r"^(slr|no_thought) +([\d.]+) +[\d.]+ to [\d.]+", printed, re.MULTILINE)
        assert [name for name, _ in rows] == ["slr", "no_thought"]
        return {name: float(accuracy) for name, accuracy in rows}


def test_page_has_every_step():
    whole = "".join(block for _, block in BLOCKS)
    commands = re.findall(r"^(slr \w+|curl)", whole, re.MULTILINE)
    assert commands == [
        *("slr init", "slr train", "slr train", "slr eval", "slr compare", "slr stability", "slr serve", "curl"),
        *("curl", "slr load"),
    ]


def test_install_names_what_exists():
    (extras,) = re.findall(r"pip install -c requirements\.lock -e '\.\[([\w,]+)\]'", PAGE)
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in text for extra in extras.split(","))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_walk(tmp_path):
    """All commands of the page, each in a process of its own. The whole recipe takes too long here."""
    walk = Walk(tmp_path, steps=30)
    walk.run()
    walk.check()

"""``slr init``: add an untrained loop to a base model, or turn its layers into a loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slr_core._version import __version__
from slr_core.checkpoint.info import describe_model
from slr_core.checkpoint.pretrained import is_packaged, load_model_and_tokenizer, packaged_file
from slr_core.checkpoint.recursive import Start, share_layers
from slr_core.checkpoint.write import save_checkpoint
from slr_core.checkpoint.written_whole import check_new, written_whole
from slr_core.config import LoopConfig, SLRConfig, TextConfig
from slr_core.errors import ConfigError
from slr_core.model.looped import LoopedModel
from slr_core.validation import validated
from slr_core.yaml_text import parse_yaml

CARD = """---
library_name: slr
tags: [latent-reasoning, peft]
---

# {name}

The base model `{base}` with an untrained loop, made by `slr init` {version} with seed {seed}: {sizes}.
The loop is off until `slr train` trains it (`trained` in `slr_config.json`): answers are those of the base model. A
request that sets a loop parameter, such as `max_iterations`, runs the untrained loop, and its answer means nothing.
`slr info --model {name}` describes the checkpoint.
"""

RECURSIVE_CARD = """---
library_name: slr
tags: [latent-reasoning, recursive, peft]
---

# {name}

`{base}` as a recursive model, made by `slr init --recursive` {version}: its layers are shared in {loop.max_iterations}
loops (`{start}`), and an adapter of rank {loop.lora.rank} per loop stands for what sharing lost: {sizes}. {exact}
`slr info --model {name}` describes the checkpoint; docs/recursive.md has a recipe that trains it.
"""


class InitConfig(LoopConfig):
    """The file ``loop.yaml``: settings of the loop, and optionally of its texts."""

    text: TextConfig = Field(TextConfig(), description="prompt and answer texts, stop strings, default answer length")

    @classmethod
    def from_yaml(cls, path: Path) -> InitConfig:
        """Read a file. An empty file stands for the defaults.

        Raises:
            ConfigError: the file is not YAML, or a field is unknown or out of range.
        """
        try:
            data = parse_yaml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not a readable YAML file ({error})") from error
        try:
            return validated(cls, {} if data is None else data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def config(self) -> SLRConfig:
        """The config of a checkpoint with these settings and an untrained loop."""
        data = self.model_dump(mode="json")
        return SLRConfig.from_dict({"trained": False, "text": data.pop("text"), "loop": data})


@dataclass(frozen=True)
class Recursive:
    """How a model's layers become a loop.

    Attributes:
        loops: how often the shared layers run; it divides the number of layers.
        rank: rank of the loop adapters; ``None``: full, so that nothing is lost.
        start: where the shared weights start.
    """

    loops: int
    rank: int | None = None
    start: Start = "average"

    def config(self, settings: InitConfig, rank: int) -> SLRConfig:
        """The config of a checkpoint.

        Raises:
            ConfigError: a setting is given that the conversion decides.
        """
        decided = {
            "workspace": "token",
            **dict.fromkeys(("trained_iterations", "max_iterations"), self.loops),
            "feedback": "raw",
            "projection": {"kind": "identity"},
            "timestep": {"kind": "none"},
            "residual": {"source": "none"},
            "lora": {"rank": rank, "alpha": float(rank)},
        }
        if given := sorted(settings.model_fields_set & decided.keys()):
            raise ConfigError(f"{given[0]}: a recursive model decides it; remove it from the config")
        # At the original depth it answers as the original did: no early exit, and no guard that ends it.
        loop: dict[str, Any] = {
            "min_iterations": self.loops,
            "convergence": {"criterion": "fixed"},
            "guard": {"expanding_iterations": 64, "norm_factor": 1e6},
        }
        data = settings.model_dump(mode="json", exclude_unset=True)
        text = data.pop("text", {})
        return SLRConfig.from_dict({"text": text, "loop": loop | data | decided})


def init_checkpoint(
    base: str,
    out: str | Path,
    config: str | Path | None = None,
    *,
    recursive: Recursive | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> LoopedModel:
    """Write a checkpoint folder with a copy of ``base`` and an untrained loop, and return its reasoner.

    Args:
        base: a causal language model: a local folder, a hub id, a GGUF file (dequantized), or the name of one that a
            package brings, a key of :data:`~slr_core.checkpoint.pretrained.PACKAGED`.
        out: the folder to write; it must be new or empty.
        config: a ``loop.yaml``; ``None``: the defaults.
        recursive: make the loop of the base's own layers; it is then on from the start.
        seed: seed of the new weights.
        dtype: data type of the weights; ``None``: that of the base, fp32 for a GGUF file.

    Raises:
        ConfigError: a setting is wrong, the folder is not empty, or the loop does not support this base.
        CheckpointError: the base cannot be loaded.
    """
    out = Path(out)
    check_new(out)
    settings = InitConfig.from_yaml(Path(config)) if config is not None else InitConfig()
    model, tokenizer = load_model_and_tokenizer(base, dtype=dtype)
    torch.manual_seed(seed)
    if recursive is None:
        reasoner, exact = LoopedModel(model, tokenizer, settings.config()).eval(), ""
    else:
        reasoner, exact = _make_recursive(model, tokenizer, settings, recursive)
    card = (CARD if recursive is None else RECURSIVE_CARD).format(
        name=out.name,
        base=packaged_file(base).name if is_packaged(base) else Path(base).name,
        version=__version__,
        seed=seed,
        sizes=describe_model(reasoner).sizes,
        loop=reasoner.config.loop,
        start=recursive and recursive.start,
        exact=exact,
    )
    with written_whole(out) as written:
        save_checkpoint(reasoner, written)
        (written / "README.md").write_text(card, encoding="utf-8")
    return reasoner


def _make_recursive(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: InitConfig, recursive: Recursive
) -> tuple[LoopedModel, str]:
    """A recursive model in eval mode, and a sentence that says how near it is to the original."""
    shared = share_layers(model, recursive.loops, recursive.start)
    rank = shared.rank if recursive.rank is None else recursive.rank
    config = recursive.config(settings, rank)
    names = config.loop.adapters
    reasoner = LoopedModel(shared.model, tokenizer, config, shared.adapter_configs(names, rank)).eval()
    shared.start_adapters(names)
    if shared.inexact:
        named = ", ".join(f"`{name}`" for name in shared.inexact)
        return reasoner, f"The loops share {named}, in which the original layers differed."
    if rank >= shared.rank:
        return reasoner, "At this rank it computes what the original computed."
    return reasoner, "Below full rank it differs from the original until it is trained."

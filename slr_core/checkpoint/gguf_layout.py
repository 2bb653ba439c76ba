"""The GGUF file of a base model: what it says of the model, the names of its tensors, and a copy with other weights.

llama.cpp computes a model from a file's metadata and tensors alone. A checkpoint that was made of the same model takes
them from there, once they are known to describe it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from slr_core._install import missing_extra
from slr_core.checkpoint.validate import short
from slr_core.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

TensorType = Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
"""Number formats that the package `gguf` can write, of those that llama.cpp computes with."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF architecture by the model type of transformers."""
MAX_HALF = 65504.0
"""Largest value of half precision, in which F16 keeps the values, and the other 4 to 8 bit formats their scales."""

_QUERIES, _KEYS = (("attn_q.weight", "attn_q.bias"), ("attn_k.weight", "attn_k.bias"))


class BaseFile:
    """The GGUF file of a base model.

    Args:
        path: the file.

    Raises:
        ConfigError: the extra `gguf` is not installed, or the file cannot be read as GGUF.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise missing_extra("a GGUF file", "gguf", error) from error
        self.path = path
        try:
            self._reader: GGUFReader = GGUFReader(path)
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
            self.architecture = str(self.field("general.architecture"))
        except Exception as error:  # the reader raises most kinds
            raise ConfigError(f"--base: {path}: not a readable GGUF file ({short(error)})") from error

    def field(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        found = self._reader.get_field(key)
        return default if found is None else found.contents()

    @property
    def metadata_keys(self) -> list[str]:
        """Keys of the metadata."""
        return list(self._reader.fields)

    def refuse(self, what: str) -> ConfigError:
        """The error of a file that does not fit the checkpoint."""
        return ConfigError(f"--base: {self.path}: {what}")

    def check_config(self, config: PreTrainedConfig) -> None:
        """Check that the metadata describes what a base model computes, where the shapes of weights do not say it.

        Raises:
            ConfigError: a value differs, or the architecture is not supported.
        """
        wanted = ARCHITECTURES.get(config.model_type)
        if wanted is None:
            raise ConfigError(
                f"a GGUF file can be written of {', '.join(sorted(ARCHITECTURES))}, not of this {config.model_type}"
            )
        if self.architecture != wanted:
            raise self.refuse(f"its architecture is {self.architecture}, that of the checkpoint's base {wanted}")
        settings: Any = config
        rope = getattr(config, "rope_parameters", None) or {}
        scaled = self.field(f"{wanted}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in self._tensors
        if scaled or rope.get("rope_type", "default") != "default":
            raise self.refuse("scaled rotary positions (rope scaling) are not supported")
        if settings.hidden_act != "silu":
            raise self.refuse(f"{wanted} computes hidden_act silu, the checkpoint's base {settings.hidden_act}")
        heads, width = settings.num_attention_heads, settings.hidden_size
        head = getattr(settings, "head_dim", None) or width // heads
        for key, own, default in (
            ("block_count", settings.num_hidden_layers, None),
            ("attention.head_count", heads, None),
            ("attention.head_count_kv", settings.num_key_value_heads, heads),
            ("attention.key_length", head, width // heads),
            ("attention.value_length", head, width // heads),
            ("attention.scale", head**-0.5, head**-0.5),
            ("attention.causal", True, True),
            ("rope.dimension_count", head, head),
            ("expert_count", 0, 0),
            ("attention.layer_norm_rms_epsilon", settings.rms_norm_eps, None),
            ("rope.freq_base", rope.get("rope_theta", 10000.0), 10000.0),
        ):
            found = self.field(f"{wanted}.{key}", default)
            if not isinstance(found, int | float) or not math.isclose(found, own, rel_tol=1e-6):
                raise self.refuse(f"its {wanted}.{key} is {found}, that of the checkpoint's base {own}")

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the file's tokens are those of a tokenizer.

        Raises:
            ConfigError: one differs.
        """
        tokens = self.field("tokenizer.ggml.tokens", [])
        for token, index in tokenizer.get_vocab().items():
            own = tokens[index] if index < len(tokens) else None
            if own != token:
                raise self.refuse(f"its token {index} is {own!r}, that of the checkpoint {token!r}")

    def names(self, keys: list[str], tied: bool) -> dict[str, str]:
        """Keys of a base model's state dict, by the names of the file's tensors and in their order.

        Args:
            keys: all keys.
            tied: whether the LM head is the embedding table, which the file may then hold once.

        Raises:
            ConfigError: the file has no tensor for a key, or a tensor without a key.
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        (architecture,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        known = get_tensor_name_map(architecture, int(self.field(f"{self.architecture}.block_count")))
        named: dict[str, str] = {}
        for key in keys:
            stem, _, kind = key.rpartition(".")
            name = known.get_name(stem)
            if name is None:
                raise ConfigError(f"{key} cannot be expressed: {self.architecture} has no such tensor")
            named[f"{name}.{kind}"] = key
        if tied and "output.weight" not in self._tensors:
            named.pop("output.weight", None)
        for name, key in named.items():
            if name not in self._tensors:
                raise self.refuse(f"it has no tensor {name} for {key} of the checkpoint")
        for name in self._tensors:
            if name not in named:
                raise self.refuse(f"its tensor {name} is not in the checkpoint's base")
        return {name: named[name] for name in self._tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, in torch's order."""
        return tuple(reversed(self._tensors[name].shape.tolist()))

    def arranged(self, name: str, values: Tensor) -> Tensor:
        """The values of a tensor of transformers in the order of the file's rows.

        Llama's files have the two halves of each rotary pair of queries and keys side by side.
        """
        queries, keys = name.endswith(_QUERIES), name.endswith(_KEYS)
        if self.architecture != "llama" or not (queries or keys):
            return values
        heads = self.field("llama.attention.head_count")
        if keys:
            heads = self.field("llama.attention.head_count_kv", heads)
        return values.reshape(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)

    def types(self, chosen: TensorType) -> dict[str, GGMLQuantizationType]:
        """Number formats to write the tensors in: matrices in ``chosen``, vectors in fp32, as llama.cpp needs them.

        Raises:
            ConfigError: the blocks of the format do not divide the rows of a matrix.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        types = {}
        for name, tensor in self._tensors.items():
            kind = GGMLQuantizationType.F32 if len(tensor.shape) < 2 else GGMLQuantizationType[chosen]
            row, block = int(tensor.shape[0]), GGML_QUANT_SIZES[kind][0]
            if row % block:
                raise ConfigError(
                    f"--gguf-type: {kind.name} has blocks of {block} values, which do not divide the {row} of a row "
                    f"of {name}: choose F32, F16 or BF16"
                )
            types[name] = kind
        return types

    def write(
        self,
        out: Path,
        types: Mapping[str, GGMLQuantizationType],
        changes: Mapping[str, bool | int | str | None],
        weight: Callable[[str], Tensor],
    ) -> dict[str, float]:
        """Write a file with this one's metadata and other weights.

        Args:
            out: the file to write.
            types: the format of each tensor, in the order to write them in.
            changes: values of the metadata to set, and keys to leave out, whose value is ``None``.
            weight: the values of a tensor in fp32, by its name. It is called once for each, to hold one in memory.

        Returns:
            The sum of the squares of what rounding changed, by tensor.

        Raises:
            ConfigError: a value is too large for its format.
            OSError: the file cannot be written.
        """
        from gguf import GGML_QUANT_SIZES, GGUFValueType, GGUFWriter
        from gguf.quants import dequantize, quantize

        rounding = {}
        value_types = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}
        with closing(GGUFWriter(out, self.architecture)) as writer:
            writer.data_alignment = int(self._reader.alignment)
            for key, field in self._reader.fields.items():
                # The writer counts tensors and keys itself, and cannot write an empty array.
                if key.startswith("GGUF.") or key == "general.architecture" or key in changes or not field.data:
                    continue
                element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), field.types[0], element)
            for key, value in changes.items():
                if value is not None:
                    writer.add_key_value(key, value, value_types[type(value)])
            for name, kind in types.items():
                shape, (block, size) = self.shape(name), GGML_QUANT_SIZES[kind]
                bytes_ = math.prod(shape) // block * size
                writer.add_tensor_info(name, shape, np.dtype(np.float32), bytes_, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, kind in types.items():
                values = weight(name)
                largest = float(values.abs().max())
                if kind.name not in ("F32", "BF16") and largest > MAX_HALF:
                    raise ConfigError(
                        f"--gguf-type: {name} holds values up to {largest:.3g}, too large for {kind.name}: choose F32 "
                        "or BF16"
                    )
                written = quantize(values.contiguous().numpy(), kind)
                writer.write_tensor_data(written)
                rounding[name] = float(np.square(dequantize(written, kind) - values.numpy()).sum())
        return rounding

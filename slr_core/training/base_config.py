"""The section ``base`` of a recipe."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from slr_core.training.stages import RecipeModel


class BaseConfig(RecipeModel):
    """The base model: an existing one, whole or pruned, or a Llama or GPT-2 model from random weights."""

    source: str | None = Field(
        None,
        alias="from",
        description="a folder or hub id of a causal language model, or a latent reasoner's checkpoint",
    )
    keep_adapters: bool = Field(
        False,
        description="with `loop`: start from the adapters of the latent reasoner in `from`; loop.lora must be its own",
    )
    tokenizer: str = Field(
        "prosqa",
        description="for a model from random weights: prosqa, prontoqa (few tokens per fact), words (one token per "
        "word of the training data), or a folder or hub id",
    )
    model_type: Literal["llama", "gpt2"] = Field(
        "llama", description="architecture of a model from random weights, by its name in transformers"
    )
    hidden_size: int = Field(128, ge=8)
    intermediate_size: int = Field(
        384, ge=8, description="with `from`: inner units of each MLP to keep of that base, with layers like Llama's"
    )
    num_hidden_layers: int = Field(2, ge=1)
    num_attention_heads: int = Field(
        4, ge=1, description="with `from`: attention heads of each layer to keep of that base"
    )
    max_position_embeddings: int = Field(256, ge=16)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        pruned = {"num_attention_heads", "intermediate_size"}
        if self.keep_adapters and (self.source is None or self.is_pruned):
            raise ValueError("base.keep_adapters needs base.from, a latent reasoner that is not pruned")
        if self.source is not None and (extra := sorted(self.model_fields_set - {"source", "keep_adapters"} - pruned)):
            raise ValueError(f"base.from sets tokenizer and sizes: remove {', '.join(extra)}")
        if self.source is not None and self.model_fields_set & pruned not in (set(), pruned):
            raise ValueError("with base.from, give both num_attention_heads and intermediate_size, or neither")
        if self.source is None and self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError("hidden_size must be a multiple of 2 * num_attention_heads")
        return self

    @model_serializer(mode="wrap")
    def _without_unused_sizes(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the defaults that ``from`` replaces: a written recipe can be read again."""
        fields: dict[str, Any] = dump(self)
        if self.source is None:
            return fields
        names = {info.alias or name: name for name, info in type(self).model_fields.items()}
        return {key: value for key, value in fields.items() if names.get(key, key) in self.model_fields_set}

    @property
    def is_pruned(self) -> bool:
        """Whether only some of the heads and units of the base in ``source`` are kept."""
        return self.source is not None and "num_attention_heads" in self.model_fields_set

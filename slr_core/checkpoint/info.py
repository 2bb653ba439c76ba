"""What a model is made of: its sizes, what the loop adds to them, and the cache memory of a request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from slr_core.checkpoint.write import modules_state
from slr_core.model.looped import LoopedModel


@dataclass(frozen=True)
class ModelDescription:
    """What a model is made of.

    Attributes:
        architecture: class of the base model.
        base_parameters: its parameters.
        adapter_parameters: those of all loop adapters.
        module_parameters: those of the loop's own modules.
        max_positions: positions that the base can address: prompt, loop and answer together.
        vocabulary: tokens of the tokenizer.
        cache_bytes_per_position: keys and values of one position, all layers.
        loop_positions: positions that a loop of the default length adds to a request's cache.
        cache_copies: key/value caches that a request of the default length has.
        untrained: whether the loop is off by default because it has not been trained, as after ``slr init``.
    """

    architecture: str
    base_parameters: int
    adapter_parameters: int
    module_parameters: int
    max_positions: int
    vocabulary: int
    cache_bytes_per_position: int
    loop_positions: int
    cache_copies: int
    untrained: bool

    @property
    def added_parameters(self) -> int:
        """What the loop adds to the base."""
        return self.adapter_parameters + self.module_parameters

    @property
    def added_share(self) -> float:
        """The same as a share of the base."""
        return self.added_parameters / self.base_parameters

    @property
    def sizes(self) -> str:
        """One line: parameters, and what the loop adds."""
        return f"{self.base_parameters:,} parameters, the loop adds {self.added_parameters:,} ({self.added_share:.1%})"

    def cache_bytes(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """What a request reserves: prompt, default loop and answer."""
        positions = self.cache_copies * (prompt_tokens + self.loop_positions + max_new_tokens)
        return positions * self.cache_bytes_per_position


def describe_model(reasoner: LoopedModel) -> ModelDescription:
    """Sizes of a model's parts, the share that the loop adds to the base, and its cache memory."""
    adapters = {key: p for key, p in reasoner.base.named_parameters() if ".lora_" in key}
    return ModelDescription(
        architecture=type(reasoner.base).__name__,
        base_parameters=sum(p.numel() for key, p in reasoner.base.named_parameters() if ".lora_" not in key),
        adapter_parameters=sum(p.numel() for p in adapters.values()) + reasoner.idle_parameters,
        module_parameters=sum(x.numel() for x in modules_state(reasoner).values()),
        max_positions=reasoner.max_positions,
        vocabulary=len(reasoner.tokenizer),
        cache_bytes_per_position=_cache_bytes(reasoner),
        loop_positions=reasoner.workspace.loop_positions(reasoner.config.default_iterations),
        cache_copies=reasoner.workspace.cache_copies(reasoner.config.default_iterations),
        untrained=not reasoner.config.trained,
    )


@torch.inference_mode()
def _cache_bytes(reasoner: LoopedModel) -> int:
    # Measured rather than derived: architectures disagree on what their configs call heads and widths.
    cache = DynamicCache()
    token = torch.zeros(1, 1, dtype=torch.long, device=reasoner.device)
    mask = torch.ones_like(token)
    reasoner.base.base_model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
    return sum(
        x.nbytes
        for layer in cache.layers
        if isinstance(layer, DynamicLayer)
        for x in (layer.keys, layer.values)
        if x is not None
    )

"""A base model with its loop adapters: embeddings, LM head, and single forward passes over a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slr_core.config import SLRConfig
from slr_core.errors import ConfigError
from slr_core.loop.context import Context
from slr_core.loop.lora import DECODE, LoopAdapters, attach, new_adapter_configs, trained_index
from slr_core.model.base_support import (
    attention_mask,
    check_supported,
    end_tokens,
    find_final_norm,
    find_position_embeddings,
    keep_input,
    max_positions,
)
from slr_core.panics import panics_as_errors

_EMBEDDED_AT_ONCE = 8192
"""Tokens that are embedded at once to measure their embeddings."""


class AdaptedModel(nn.Module):
    """A base model with its loop adapters, of which at most one is active.

    Args: see :class:`slr_core.model.looped.LoopedModel`.

    Attributes:
        idle_parameters: number of parameters of adapters that add nothing and were left out when it was loaded.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SLRConfig,
        adapters: Mapping[str, LoraConfig] | None,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.base = config, tokenizer, base
        check_supported(base)
        tokenizer.clean_up_tokenization_spaces = False
        self.adapter_configs = dict(new_adapter_configs(config.loop) if adapters is None else adapters)
        attach(base, self.adapter_configs)
        covers_all = config.loop.lora.covers == "all"
        if covers_all and DECODE in self.adapter_configs:
            raise ConfigError(f"an adapter `{DECODE}` has no place beside one that covers all passes")
        if config.loop.workspace == "token" and DECODE in self.adapter_configs:
            raise ConfigError(f"an adapter `{DECODE}` is not supported by workspace `token`")
        self.adapters = LoopAdapters(base, config.loop.adapters[0] if covers_all else None)
        self.check_token_ids(config)
        self.final_norm = find_final_norm(base) if config.loop.feedback == "raw" else None
        self.position_embeddings = find_position_embeddings(base) if config.loop.feeds_positions else None
        self.idle_parameters = 0
        self._token_texts: dict[int, str] = {}
        self._embedding_rms: tuple[object, Tensor] | None = None

    def check_token_ids(self, config: SLRConfig) -> None:
        """Check that a config names tokens of this model.

        Raises:
            ConfigError: a token id is at least :attr:`vocab_size`.
        """
        end_token = config.loop.convergence.end_token_id
        for field, tokens in (
            ("text.suppressed_token_ids", config.text.suppressed_token_ids),
            ("loop.convergence.end_token_id", () if end_token is None else (end_token,)),
        ):
            if any(token >= self.vocab_size for token in tokens):
                raise ConfigError(
                    f"{field} must be below {self.vocab_size}, the number of embeddings, got {max(tokens)}"
                )

    @property
    def device(self) -> torch.device:
        """The device of the base model."""
        return self.base.device

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer: those of the tokenizer, of the base's generation config and of the config."""
        return end_tokens(self.base, self.tokenizer) | frozenset(self.config.text.stop_token_ids)

    @property
    def max_positions(self) -> int:
        """Positions that the base model can address, or its sliding window: prompt, loop and answer together."""
        return max_positions(self.base.config)

    @property
    def vocab_size(self) -> int:
        """Number of token embeddings; valid token ids are below it."""
        return len(self._embedding_table)

    @property
    def _embedding_table(self) -> Tensor:
        table = self.base.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        return table

    def adapter_name(self, t: int) -> str | None:
        """The adapter of iteration ``t``; ``None`` for t = 0 and if the loop has no adapters."""
        names = self.config.loop.adapters
        if t == 0 or not names:
            return None
        index = self._trained_index(t)
        return names[0] if self.config.loop.lora.kind == "shared" else names[index - 1]

    def _trained_index(self, t: int) -> int:
        loop = self.config.loop
        return trained_index(t, loop.trained_iterations, loop.lora.past_end)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings ``[B, q, d]`` of ids ``[B, q]``."""
        embedded: Tensor = self.base.get_input_embeddings()(input_ids)
        return embedded

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of states ``[..., d]``, by the LM head."""
        head: nn.Module = self.base.get_output_embeddings()  # type: ignore[no-untyped-call]
        logits: Tensor = head(self.normed(hidden))
        return logits

    def normed(self, hidden: Tensor) -> Tensor:
        """What the LM head reads of states ``[..., d]``: the states, or the final norm of them under feedback `raw`."""
        if self.final_norm is None:
            return hidden
        normed: Tensor = self.final_norm(hidden)
        return normed

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities ``[..., V]`` fp32 of the next token, read by the LM head at states ``[..., d]``."""
        return self.head(hidden).float().log_softmax(-1)

    def expected_embedding(self, scores: Tensor, count: int) -> Tensor:
        """The mean embedding ``[..., d]`` of the ``count`` most likely next tokens, by logits or log-probabilities.

        They are given as ``[..., V]`` fp32. The weights are the tokens' probabilities, divided by their sum. Soft
        Thinking (Zhang et al., 2025, arXiv 2505.15778). Where a model is sure of its tokens, a loop over a block is
        Jacobi decoding (Santilli et al., 2023, arXiv 2305.10427): its fixed point is what the model would write.
        """
        top = scores.topk(min(count, self.vocab_size))
        embedded = self.embed(top.indices)
        return (top.values.softmax(-1).to(embedded.dtype)[..., None] * embedded).sum(-2)

    def top_tokens(self, log_probs: Tensor, count: int) -> list[tuple[tuple[str, float], ...]] | None:
        """The most likely tokens and their probabilities, per row of ``[B, V]``; ``None`` for a count of 0."""
        if count == 0:
            return None
        top = log_probs.exp().nan_to_num().topk(min(count, log_probs.shape[-1]))
        return [
            tuple((self._token_text(token), prob) for token, prob in zip(tokens, probs, strict=True))
            for tokens, probs in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _token_text(self, token: int) -> str:
        # Cached: decoding one token takes longer than an iteration of a small model.
        if token not in self._token_texts:
            with panics_as_errors():
                self._token_texts[token] = str(self.tokenizer.decode([token]))
        return self._token_texts[token]

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, as every module does."""
        if self._embedding_table.requires_grad:
            self._embedding_rms = None  # a fused optimizer changes weights without a new version of the tensor
        return super().train(mode)

    def embedding_rms(self) -> Tensor:
        """Root mean square of the token embeddings that the base model is fed, a scalar in fp32 or fp64.

        Computed again when the embedding table has changed, and at every call while it is trained.
        """
        table = self._embedding_table
        if table.requires_grad and self.training:
            return _embedding_rms(self.base.get_input_embeddings(), table)
        key = table.data_ptr(), table.dtype, 0 if table.is_inference() else table._version
        if self._embedding_rms is None or self._embedding_rms[0] != key:
            # A cached inference tensor could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._embedding_rms = key, _embedding_rms(self.base.get_input_embeddings(), table)
        return self._embedding_rms[1]

    def forward_chunk(
        self,
        context: Context,
        embeds: Tensor,
        present: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        fed_back: bool = False,
    ) -> Tensor:
        """One forward pass of the base model with the active adapter: states ``[B, q, d]``, see ``loop.feedback``.

        Args:
            context: gains ``q`` cache positions.
            embeds: inputs ``[B, q, d]``.
            present: ``[B, q]`` bool; absent inputs are invisible to all others and have no position id.
            mask: attention mask ``[B, q, S + q]`` bool; ``None``: causal.
            positions: position ids ``[B, q]``; ``None``: the next ones in order.
            fed_back: whether the inputs come from states. Under feedback `raw`, those hold what the base's learned
                position embeddings added at the first iteration, and get them no second time.
        """
        queries = embeds.shape[1]
        counted = present.long().cumsum(-1)
        if mask is None:
            causal = torch.ones(queries, queries, dtype=torch.bool, device=embeds.device).tril() & present[:, None, :]
            # An absent input attends to itself, so that no row of the mask is empty.
            causal = causal | torch.eye(queries, dtype=torch.bool, device=embeds.device)
            mask = torch.cat([context.visible[:, None, :].expand(-1, queries, -1), causal], dim=-1)
        if positions is None:
            positions = (context.next_position[:, None] + counted - 1).clamp_min(0)
        if fed_back and self.position_embeddings is not None:
            embeds = embeds - self.position_embeddings(positions)
        with keep_input(self.final_norm) as before_norm:
            output = self.base.base_model(
                inputs_embeds=embeds,
                attention_mask=attention_mask(self.base, mask, embeds.dtype),
                position_ids=positions,
                past_key_values=context.cache,
                use_cache=True,
                output_hidden_states=context.passes is not None,
            )
        if context.passes is not None:
            context.passes.append(output.hidden_states)
        context.visible = torch.cat([context.visible, present], dim=1)
        context.next_position = context.next_position + counted[:, -1]
        hidden: Tensor = before_norm[0] if before_norm else output.last_hidden_state
        return hidden


def _embedding_rms(embedding: nn.Module, table: Tensor) -> Tensor:
    """RMS of the embeddings of all tokens; they are the rows of the table, or scaled ones (Gemma)."""
    if type(embedding) is nn.Embedding:
        return _mean_square(table).sqrt()
    ids = torch.arange(len(table), device=table.device)
    sums = [_mean_square(embedding(some)) * len(some) for some in torch.split(ids, _EMBEDDED_AT_ONCE)]
    return (torch.stack(sums).sum() / len(table)).sqrt()


def _mean_square(x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.pow(2).mean()

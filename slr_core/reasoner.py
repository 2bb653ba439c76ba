"""The model with the methods that users of ``transformers`` expect: load, save, generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from slr_core.checkpoint.read import load_checkpoint
from slr_core.checkpoint.write import save_checkpoint
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.model.looped import LoopedModel
from slr_core.params import LoopParams, SamplingParams
from slr_core.types import Result, Tokens


class LatentReasoner(LoopedModel):
    """A looped model that loads, saves and generates as models of ``transformers`` do.

    Arguments and errors are those of :class:`~slr_core.model.looped.LoopedModel`.
    """

    @classmethod
    def from_pretrained(cls, path_or_id: str | None = None, **options: Any) -> Self:
        """Load a checkpoint: a folder, a hub id or a bundled name; ``None``: the bundled ``prosqa``.

        Options as in :func:`slr_core.checkpoint.read.load_checkpoint`.
        """
        return load_checkpoint(cls, path_or_id, **options)

    def save_pretrained(self, folder: str) -> None:
        """Write a checkpoint folder; see :mod:`slr_core.checkpoint.read` for its layout."""
        save_checkpoint(self, folder)

    def generate(
        self,
        input_ids: str | Sequence[str] | Tensor,
        attention_mask: Tensor | None = None,
        sampling_params: SamplingParams | None = None,
        loop_params: LoopParams | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> list[Result]:
        """Answer prompts in one batch, each after its own loop; call it in eval mode.

        :meth:`slr_core.engine.Engine.generate` gives the same answers and is faster.

        Args:
            input_ids: one or more texts, which get the checkpoint's prompt prefix and suffix, or token ids
                ``[B, L]`` long, which are used as they are.
            attention_mask: ``[B, L]``, non-zero at real tokens; only with token ids. ``None``: all are real.
            sampling_params: ``None``: greedy.
            loop_params: fields that are unset take the checkpoint's defaults.
            max_new_tokens: ``None``: the checkpoint's default.
            options: others of :func:`slr_core.generation.prepare.prepare`, such as ``stop`` and ``trace``.

        Raises:
            RequestError: a prompt or a setting cannot be run.
        """
        prompts: Sequence[str | Tokens]
        if isinstance(input_ids, Tensor):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            prompts = [Tokens(tuple(ids[real.bool()].tolist())) for ids, real in zip(input_ids, mask, strict=True)]
        else:
            prompts = [input_ids] if isinstance(input_ids, str) else input_ids
        options |= {"max_new_tokens": max_new_tokens, "sampling": sampling_params}
        return generate(self, [prepare(self, prompt, loop_params, **options) for prompt in prompts])

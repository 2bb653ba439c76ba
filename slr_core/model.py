"""The reference: one plain latent loop over any causal language model of ``transformers``.

    u_t = combine(project(h_{t-1}), e_t)
    g_t = f_{theta + L_t}(u_t ; context)
    h_t = residual(g_t, h_{t-1}, h_0)

``h`` is the model's last hidden state after its final norm. In the ``append`` workspace h_0 is the state
at the last prompt position, and iteration t adds one position with input u_t (continuous thoughts: Hao
et al., 2024, arXiv 2412.06769). Everything here is differentiable; training and evaluation stand on it,
and the engine is held to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from slr_core.config import SLRConfig
from slr_core.context import Context
from slr_core.diagnostics import IterationRecord, RowLog, Stability, stability
from slr_core.errors import ConfigError, RequestError
from slr_core.loop.convergence import Distances, ExitReason, ExitRule, LoopSettings, measure
from slr_core.loop.lora import DECODE, LoopAdapters, attach, fresh, trained_index
from slr_core.loop.projection import Projection
from slr_core.loop.residual import Residual
from slr_core.loop.timestep import Timestep


@dataclass
class LoopOutput:
    """A finished loop, row by row.

    Attributes:
        context: ready to write the answer: exited rows see their own thoughts alone.
        states: h_0 ... h_t of each row, ``[t + 1, d]`` each, t the iterations that the row ran.
        iterations: iterations run.
        kept: iterations whose thoughts stay visible; below ``iterations`` only after a divergence.
        exit_reasons: why each row stopped.
        records: one per iteration and row.
        stability: summary per row.
        durations_s: seconds from the loop's start to the row's exit.
    """

    context: Context
    states: list[Tensor]
    iterations: list[int]
    kept: list[int]
    exit_reasons: list[ExitReason]
    records: list[list[IterationRecord]]
    stability: list[Stability]
    durations_s: list[float]


class LatentReasoner(nn.Module):
    """A base model, its loop adapters and the loop's own small modules.

    Args:
        base: a decoder-only model of ``transformers`` with full attention in every layer and a plain linear
            head; it is changed in place (adapters are attached).
        tokenizer: its tokenizer.
        config: the loop.
        adapters: PEFT configs of the adapters by name; by default fresh ones as ``config`` describes them.
            Either way they start as no-ops, and :meth:`from_pretrained` loads trained weights.

    Raises:
        ConfigError: the base model or an adapter is of a kind that this loop would not run faithfully.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SLRConfig,
        adapters: Mapping[str, LoraConfig] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.base = config, tokenizer, base
        loop = config.loop
        _refuse_unfaithful(base)
        hidden_size = int(base.get_input_embeddings().weight.shape[1])  # type: ignore[index]
        self.adapter_configs = dict(fresh(loop) if adapters is None else adapters)
        attach(base, self.adapter_configs)
        self.adapters = LoopAdapters(base)
        self.project = Projection(loop.projection, hidden_size).to(base.dtype)
        self.timestep = Timestep(loop.timestep, hidden_size, loop.trained_iterations).to(base.dtype)
        self.residual = Residual(loop.residual, hidden_size).to(base.dtype)

    @classmethod
    def from_pretrained(cls, path_or_id: str | None = None, **options: Any) -> Self:
        """Load a checkpoint folder or hub id; without one, the bundled ``prosqa``. See :mod:`slr_core.checkpoint`."""
        from slr_core.checkpoint import load

        return load(cls, path_or_id, **options)

    def save_pretrained(self, folder: str) -> None:
        """Write a checkpoint folder. See :mod:`slr_core.checkpoint`."""
        from slr_core.checkpoint import save

        save(self, folder)

    @property
    def device(self) -> torch.device:
        """Where the base model lies."""
        return self.base.device

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's end token and those that the base generates with."""
        configured = self.base.generation_config.eos_token_id if self.base.generation_config else None
        listed = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (self.tokenizer.eos_token_id, *listed) if isinstance(i, int))

    @property
    def max_positions(self) -> int:
        """Positions that the base model can address: prompt, thoughts and answer together."""
        return int(getattr(self.base.config, "max_position_embeddings", 2**31))

    def adapter_name(self, t: int) -> str | None:
        """The adapter of iteration ``t``: ``None`` for t = 0 and where the loop has none."""
        names = self.config.loop.adapters
        if t == 0 or not names:
            return None
        index = self._trained(t)
        return names[0] if self.config.loop.lora.kind == "shared" else names[index - 1]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings ``[B, q, d]`` of ids ``[B, q]``."""
        embedded: Tensor = self.base.get_input_embeddings()(input_ids)
        return embedded

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of states ``[..., d]``: the LM head, the linear projection of the method."""
        head: nn.Module = self.base.get_output_embeddings()  # type: ignore[no-untyped-call]
        logits: Tensor = head(hidden)
        return logits

    def embedding_rms(self) -> Tensor:
        """Root mean square of the embedding table, a scalar; kept while in eval mode."""
        table = self.base.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        if self.training:
            return _rms(table)
        if self._embedding_rms is None:
            # An inference tensor kept here could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._embedding_rms = _rms(table)
        return self._embedding_rms

    _embedding_rms: Tensor | None = None

    def train(self, mode: bool = True) -> Self:
        """As in torch; forgets what is only kept in eval mode."""
        self._embedding_rms = None
        return super().train(mode)

    # -- the formulas -------------------------------------------------------------------------------

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Context:
        """Run the prompts through the plain base model; the result holds h_0.

        Args:
            input_ids: ``[B, L]`` long, padded on either side.
            attention_mask: ``[B, L]``, non-zero at real tokens; at least one per row.
        """
        rows, device = input_ids.shape[0], input_ids.device
        start = torch.zeros(rows, dtype=torch.long, device=device)
        empty = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        embeds = self.embed(input_ids)
        context = Context(DynamicCache(), empty, start, embeds[:, 0])
        present = attention_mask.bool()
        hidden = self.advance(context, embeds, present)
        last = (present * torch.arange(1, present.shape[1] + 1, device=device)).argmax(-1)
        context.hidden = hidden[torch.arange(rows, device=device), last]
        return context

    def iterate(self, context: Context, t: int, initial: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One iteration: ``(g_t, h_t)``, each ``[B, d]``.

        Args:
            context: holds h_{t-1}; gains one column and h_t.
            t: the iteration, from 1.
            initial: h_0 ``[B, d]``.
            active: ``[B]`` bool; the others' column stays invisible and their state as it is. ``None``: all.
        """
        active = torch.ones_like(context.next_position, dtype=torch.bool) if active is None else active
        g, h = self.update(
            context.hidden, initial, t, lambda u: self.advance(context, u[:, None], active[:, None])[:, 0]
        )
        context.hidden = torch.where(active[:, None], h, context.hidden)
        return g, context.hidden

    def update(self, hidden: Tensor, initial: Tensor, t: int, run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The three formulas: ``(g_t, h_t)`` from h_{t-1} and h_0, each ``[..., d]``; ``run`` is the forward pass."""
        u = self.timestep(self.project(hidden, self.embedding_rms()), self._trained(t))
        with self.adapters.use(self.adapter_name(t)):
            g = run(u)
        return g, self.residual(g, hidden, initial)

    def _trained(self, t: int) -> int:
        loop = self.config.loop
        return trained_index(t, loop.trained_iterations, loop.lora.past_end)

    def unroll(self, context: Context, iterations: int) -> Tensor:
        """Run every row for the same number of iterations: states ``[B, iterations + 1, d]``, h_0 first."""
        states = [context.hidden]
        for t in range(1, iterations + 1):
            states.append(self.iterate(context, t, states[0])[1])
        return torch.stack(states, dim=1)

    def rewind(self, context: Context, states: Tensor, kept: Tensor) -> None:
        """Drop all but the first ``kept`` ``[B]`` thoughts of each row, as if its loop had ended there.

        ``states`` ``[B, T + 1, d]`` are those of the loop that just ran, the last columns of the context.
        """
        iterations = states.shape[1] - 1
        dropped = torch.arange(1, iterations + 1, device=kept.device) > kept[:, None]
        start = context.visible.shape[1] - iterations
        ran = context.visible[:, start:]
        context.next_position = context.next_position - (ran & dropped).sum(-1)
        context.visible = torch.cat([context.visible[:, :start], ran & ~dropped], dim=1)
        context.hidden = states[torch.arange(len(kept), device=kept.device), kept]

    def advance(
        self,
        context: Context,
        embeds: Tensor,
        present: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """One forward pass of the base model with whatever adapter is active: states ``[B, q, d]``.

        Args:
            context: gains ``q`` columns.
            embeds: inputs ``[B, q, d]``.
            present: ``[B, q]`` bool; absent inputs are invisible to all others and take no position.
            mask: ``[B, q, S + q]`` bool in place of the causal one, for inputs that must not see each other.
            positions: ``[B, q]`` in place of the next ones in order.
        """
        queries = embeds.shape[1]
        counted = present.long().cumsum(-1)
        if mask is None:
            own = torch.ones(queries, queries, dtype=torch.bool, device=embeds.device).tril() & present[:, None, :]
            # An absent input attends to itself, so that no row of the mask is empty.
            own = own | torch.eye(queries, dtype=torch.bool, device=embeds.device)
            mask = torch.cat([context.visible[:, None, :].expand(-1, queries, -1), own], dim=-1)
        if positions is None:
            positions = (context.next_position[:, None] + counted - 1).clamp_min(0)
        output = self.base.base_model(
            inputs_embeds=embeds,
            attention_mask=self._attention_mask(mask, embeds.dtype),
            position_ids=positions,
            past_key_values=context.cache,
            use_cache=True,
        )
        context.visible = torch.cat([context.visible, present], dim=1)
        context.next_position = context.next_position + counted[:, -1]
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _attention_mask(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if self.base.config._attn_implementation == "sdpa":
            return mask[:, None]
        # Eager attention adds its mask to the scores.
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[
            :, None
        ]

    def answer(self, context: Context, input_ids: Tensor, present: Tensor, looped: Tensor) -> Tensor:
        """Feed answer tokens: logits ``[B, q, V]``.

        The first token of an answer is not read here but from the head at the context's state.

        Args:
            context: after the loop; gains ``q`` columns.
            input_ids: ``[B, q]``.
            present: ``[B, q]`` bool.
            looped: ``[B]`` bool; rows that iterated use the adapter ``decode``, if there is one.
        """
        embeds = self.embed(input_ids)
        if DECODE not in self.adapters.names:
            return self.head(self.advance(context, embeds, present))
        # One adapter acts at a time: a pass for the looped rows, and one for the others.
        hidden = torch.zeros_like(embeds)
        for rows, adapter in ((looped, DECODE), (~looped, None)):
            if rows.any():
                with self.adapters.use(adapter):
                    states = self.advance(context, embeds, present & rows[:, None])
                hidden = torch.where(rows[:, None, None], states, hidden)
        return self.head(hidden)

    # -- the loop with its exits --------------------------------------------------------------------

    def loop(
        self, context: Context, settings: Sequence[LoopSettings], *, top_tokens: int = 0, read_head: bool = False
    ) -> LoopOutput:
        """Iterate until every row has met its own exit; rows stop at different iterations.

        Args:
            context: from :meth:`encode`; it is advanced in place.
            settings: one per row.
            top_tokens: the most likely tokens to record per iteration; implies ``read_head``.
            read_head: record the head's measures for every row, whatever its criterion.

        Raises:
            RequestError: there are not as many settings as rows.
        """
        if len(settings) != len(context.hidden):
            raise RequestError(f"expected {len(context.hidden)} loop settings, got {len(settings)}")
        read_head = read_head or top_tokens > 0 or any(s.reads_head for s in settings)
        rows = [RowLog(ExitRule(s, self.config.loop.guard)) for s in settings]
        states = [context.hidden]
        logits = self.head(states[0]) if read_head else None
        started, t = time.perf_counter(), 0
        while any(row.reason is None for row in rows):
            t += 1
            began = time.perf_counter()
            active = torch.tensor([row.reason is None for row in rows], device=self.device)
            previous = states[-1]
            g, h = self.iterate(context, t, states[0], active)
            states.append(h)
            moved = g if self.config.loop.residual.source == "previous" else h
            before, logits = logits, self.head(h) if read_head else None
            both = (logits, before) if logits is not None and before is not None else None
            distances = measure(h, previous, moved, both)
            back = _length(h - states[-3]) / _length(h - previous) if t > 1 else None
            tops = self._top_tokens(logits, top_tokens) if logits is not None else None
            now = time.perf_counter()
            self._observe(
                rows,
                t,
                h,
                distances,
                back,
                tops=tops,
                adapter=self.adapter_name(t),
                duration_s=now - began,
                elapsed_s=now - started,
            )
        return self._finish(context, rows, torch.stack(states, dim=1))

    def _observe(
        self, rows: list[RowLog], t: int, hidden: Tensor, distances: Distances, back: Tensor | None, **common: Any
    ) -> None:
        # One transfer per measure and iteration, none per row.
        values = {name: x.tolist() for name, x in vars(distances).items() if x is not None}
        finite = hidden.isfinite().all(-1).tolist()
        returns = back.tolist() if back is not None else [None] * len(rows)
        tops = common.pop("tops") or [()] * len(rows)
        for i, row in enumerate(rows):
            if row.reason is None:
                measured = {name: x[i] for name, x in values.items()}
                row.observe(t, measured, finite=finite[i], back=returns[i], top_tokens=tops[i], **common)

    def _top_tokens(self, logits: Tensor, count: int) -> list[tuple[tuple[str, float], ...]] | None:
        if count == 0:
            return None
        top = logits.float().softmax(-1).nan_to_num().topk(min(count, logits.shape[-1]))
        decode: Callable[[int], str] = lambda token: str(self.tokenizer.decode([token]))  # noqa: E731
        return [
            tuple((decode(token), prob) for token, prob in zip(tokens, probs, strict=True))
            for tokens, probs in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _finish(self, context: Context, rows: list[RowLog], states: Tensor) -> LoopOutput:
        kept = torch.tensor([row.kept for row in rows], device=states.device)
        self.rewind(context, states, kept)
        for layer, keys, values in context.layers():
            # A masked NaN still poisons attention: 0 * NaN is NaN.
            if not (keys.isfinite().all() and values.isfinite().all()):
                layer.keys = torch.nan_to_num(keys, 0.0, 0.0, 0.0)
                layer.values = torch.nan_to_num(values, 0.0, 0.0, 0.0)
        iterations = [len(row.records) for row in rows]
        reasons: list[ExitReason] = [row.reason or "max_iterations" for row in rows]
        return LoopOutput(
            context=context,
            states=[states[i, : n + 1] for i, n in enumerate(iterations)],
            iterations=iterations,
            kept=[row.kept for row in rows],
            exit_reasons=reasons,
            records=[row.records for row in rows],
            stability=[
                stability(row.records, row.returns, reason == "converged")
                for row, reason in zip(rows, reasons, strict=True)
            ],
            durations_s=[row.elapsed_s for row in rows],
        )


def _length(x: Tensor) -> Tensor:
    length: Tensor = x.float().norm(dim=-1)
    return length


def _refuse_unfaithful(base: PreTrainedModel) -> None:
    config = base.config
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windows or (not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None)):
        raise ConfigError(f"{type(base).__name__}: layers without full attention are not supported as a base")
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise ConfigError(f"{type(base).__name__}: {field} is not supported, the head must be plainly linear")
    if config._attn_implementation not in ("sdpa", "eager"):
        base.set_attn_implementation("sdpa")  # the others do not take the masks that a loop needs


def _rms(x: Tensor) -> Tensor:
    return x.float().pow(2).mean().sqrt()

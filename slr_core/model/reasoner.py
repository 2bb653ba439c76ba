"""The reference: one plain latent loop over any causal language model of ``transformers``.

    u_t = combine(project(h_{t-1}), e_t)
    g_t = f_{theta + L_t}(u_t ; context)
    h_t = residual(g_t, h_{t-1}, h_0)

``h`` is the model's last hidden state after its final norm, at the positions of the workspace
(:mod:`slr_core.loop.workspace`). Everything here is differentiable; training and evaluation stand on it, and
the engine is held to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slr_core.config import SLRConfig
from slr_core.errors import ConfigError, RequestError
from slr_core.loop.convergence import ExitRule, measure, step
from slr_core.loop.diagnostics import RowLog, observe, stability
from slr_core.loop.lora import DECODE, LoopAdapters, attach, fresh, trained_index
from slr_core.loop.modules import LoopModules
from slr_core.loop.workspace import readout
from slr_core.model.base_support import attention_mask, check_supported, end_tokens, hidden_size
from slr_core.model.context import Context, LoopOutput
from slr_core.params import ResolvedLoopParams
from slr_core.types import ExitReason


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
        check_supported(base)
        self._words: dict[int, str] = {}
        self.adapter_configs = dict(fresh(config.loop) if adapters is None else adapters)
        attach(base, self.adapter_configs)
        self.adapters = LoopAdapters(base)
        parts = LoopModules.build(config.loop, hidden_size(base))
        self.workspace, self.project, self.timestep, self.residual, self.halting, self.decoder = parts
        for part in parts:
            if part is not None:
                part.to(base.dtype)

    @classmethod
    def from_pretrained(cls, path_or_id: str | None = None, **options: Any) -> Self:
        """Load a checkpoint folder or hub id; without one, the bundled ``prosqa``. See :mod:`slr_core.checkpoint`."""
        from slr_core.checkpoint.read import load

        return load(cls, path_or_id, **options)

    def save_pretrained(self, folder: str) -> None:
        """Write a checkpoint folder. See :mod:`slr_core.checkpoint`."""
        from slr_core.checkpoint.write import save

        save(self, folder)

    @property
    def device(self) -> torch.device:
        """Where the base model lies."""
        return self.base.device

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's end token, those that the base generates with, the config's."""
        return end_tokens(self.base, self.tokenizer) | frozenset(self.config.text.stop_token_ids)

    @property
    def max_positions(self) -> int:
        """Positions that the base model can address: prompt, thoughts and answer together."""
        return int(getattr(self.base.config, "max_position_embeddings", 2**31))

    @property
    def vocabulary(self) -> int:
        """Token ids that the base model knows: those below this."""
        table = self.base.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        return len(table)

    def state_values(self, prompt_tokens: int, iterations: int) -> int:
        """Numbers in the states h_1 ... h_t of one row."""
        return iterations * self.workspace.width(prompt_tokens) * hidden_size(self.base)

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

    def read(self, hidden: Tensor) -> Tensor:
        """Log-probabilities ``[..., V]`` fp32 of the next token at states ``[..., d]``, as if it were read there."""
        return self.head(hidden).float().log_softmax(-1)

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
        """Everything before the first iteration; the result holds h_0.

        Args:
            input_ids: ``[B, L]`` long, padded on either side.
            attention_mask: ``[B, L]``, non-zero at real tokens; at least one per row.
        """
        return self.workspace.begin(self, input_ids, attention_mask.bool())

    def iterate(self, context: Context, t: int, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One iteration: ``(g_t, h_t)``, each ``[B, W, d]``.

        Args:
            context: holds h_0 and h_{t-1}; gains h_t.
            t: the iteration, from 1.
            active: ``[B]`` bool; the others' state stays as it is. ``None``: all.
        """
        active = torch.ones_like(context.next_position, dtype=torch.bool) if active is None else active
        before = context.hidden
        g, h = self.update(
            before, context.initial, t, lambda u: self.workspace.run(self, context, u, active), context.change[:, None]
        )
        # Padding stays as it was: what became of it could poison the row's own positions in the next pass.
        context.hidden = torch.where((active[:, None] & context.valid_mask)[..., None], h, before)
        if self.timestep.noise_level and self.is_state(t - 1):
            _, change = step(self.moved(g, h).detach(), before.detach(), context.valid_mask)
            context.change = torch.where(active, change, context.change)
        return g, context.hidden

    def update(
        self, hidden: Tensor, initial: Tensor, t: int, run: Callable[[Tensor], Tensor], change: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The three formulas: ``(g_t, h_t)`` from h_{t-1} and h_0, each ``[..., d]``.

        ``run`` is the forward pass; ``change`` the last relative change, for :class:`Timestep`.
        """
        u = self.timestep(self.project_in(hidden), self._trained(t), change)
        with self.adapters.use(self.adapter_name(t)):
            g = run(u)
        return g, self.residual(g, hidden, initial)

    def project_in(self, hidden: Tensor) -> Tensor:
        """``project``: inputs ``[..., d]`` from states ``[..., d]``."""
        projected: Tensor = self.project(hidden, self.embedding_rms())
        return projected

    def moved(self, g: Tensor, h: Tensor) -> Tensor:
        """What is compared to h_{t-1}: g_t under a ``previous`` residual, else h_t."""
        return g if self.config.loop.residual.source == "previous" else h

    def is_state(self, t: int) -> bool:
        """Whether h_t is a state: h_0 may be an input."""
        return t > 0 or self.workspace.starts_from_state

    def _trained(self, t: int) -> int:
        loop = self.config.loop
        return trained_index(t, loop.trained_iterations, loop.lora.past_end)

    def unroll(self, context: Context, iterations: int, backprop: int | None = None) -> Tensor:
        """Run every row for the same number of iterations: states ``[B, iterations + 1, W, d]``, h_0 first.

        ``backprop`` truncates: gradients flow through the last so many iterations alone, and through whatever
        ran before the loop.
        """
        states, before = [context.hidden], context.fork()
        blind = 0 if backprop is None else max(0, iterations - backprop)
        with torch.no_grad():
            states += self._stretch(context, 1, blind)
        if blind:
            context.regain_gradients(before)
        states += self._stretch(context, blind + 1, iterations)
        return torch.stack(states, dim=1)

    def _stretch(self, context: Context, first: int, last: int) -> list[Tensor]:
        """h_first ... h_last of every row, ``[B, W, d]`` each."""
        count = last - first + 1
        if not self._states_stay_apart or count < 2 or context.passes is not None:
            return [self.iterate(context, t)[1] for t in range(first, last + 1)]
        u = self.project_in(context.hidden).expand(-1, count, -1)
        with self.adapters.use(self.adapter_name(last)):
            g = self.forward_chunk(context, u, torch.ones(u.shape[:2], dtype=torch.bool, device=u.device))
        states = list(self.residual(g, context.hidden, context.initial).split(1, dim=1))
        context.hidden = states[-1]
        return states

    @property
    def _states_stay_apart(self) -> bool:
        """Whether no state reaches the next one's input and iterations are all alike: then one pass runs them all.

        So it is with the control `pause_as_thought`.
        """
        loop = self.config.loop
        apart = loop.projection.kind == "pause" and loop.residual.source == "none"
        return apart and not self.timestep.acts and loop.lora.kind != "per_iteration"

    def close(self, context: Context, states: Tensor, kept_iterations: Tensor) -> None:
        """Make ``context`` ready to write, as if each row's loop had ended after ``kept`` ``[B]`` iterations.

        ``states`` ``[B, T + 1, W, d]`` are those of the loop that just ran.
        """
        self.workspace.close(self, context, states, kept_iterations)

    def forward_chunk(
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
            valid_mask = (
                torch.ones(queries, queries, dtype=torch.bool, device=embeds.device).tril() & present[:, None, :]
            )
            # An absent input attends to itself, so that no row of the mask is empty.
            valid_mask = valid_mask | torch.eye(queries, dtype=torch.bool, device=embeds.device)
            mask = torch.cat([context.visible[:, None, :].expand(-1, queries, -1), valid_mask], dim=-1)
        if positions is None:
            positions = (context.next_position[:, None] + counted - 1).clamp_min(0)
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
        hidden: Tensor = output.last_hidden_state
        return hidden

    def write(self, context: Context, embeds: Tensor, present: Tensor, looped: Tensor) -> Tensor:
        """A pass after the loop: states ``[B, q, d]``.

        Args:
            context: gains columns.
            embeds: inputs ``[B, q, d]``.
            present: ``[B, q]`` bool.
            looped: ``[B]`` bool; rows that kept an iteration use the adapter ``decode``, if there is one.
        """
        if DECODE not in self.adapters.names:
            return self.forward_chunk(context, embeds, present)
        # One adapter acts at a time: a pass for the looped rows, and one for the others.
        hidden = torch.zeros_like(embeds)
        for rows, adapter in ((looped, DECODE), (~looped, None)):
            if rows.any():
                with self.adapters.use(adapter):
                    states = self.forward_chunk(context, embeds, present & rows[:, None])
                hidden = torch.where(rows[:, None, None], states, hidden)
        return hidden

    def answer(self, context: Context, input_ids: Tensor, present: Tensor, looped: Tensor) -> Tensor:
        """Feed answer tokens ``[B, q]``: logits ``[B, q, V]``; the other arguments as in :meth:`write`.

        The first token of an answer is not read here but from the head at the context's state.
        """
        return self.head(self.write(context, self.embed(input_ids), present, looped))

    def decode_latent(self, memory: Tensor, present: Tensor, input_ids: Tensor) -> Tensor:
        """Logits ``[B, n + 1, V]`` of the latent decoder: at its start, and after each of ``n`` tokens.

        Args:
            memory: states ``[B, S, d]`` that it reads.
            present: ``[B, S]`` bool, the real ones.
            input_ids: ``[B, n]`` long, the tokens so far.

        Raises:
            ConfigError: this model has no latent decoder.
        """
        if self.decoder is None:
            raise ConfigError("this model has no latent decoder: loop.decoder.latent_decoder is null")
        return self.head(self.decoder(memory, present, self.embed(input_ids)))

    # -- the loop with its exits --------------------------------------------------------------------

    def loop(
        self, context: Context, settings: Sequence[ResolvedLoopParams], *, top_tokens: int = 0, read_head: bool = False
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
        head = self.read(readout(states[0], context.valid_mask)) if read_head and self.is_state(0) else None
        started, t = time.perf_counter(), 0
        while any(row.reason is None for row in rows):
            t += 1
            began = time.perf_counter()
            active = torch.tensor([row.reason is None for row in rows], device=self.device)
            g, h = self.iterate(context, t, active)
            states.append(h)
            before, head = head, self.read(readout(h, context.valid_mask)) if read_head else None
            distances = measure(
                h,
                context.valid_mask,
                previous=states[-2] if self.is_state(t - 1) else None,
                moved=self.moved(g, h),
                head=head,
                head_before=before,
                p_halt=None if self.halting is None else self.halting(h, context.valid_mask),
            )
            return_ratio = None
            if t > 1 and self.is_state(t - 2):
                return_ratio = step(h, states[-3], context.valid_mask)[0] / step(h, states[-2], context.valid_mask)[0]
            tops = self.top_tokens(head, top_tokens) if head is not None else None
            now = time.perf_counter()
            observe(
                rows,
                t,
                distances,
                finite=h.masked_fill(~context.valid_mask[..., None], 0).isfinite().flatten(1).all(-1),
                return_ratio=return_ratio,
                tops=tops,
                adapter=self.adapter_name(t),
                duration_s=now - began,
                elapsed_s=now - started,
            )
        return self._finish(context, rows, torch.stack(states, dim=1))

    def top_tokens(self, head: Tensor, count: int) -> list[tuple[tuple[str, float], ...]] | None:
        """The likeliest tokens and their probabilities, from :meth:`read`'s ``[B, V]``; ``None`` for a count of 0."""
        if count == 0:
            return None
        top = head.exp().nan_to_num().topk(min(count, head.shape[-1]))
        return [
            tuple((self._word(token), prob) for token, prob in zip(tokens, probs, strict=True))
            for tokens, probs in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _word(self, token: int) -> str:
        # Decoding one token takes longer than a small model's whole iteration.
        if token not in self._words:
            self._words[token] = str(self.tokenizer.decode([token]))
        return self._words[token]

    def _finish(self, context: Context, rows: list[RowLog], states: Tensor) -> LoopOutput:
        kept_iterations = torch.tensor([row.kept_iterations for row in rows], device=states.device)
        if not (self.answers_from_states and all(kept_iterations)):
            self.close(context, states, kept_iterations)
        for layer, keys, values in context.layers():
            # A masked NaN still poisons attention: 0 * NaN is NaN.
            if not (keys.isfinite().all() and values.isfinite().all()):
                layer.keys = torch.nan_to_num(keys, 0.0, 0.0, 0.0)
                layer.values = torch.nan_to_num(values, 0.0, 0.0, 0.0)
        iterations = [len(row.records) for row in rows]
        reasons: list[ExitReason] = [row.reason or "max_iterations" for row in rows]
        return LoopOutput(
            context=context,
            states=[states[i, : n + 1, context.valid_mask[i]] for i, n in enumerate(iterations)],
            iterations=iterations,
            kept_iterations=[row.kept_iterations for row in rows],
            exit_reasons=reasons,
            records=[row.records for row in rows],
            stability=[
                stability(row.records, row.returns, reason == "converged")
                for row, reason in zip(rows, reasons, strict=True)
            ],
            durations_s=[row.elapsed_s for row in rows],
        )

    @property
    def answers_from_states(self) -> bool:
        """Whether the latent decoder writes the answers after a loop."""
        return self.config.loop.decoder.answers == "latent_decoder"


def _rms(x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.pow(2).mean().sqrt()

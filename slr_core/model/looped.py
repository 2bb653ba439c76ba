"""The reference: one plain latent loop over any causal language model of ``transformers``.

    u_t = combine(project(h_{t-1}), e_t)
    g_t = f_{theta + L_t}(u_t ; context)
    h_t = residual(g_t, h_{t-1}, h_0)

``h`` is the model's last hidden state after its final norm, at the positions of the workspace
(:mod:`slr_core.loop.workspace`). Everything here is differentiable. Training and evaluation use it, and tests hold
the engine to its results. :mod:`slr_core.model.exits` runs the loop until each row stops by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from slr_core.config import SLRConfig
from slr_core.errors import ConfigError
from slr_core.loop.context import Context
from slr_core.loop.convergence import measure_step
from slr_core.loop.lora import DECODE
from slr_core.loop.modules import LoopModules
from slr_core.loop.token_workspace import Token
from slr_core.model.adapted import AdaptedModel
from slr_core.model.base_support import hidden_size

IGNORE = -100
"""A label that is not scored, as in ``transformers``."""


@dataclass
class ReasonerOutput(ModelOutput):
    """What :meth:`LoopedModel.forward` returns.

    Attributes:
        loss: mean cross-entropy of the labels, a scalar fp32; ``None`` without labels.
        logits: ``[B, A, V]``, those from which answer token i is read at ``[:, i]``; A is 1 without labels.
        states: h_0 ... h_T, ``[B, T + 1, W, d]``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    states: Tensor | None = None


class LoopedModel(AdaptedModel):
    """A base model, its loop adapters and the loop's own modules.

    Args:
        base: a decoder-only model of ``transformers`` whose layers have full or sliding attention, with a plain
            linear head; it is changed in place (adapters are attached).
        tokenizer: its tokenizer; changed in place: ``clean_up_tokenization_spaces`` is switched off, so that a later
            token never changes the text of earlier ones.
        config: the loop.
        adapters: PEFT configs of the adapters by name; ``None``: new ones as ``config`` describes them.
            Either way they start without effect;
            :func:`slr_core.checkpoint.read.load_checkpoint` loads trained weights.

    Raises:
        ConfigError: the loop cannot run this base model or an adapter of this kind.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SLRConfig,
        adapters: Mapping[str, LoraConfig] | None = None,
    ) -> None:
        super().__init__(base, tokenizer, config, adapters)
        modules = LoopModules.build(config.loop, hidden_size(base))
        self.workspace, self.project, self.timestep, self.residual, self.halting, self.decoder = modules
        for module in modules:
            if module is not None:
                module.to(base.dtype)

    # -- as in transformers --------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        iterations: int | None = None,
    ) -> ReasonerOutput:
        """Run the loop after each prompt for a fixed number of iterations, then read the answer, teacher-forced.

        As in an encoder-decoder model, ``input_ids`` hold the prompt and ``labels`` the answer. Differentiable.

        Args:
            input_ids: prompts ``[B, L]`` long, padded on either side.
            attention_mask: ``[B, L]``, non-zero at real tokens, at least one per row; ``None``: all are real.
            labels: answer tokens ``[B, A]`` long, padded on the right with -100; ``None``: only the logits of the
                first answer token are computed.
            iterations: T, the same for all rows; ``None``: the checkpoint's default; 0: the base model.

        Raises:
            RequestError: the loop would pass the last trained iteration under the policy ``error``.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        count = self.config.default_iterations if iterations is None else iterations
        context = self.encode(input_ids, mask)
        states = self.unroll(context, count)
        fed = input_ids[:, :0] if labels is None else labels[:, :-1]
        present, fed = fed != IGNORE, fed.clamp_min(0)
        if self.answers_from_states and count:
            memory = torch.stack([self.workspace.memory(row, count) for row in states])
            logits = self.decode_latent(memory, context.valid_mask.expand(-1, memory.shape[1]), fed)
        else:
            kept_iterations = torch.full((len(states),), count, device=states.device)
            self.close(context, states, kept_iterations)
            logits = self.head(context.state)[:, None]
            if fed.shape[1]:
                rest = self.answer_logits(context, fed, present, kept_iterations > 0)
                logits = torch.cat([logits, rest], dim=1)
        loss = None if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return ReasonerOutput(loss=loss, logits=logits, states=states)

    # -- the formulas --------------------------------------------------------------------------------

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Context:
        """Run the prompt; the context returned holds h_0.

        Args:
            input_ids: ``[B, L]`` long, padded on either side.
            attention_mask: ``[B, L]``, non-zero at real tokens; at least one per row.
        """
        return self.workspace.begin(self, input_ids, attention_mask.bool())

    def iterate(self, context: Context, t: int, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One iteration: ``(g_t, h_t)``, each ``[B, W, d]``.

        Args:
            context: holds h_0 and h_{t-1}; gets h_t.
            t: the iteration, from 1.
            active: ``[B]`` bool; the state of other rows does not change. ``None``: all rows.
        """
        active = torch.ones_like(context.next_position, dtype=torch.bool) if active is None else active
        before = context.hidden
        g, h = self.update(
            before,
            context.initial,
            t,
            lambda u: self.workspace.run(self, context, u, active, t),
            context.change[:, None],
            context.state,
        )
        # Padding keeps its state: a value that is not finite would spoil the row's valid positions in the next pass.
        context.hidden = torch.where((active[:, None] & context.valid_mask)[..., None], h, before)
        if self.timestep.noise_level and self.is_state(t - 1):
            _, change = measure_step(self.compared_state(g, h).detach(), before.detach(), context.valid_mask)
            context.change = torch.where(active, change, context.change)
        return g, context.hidden

    def update(
        self,
        hidden: Tensor,
        initial: Tensor,
        t: int,
        run: Callable[[Tensor], Tensor],
        change: Tensor | None = None,
        prompt_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The three formulas: ``(g_t, h_t)`` from h_{t-1} and h_0, each ``[..., d]``.

        ``run`` is the forward pass; ``change`` the last relative change, for :class:`Timestep`; ``prompt_state`` as in
        :meth:`feed_back`.
        """
        fed = hidden if t == 1 and self.shifted else self.feed_back(hidden, prompt_state)
        u = self.timestep(fed, self._trained_index(t), change)
        with self.adapters.use(self.adapter_name(t)):
            g = run(u)
        return g, self.residual(g, hidden, initial)

    def project_in(self, hidden: Tensor) -> Tensor:
        """``project``: inputs ``[..., d]`` from states ``[..., d]``."""
        if self.project.kind == "expected_embedding":
            return self.expected_embedding(self.head(hidden).float(), self.config.loop.projection.top_tokens)
        projected: Tensor = self.project(hidden, self.embedding_rms())
        return projected

    @property
    def shifted(self) -> bool:
        """Whether a position is fed the state of the position before it; h_0 is then fed as it is."""
        return self.config.loop.feedback == "shifted"

    def feed_back(self, hidden: Tensor, prompt_state: Tensor | None) -> Tensor:
        """The projected states ``[..., W, d]`` that follow states ``[..., W, d]``.

        Args:
            hidden: h_t.
            prompt_state: the state ``[..., d]`` at the last prompt position; read only if :attr:`shifted`.
        """
        if self.shifted:
            assert prompt_state is not None
            hidden = torch.cat([prompt_state[..., None, :], hidden[..., :-1, :]], dim=-2)
        return self.project_in(hidden)

    def compared_state(self, g: Tensor, h: Tensor) -> Tensor:
        """The state that is compared with h_{t-1}: g_t under a ``previous`` residual, else h_t."""
        return g if self.config.loop.residual.source == "previous" else h

    def state_values(self, prompt_tokens: int, iterations: int) -> int:
        """Number of values in the states h_1 ... h_t that a result of one row holds."""
        width = 1 if self.workspace.per_token else self.workspace.width(prompt_tokens)
        return iterations * width * hidden_size(self.base)

    def is_state(self, t: int) -> bool:
        """Whether h_t is a state: h_0 is an input in some workspaces."""
        return t > 0 or self.workspace.starts_from_state

    def unroll(self, context: Context, iterations: int, backprop: int | None = None) -> Tensor:
        """Run every row for the same number of iterations: states ``[B, iterations + 1, W, d]``, h_0 first.

        ``backprop`` truncates: gradients flow only through the last ``backprop`` iterations and through what ran
        before the loop.
        """
        states, before = [context.hidden], context.fork()
        untracked = 0 if backprop is None else max(0, iterations - backprop)
        with torch.no_grad():
            states += self._iterate_range(context, 1, untracked)
        if untracked:
            context.restore_gradients(before)
        states += self._iterate_range(context, untracked + 1, iterations)
        return torch.stack(states, dim=1)

    def _iterate_range(self, context: Context, first: int, last: int) -> list[Tensor]:
        """h_first ... h_last of every row, ``[B, W, d]`` each."""
        count = last - first + 1
        if not self._independent_iterations or count < 2 or context.passes is not None:
            return [self.iterate(context, t)[1] for t in range(first, last + 1)]
        u = self.project_in(context.hidden).expand(-1, count, -1)
        with self.adapters.use(self.adapter_name(last)):
            g = self.forward_chunk(context, u, torch.ones(u.shape[:2], dtype=torch.bool, device=u.device))
        states = list(self.residual(g, context.hidden, context.initial).split(1, dim=1))
        context.hidden = states[-1]
        return states

    @property
    def _independent_iterations(self) -> bool:
        """Whether iterations are alike and none reads an earlier state, so that one pass can run them all.

        This holds for the control ``pause_as_thought``.
        """
        loop = self.config.loop
        no_feedback = loop.projection.kind == "pause" and loop.residual.source == "none"
        return no_feedback and not self.timestep.acts and loop.lora.kind != "per_iteration"

    # -- the answer ----------------------------------------------------------------------------------

    def close(self, context: Context, states: Tensor, kept_iterations: Tensor) -> None:
        """Prepare ``context`` for the answer, as if each row's loop had ended after ``kept_iterations`` ``[B]``.

        ``states`` ``[B, T + 1, W, d]`` are those of the loop that just ran.
        """
        self.workspace.close(self, context, states, kept_iterations)

    def forward_after_loop(self, context: Context, embeds: Tensor, present: Tensor, looped: Tensor) -> Tensor:
        """A pass after the loop: states ``[B, q, d]``.

        Args:
            context: gains cache positions.
            embeds: inputs ``[B, q, d]``.
            present: ``[B, q]`` bool.
            looped: ``[B]`` bool, rows that kept an iteration; they use the adapter ``decode`` if there is one.
        """
        if DECODE not in self.adapters.names:
            return self.forward_chunk(context, embeds, present)
        # Only one adapter can be active: one pass for the looped rows, and one for the others.
        hidden = torch.zeros_like(embeds)
        for rows, adapter in ((looped, DECODE), (~looped, None)):
            if rows.any():
                with self.adapters.use(adapter):
                    states = self.forward_chunk(context, embeds, present & rows[:, None])
                hidden = torch.where(rows[:, None, None], states, hidden)
        return hidden

    def answer_logits(self, context: Context, input_ids: Tensor, present: Tensor, looped: Tensor) -> Tensor:
        """Logits ``[B, q, V]`` after answer tokens ``[B, q]``; other arguments as in :meth:`forward_after_loop`.

        The first token of an answer is read by the head at the context's state instead. In the workspace ``token``,
        every position runs all iterations that the context allows.
        """
        if isinstance(self.workspace, Token):
            return self.head(self._loop_tokens(self.workspace, context, self.embed(input_ids), present))
        return self.head(self.forward_after_loop(context, self.embed(input_ids), present, looped))

    def _loop_tokens(self, workspace: Token, context: Context, embeds: Tensor, present: Tensor) -> Tensor:
        """Loop answer tokens ``[B, q]`` at full depth, all rows the same: states ``[B, q, d]``."""
        assert context.depths is not None
        iterations = int(context.depths.max())
        if iterations == 0:
            return self.forward_chunk(context, embeds, present)
        hidden = []
        # With a shared cache, a position needs the last iteration of those before it.
        size = 1 if workspace.shared_cache else embeds.shape[1]
        for part, real in zip(torch.split(embeds, size, dim=1), torch.split(present, size, dim=1), strict=True):
            workspace.extend(context, part, real)
            states = self.unroll(context, iterations)
            self.close(context, states, context.depths)
            hidden.append(states[:, -1])
        return torch.cat(hidden, dim=1)

    def decode_latent(self, memory: Tensor, present: Tensor, input_ids: Tensor) -> Tensor:
        """Logits ``[B, n + 1, V]`` of the latent decoder: at its start, and after each of ``n`` tokens.

        Args:
            memory: the latent states ``[B, S, d]`` that it reads.
            present: ``[B, S]`` bool, the real ones.
            input_ids: ``[B, n]`` long, the tokens so far.

        Raises:
            ConfigError: this model has no latent decoder.
        """
        if self.decoder is None:
            raise ConfigError("this model has no latent decoder: loop.decoder.latent_decoder is null")
        return self.head(self.decoder(memory, present, self.embed(input_ids)))

    @property
    def answers_from_states(self) -> bool:
        """Whether the latent decoder, not the LM head, decodes the answer after a loop."""
        return self.config.loop.decoder.answers == "latent_decoder"

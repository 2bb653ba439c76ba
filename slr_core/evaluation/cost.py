"""Estimate the floating-point operations of a request from the shapes of its forward passes."""

from __future__ import annotations

from torch import Tensor

from slr_core.checkpoint.info import describe_model
from slr_core.loop.lora import DECODE
from slr_core.model.base_support import hidden_size
from slr_core.reasoner import LatentReasoner


class Cost:
    """Counts 2 operations per weight and position, and 4 per channel, layer and attended position (scores and values).

    Embedding look-ups cost nothing; the LM head counts once per token. Norms, softmax and the loop's small modules are
    left out: in models of practical size they are below a percent.
    """

    def __init__(self, reasoner: LatentReasoner) -> None:
        self.reasoner, base, described = reasoner, reasoner.base, describe_model(reasoner)
        self.added_parameters = described.added_parameters
        table: Tensor = base.get_input_embeddings().weight  # type: ignore[assignment]
        head: Tensor = base.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        self.width, self.layers = hidden_size(base), int(base.config.num_hidden_layers)
        embeddings = table.numel() + (0 if head is table else head.numel())
        self.per_position = 2 * (described.base_parameters - embeddings)
        self.per_token = 2 * head.numel()
        self.per_adapter: dict[str | None, int] = {None: 0}
        for name in reasoner.adapters.names:
            named = base.named_parameters()
            weights = (p for key, p in named if ".lora_" in key and f".{name}." in key)
            self.per_adapter[name] = 2 * sum(p.numel() for p in weights)
        decoder = reasoner.decoder
        self.per_decoded = 0 if decoder is None else 2 * sum(p.numel() for p in decoder.parameters())
        text = reasoner.config.text
        self.prefix = (
            len(reasoner.tokenizer(text.answer_prefix, add_special_tokens=False).input_ids) if text.answer_prefix else 0
        )

    def positions(self, count: int, before: int, adapter: str | None = None) -> float:
        """Operations of a causal pass over ``count`` new positions after ``before`` cached ones."""
        attended = count * before + count * (count + 1) / 2
        return count * (self.per_position + self.per_adapter[adapter]) + 4 * self.layers * self.width * attended

    def request(self, prompt_tokens: int, iterations: int, tokens: int) -> float:
        """Operations of a request: prompt, ``iterations`` of the loop, ``tokens`` decoded after the answer prefix.

        In the workspace ``token``, a prompt runs the default maximum, and every token as many iterations as the first.
        """
        workspace = self.reasoner.workspace
        width = workspace.width(prompt_tokens)
        total: float = tokens * self.per_token
        if workspace.per_token and iterations:
            depth = max(iterations, self.reasoner.config.loop.max_iterations)
            adapters = [self.reasoner.adapter_name(t) for t in range(1, depth + 1)]
            total += sum(self.positions(prompt_tokens, 0, adapter) for adapter in adapters)
            places = range(prompt_tokens, prompt_tokens + tokens - 1)
            return total + sum(self.positions(1, at, adapter) for at in places for adapter in adapters[:iterations])
        cached = prompt_tokens if workspace.passes(0) else 0
        if cached:
            total += self.positions(prompt_tokens, 0)
        # Only in `append` does an iteration add positions that the next one attends to.
        extends = workspace.loop_positions(2) > workspace.loop_positions(1)
        for t in range(1, iterations + 1):
            total += self.positions(width, cached + (t - 1 if extends else 0), self.reasoner.adapter_name(t))
        if self.reasoner.answers_from_states and iterations:
            # The latent decoder has no cache: for each token it runs over all tokens before it.
            return total + self.per_decoded * sum(1 + self.prefix + i for i in range(tokens))
        adapter = DECODE if iterations and DECODE in self.per_adapter else None
        if workspace.closing_passes(iterations):
            total += self.positions(width, cached, adapter)
        start = prompt_tokens + workspace.loop_positions(iterations)
        if self.prefix:
            total += self.positions(self.prefix, start, adapter)
        first = start + self.prefix
        return total + sum(self.positions(1, first + i, adapter) for i in range(tokens - 1))

"""Floating-point operations of a request, estimated from the shapes of its passes."""

from __future__ import annotations

from torch import Tensor

from slr_core.checkpoint.info import describe_model
from slr_core.loop.lora import DECODE
from slr_core.model.base_support import hidden_size
from slr_core.model.reasoner import LatentReasoner


class Cost:
    """Counts 2 operations per weight and position, and 4 per channel, layer and attended position (scores and values).

    Embedding look-ups are free; the LM head is counted wherever a token is read. Norms, softmax and the loop's
    small modules are left out: they are below a percent at any size that matters.
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
            own = (p for key, p in base.named_parameters() if ".lora_" in key and f".{name}." in key)
            self.per_adapter[name] = 2 * sum(p.numel() for p in own)
        decoder = reasoner.decoder
        self.per_decoded = 0 if decoder is None else 2 * sum(p.numel() for p in decoder.parameters())
        text = reasoner.config.text
        self.prefix = (
            len(reasoner.tokenizer(text.answer_prefix, add_special_tokens=False).input_ids) if text.answer_prefix else 0
        )

    def positions(self, count: int, before: int, adapter: str | None = None) -> float:
        """A pass over ``count`` new positions after ``before`` cached ones, causal."""
        attended = count * before + count * (count + 1) / 2
        return count * (self.per_position + self.per_adapter[adapter]) + 4 * self.layers * self.width * attended

    def request(self, prompt_tokens: int, iterations: int, tokens: int) -> float:
        """A whole request: its prompt, ``iterations`` of the loop, ``tokens`` written after the answer prefix."""
        workspace = self.reasoner.workspace
        width = workspace.width(prompt_tokens)
        total: float = tokens * self.per_token
        over = prompt_tokens if workspace.passes(0) else 0
        if over:
            total += self.positions(prompt_tokens, 0)
        # Only a chain of thoughts leaves something behind for the next iteration.
        grows = workspace.loop_positions(2) > workspace.loop_positions(1)
        for t in range(1, iterations + 1):
            total += self.positions(width, over + (t - 1 if grows else 0), self.reasoner.adapter_name(t))
        if self.reasoner.answers_from_states and iterations:
            # The latent decoder keeps no cache: it runs over all of its tokens for each next one.
            return total + self.per_decoded * sum(1 + self.prefix + i for i in range(tokens))
        writing = DECODE if iterations and DECODE in self.per_adapter else None
        if workspace.closing_passes(iterations):
            total += self.positions(width, over, writing)
        written_from = prompt_tokens + workspace.loop_positions(iterations)
        if self.prefix:
            total += self.positions(self.prefix, written_from, writing)
        first = written_from + self.prefix
        return total + sum(self.positions(1, first + i, writing) for i in range(tokens - 1))

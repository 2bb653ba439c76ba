"""From a finished loop to the answer's tokens, by the LM head or by the latent decoder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slr_core.generation.logprobs import score
from slr_core.generation.sampling import sample_token
from slr_core.generation.stop_strings import REPLACEMENT, StopStringFinder
from slr_core.generation.token_bytes import open_run
from slr_core.loop.token_workspace import Token
from slr_core.loop.workspace import readout
from slr_core.model.exits import LoopOutput, loop_until_exit
from slr_core.model.looped import LoopedModel
from slr_core.panics import panics_as_errors
from slr_core.params import ResolvedLoopParams
from slr_core.types import ExitReason, FinishReason, IterationRecord, TokenScore

if TYPE_CHECKING:
    from slr_core.types import Request


class DecodeState:
    """One row's answer while it is decoded.

    Attributes:
        tokens: ids of the answer so far, forced ones included.
        scores: log-probabilities of these tokens, where the request asks for them.
        finish_reason: why the answer ended; ``None``: it has not.
        first_token_at: ``time.perf_counter`` at the first token.
        finished_at: ``time.perf_counter`` at the end.
    """

    def __init__(self, reasoner: LoopedModel, request: Request) -> None:
        self.tokenizer, self.request, self.device = reasoner.tokenizer, request, reasoner.device
        self.end_tokens = reasoner.end_tokens
        self.suppressed = reasoner.config.text.suppressed_token_ids
        self.generator = request.sampling.generator()
        self.tokens: list[int] = []
        self.scores: list[TokenScore] = []
        self.finish_reason: FinishReason | None = None
        self.first_token_at = 0.0
        self.finished_at = 0.0
        self._returned = ""
        self._whole, self._decoded_tokens = "", 0
        forced = self._decode(list(request.forced_ids)) if request.forced_ids else ""
        self._stops = StopStringFinder(request.stop, start=len(forced))

    def choose_token(self, logits: Tensor, most_likely: int | None = None) -> int:
        """Choose the next token, add it to the answer and return its id.

        Args:
            logits: ``[V]``.
            most_likely: the index of the largest logit, where the caller has it already.
        """
        forced = self.request.forced_ids
        if self.suppressed:
            logits = logits.index_fill(0, torch.tensor(self.suppressed, device=logits.device), -torch.inf)
            most_likely = None if most_likely in self.suppressed else most_likely
        if len(self.tokens) < len(forced):
            token = forced[len(self.tokens)]
        elif self.generator is None and most_likely is not None:
            token = most_likely
        else:
            token = sample_token(logits, self.request.sampling, self.generator)
        if self.request.logprobs is not None:
            self.scores += score(logits[None], (token,), self.request.logprobs)
        self.add_token(token)
        return token

    def add_token(self, token: int) -> None:
        """Add a token and check whether it ends the answer."""
        if not self.tokens:
            self.first_token_at = time.perf_counter()
        self.tokens.append(token)
        chosen = len(self.tokens) - len(self.request.forced_ids)
        if chosen <= 0:
            return
        if self.request.stop:  # decoding is needed here only to find a stop string
            self._update_text()
        if self._stops.position is not None or token in self.end_tokens:
            self.finish("stop")
        elif chosen >= self.request.max_new_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the answer."""
        self.finish_reason, self.finished_at = reason, time.perf_counter()

    @property
    def text(self) -> str:
        """The answer so far, up to its first stop string."""
        self._update_text()
        return self._whole[: self._stops.position]

    def new_text(self) -> str:
        """The text that no earlier call returned and that no later token can change.

        Concatenated, the returned parts are :attr:`text` once the answer has ended.
        """
        text = self.text
        settled = len(text)
        if self.finish_reason is None:
            # An incomplete character and the start of a stop string may change.
            settled = len(text.rstrip(REPLACEMENT)) - self._stops.begun
            if run := open_run(self.tokenizer, self.tokens):
                settled = min(settled, len(self._decode(self.tokens[:-run])))
        if not text.startswith(self._returned) or settled <= len(self._returned):
            return ""
        new, self._returned = text[len(self._returned) : settled], text[:settled]
        return new

    def _update_text(self) -> None:
        """Decode the answer and look for stop strings, unless that was done for its last token."""
        if self._decoded_tokens != len(self.tokens):
            self._whole, self._decoded_tokens = self._decode(self.tokens), len(self.tokens)
            self._stops.read(self._whole)

    def _decode(self, tokens: list[int]) -> str:
        with panics_as_errors():
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def pad_ids(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids ``[B, L]`` long, padded on the right, and the mask ``[B, L]`` bool of the real ones."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True).to(device)
    return ids, torch.arange(ids.shape[1], device=device) < lengths[:, None]


class TextDecoder(Protocol):
    """Computes the logits ``[B, V]`` of each row's next token; only those of ``active`` ``[B]`` rows are defined."""

    def first(self, active: Tensor) -> Tensor:
        """Logits of the first token."""
        ...

    def next(self, tokens: list[list[int]], active: Tensor) -> Tensor:
        """Logits of the token after each row's ``tokens``."""
        ...


class LMHeadDecoder:
    """Decodes with the base model over its cache and the LM head."""

    def __init__(self, reasoner: LoopedModel, output: LoopOutput, requests: Sequence[Request]) -> None:
        self.reasoner, self.context = reasoner, output.context
        self.looped = torch.tensor(output.kept_iterations, device=reasoner.device) > 0
        self.prefixes = [request.answer_prefix_ids for request in requests]

    def first(self, active: Tensor) -> Tensor:
        """Read at the context's state, or after the answer prefix."""
        if not any(self.prefixes):
            return self.reasoner.head(self.context.state)
        ids, present = pad_ids(self.prefixes, self.reasoner.device)
        embeds, fed = self.reasoner.embed(ids), present & active[:, None]
        states = self.reasoner.forward_after_loop(self.context, embeds, fed, self.looped)
        return self.reasoner.head(readout(states, present))

    def next(self, tokens: list[list[int]], active: Tensor) -> Tensor:
        """One pass over each row's last token."""
        last = torch.tensor([row[-1:] or [0] for row in tokens], device=self.reasoner.device)
        return self.reasoner.answer_logits(self.context, last, active[:, None], self.looped)[:, 0]


class TokenLoopDecoder:
    """Decodes in the workspace ``token``: every token of the answer runs its own loop, then the next is read.

    Args:
        reasoner: the model.
        output: the prompt's loop; its context is changed.
        requests: one per row.

    Attributes:
        loops: per row the loop before each token, the prompt's first.
    """

    def __init__(self, reasoner: LoopedModel, output: LoopOutput, requests: Sequence[Request]) -> None:
        self.reasoner, self.context, self.requests = reasoner, output.context, requests
        assert isinstance(reasoner.workspace, Token)
        assert output.context.depths is not None
        self.workspace, self.depths = reasoner.workspace, output.context.depths.tolist()
        self.params = [
            replace(request.loop, max_iterations=depth, min_iterations=min(request.loop.min_iterations, depth))
            for request, depth in zip(requests, self.depths, strict=True)
        ]
        self.loops = [[TokenLoop.of(output, row)] for row in range(len(requests))]

    def first(self, active: Tensor) -> Tensor:
        """Read at the context's state."""
        return self.reasoner.head(self.context.state)

    def next(self, tokens: list[list[int]], active: Tensor) -> Tensor:
        """Loop each row's last token."""
        reasoner = self.reasoner
        last = torch.tensor([row[-1:] or [0] for row in tokens], device=reasoner.device)
        self.workspace.extend(self.context, reasoner.embed(last), active[:, None])
        idle = ResolvedLoopParams(0, 0, "fixed", 0.0, 1)
        runs = active.tolist()
        traced = [
            request
            for request, loops in zip(self.requests, self.loops, strict=True)
            if len(loops) < request.trace_tokens
        ]
        output = loop_until_exit(
            reasoner,
            self.context,
            [own if run else idle for own, run in zip(self.params, runs, strict=True)],
            top_tokens=max((request.top_tokens for request in traced), default=0),
            read_head=any(request.trace for request in traced),
        )
        for row, loops in enumerate(self.loops):
            if runs[row]:
                loops.append(TokenLoop.of(output, row))
        return reasoner.head(self.context.state)


@dataclass(frozen=True)
class TokenLoop:
    """The loop before one token, in the workspace ``token``.

    Attributes:
        iterations: the iteration that ended it.
        kept_iterations: the iteration whose state was decoded.
        iterations_run: iterations run, those of the prompt after its exit included.
        exit_reason: why it ended.
        records: its iterations.
    """

    iterations: int
    kept_iterations: int
    iterations_run: int
    exit_reason: ExitReason
    records: Sequence[IterationRecord] = ()

    @classmethod
    def of(cls, output: LoopOutput, row: int) -> Self:
        """The loop of one row."""
        return cls(
            output.iterations[row],
            output.kept_iterations[row],
            output.iterations_run[row],
            output.exit_reasons[row],
            output.records[row],
        )


def count_token_passes(request: Request, loops: Sequence[TokenLoop], depth: int, *, shared_cache: bool) -> int:
    """Forward passes of a lone request in the workspace ``token``.

    Args:
        request: the request.
        loops: the loop before each token.
        depth: iterations that each position of the answer could run.
        shared_cache: whether iterations that were run and not kept take one more pass, which writes the cache again.
    """
    kept = [depth, *(max(1, loop.kept_iterations) for loop in loops[1:])]
    again = [shared_cache and 0 < k < loop.iterations_run for k, loop in zip(kept, loops, strict=True)]
    plain = len(loops) if depth == 0 else 0
    return sum(loop.iterations_run for loop in loops) + sum(again) + plain + request.score_prompt


class LatentTextDecoder:
    """Decodes with the latent decoder, which runs its layers over all tokens again for each next one.

    Args:
        reasoner: has a latent decoder.
        memories: the latent states ``[S, d]`` that it reads, one tensor per row.
        prefixes: tokens that each row's text begins with.
    """

    def __init__(
        self, reasoner: LoopedModel, memories: Sequence[Tensor], prefixes: Sequence[tuple[int, ...]] | None = None
    ) -> None:
        self.reasoner = reasoner
        self.prefixes = prefixes or [()] * len(memories)
        lengths = torch.tensor([len(memory) for memory in memories], device=reasoner.device)
        self.memory = pad_sequence(list(memories), batch_first=True)
        self.present = torch.arange(self.memory.shape[1], device=reasoner.device) < lengths[:, None]

    @classmethod
    def for_answers(cls, reasoner: LoopedModel, output: LoopOutput, requests: Sequence[Request]) -> Self:
        """Reads the states that each row's loop left. Rows without a loop get a placeholder: do not activate them."""
        memories = [
            reasoner.workspace.memory(states, kept) if kept else states[0]
            for states, kept in zip(output.states, output.kept_iterations, strict=True)
        ]
        return cls(reasoner, memories, [request.answer_prefix_ids for request in requests])

    def first(self, active: Tensor) -> Tensor:
        """Read after the prefix, or at the decoder's start."""
        return self.next([[] for _ in self.prefixes], active)

    def next(self, tokens: list[list[int]], active: Tensor) -> Tensor:
        """Read after each row's prefix and tokens."""
        texts = [(*prefix, *row) for prefix, row in zip(self.prefixes, tokens, strict=True)]
        ids, present = pad_ids(texts, self.memory.device)
        logits = self.reasoner.decode_latent(self.memory, self.present, ids)
        return logits[torch.arange(len(logits), device=logits.device), present.sum(-1)]


def decode_answers(answers: Sequence[DecodeState], decoder: TextDecoder, selected: Sequence[bool]) -> None:
    """Decode the answers of the ``selected`` rows to their ends."""
    logits: Tensor | None = None
    while True:
        running = [chosen and answer.finish_reason is None for chosen, answer in zip(selected, answers, strict=True)]
        if not any(running):
            return
        active = torch.tensor(running, device=answers[0].device)
        if logits is None:
            logits = decoder.first(active)
        else:
            logits = decoder.next([answer.tokens for answer in answers], active)
        for row, answer in enumerate(answers):
            if running[row]:
                answer.choose_token(logits[row])


def decode_thoughts(
    reasoner: LoopedModel, states: Sequence[Tensor], selected: Sequence[bool]
) -> list[list[str | None]]:
    """Text of each iteration's states, by the latent decoder.

    Args:
        reasoner: with or without a latent decoder.
        states: h_0 ... h_t ``[t + 1, W, d]`` of each row.
        selected: the rows to decode.

    Returns:
        One entry per row and iteration: ``None`` in rows that are not selected, for states that are not finite, and
        without a latent decoder.
    """
    latent = reasoner.config.loop.decoder.latent_decoder
    thoughts: list[list[str | None]] = [[None] * (len(row) - 1) for row in states]
    if latent is None:
        return thoughts
    # States that are not finite are skipped: they would spoil the batch.
    places = [
        (row, t)
        for row, chosen in enumerate(selected)
        for t in range(len(states[row]) - 1)
        if chosen and states[row][t + 1].isfinite().all()
    ]
    if not places:
        return thoughts
    decoder = LatentTextDecoder(reasoner, [states[row][t + 1] for row, t in places])
    ends = reasoner.end_tokens
    tokens: list[list[int]] = [[] for _ in places]
    all_rows = torch.ones(len(places), dtype=torch.bool, device=reasoner.device)
    for _ in range(latent.max_thought_tokens):
        chosen_ids = decoder.next(tokens, all_rows).argmax(-1).tolist()
        # A finished thought goes on with the batch and is cut below.
        tokens = [[*row, token] for row, token in zip(tokens, chosen_ids, strict=True)]
        if all(ends.intersection(row) for row in tokens):
            break
    for (row, t), ids in zip(places, tokens, strict=True):
        end = next((at for at, token in enumerate(ids) if token in ends), len(ids))
        with panics_as_errors():
            thoughts[row][t] = str(reasoner.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
    return thoughts

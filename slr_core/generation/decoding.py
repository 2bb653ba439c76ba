"""Writing: from a finished loop to tokens, by the LM head or by the latent decoder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slr_core.generation.logprobs import score
from slr_core.generation.sampling import choose
from slr_core.loop.workspace import readout
from slr_core.model.context import LoopOutput
from slr_core.model.reasoner import LatentReasoner
from slr_core.types import FinishReason, TokenScore

if TYPE_CHECKING:
    from slr_core.types import Request


class DecodeState:
    """A row while its answer is written."""

    def __init__(self, reasoner: LatentReasoner, request: Request) -> None:
        self.tokenizer, self.request, self.device = reasoner.tokenizer, request, reasoner.device
        self.end_tokens = reasoner.end_tokens
        self.generator = request.sampling.generator()
        self.tokens: list[int] = []
        self.scores: list[TokenScore] = []
        """Of the tokens, where the request asks for log-probabilities."""
        self._shown = ""
        self.finished: FinishReason | None = None
        self.began_at = 0.0
        """When the first token was written (``time.perf_counter``)."""
        self.ended_at = 0.0

    def take(self, logits: Tensor, likeliest: int | None = None) -> int:
        """Choose the next token from logits ``[V]``, of which ``likeliest`` may be known, and see whether the answer
        ends with it."""
        forced = self.request.forced_ids
        if len(self.tokens) < len(forced):
            token = forced[len(self.tokens)]
        elif self.generator is None and likeliest is not None:
            token = likeliest
        else:
            token = choose(logits, self.request.sampling, self.generator)
        if self.request.logprobs is not None:
            self.scores += score(logits[None], (token,), self.request.logprobs)
        self.push(token)
        return token

    def push(self, token: int) -> None:
        """Add a token and see whether the answer ends with it."""
        if not self.tokens:
            self.began_at = time.perf_counter()
        self.tokens.append(token)
        beyond = len(self.tokens) - len(self.request.forced_ids)
        if beyond <= 0:
            return
        # Only a stop string needs the text now.
        stopped = self.request.stop and self._end_of(self._decoded()) is not None
        if stopped or token in self.end_tokens:
            self.end("stop")
        elif beyond >= self.request.max_new_tokens:
            self.end("length")

    @property
    def text(self) -> str:
        """The answer so far, up to its first stop string."""
        text = self._decoded()
        return text[: self._end_of(text)]

    def fresh(self) -> str:
        """What may be shown beyond what this returned before: never what a later token could take back."""
        text = self.text
        safe = len(text) if self.finished else len(text) - self._unsettled(text)
        if not text.startswith(self._shown) or safe <= len(self._shown):
            return ""
        fresh, self._shown = text[len(self._shown) : safe], text[:safe]
        return fresh

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _end_of(self, text: str) -> int | None:
        """Where the first stop string begins; those in what was forced do not count."""
        forced = self.request.forced_ids
        start = len(self.tokenizer.decode(list(forced), skip_special_tokens=True)) if forced else 0
        return min([at for stop in self.request.stop if (at := text.find(stop, start)) >= 0], default=None)

    def _unsettled(self, text: str) -> int:
        # Half a character decodes to U+FFFD; the beginning of a stop string may become one.
        whole = text.rstrip("\ufffd")
        begun = [n for stop in self.request.stop for n in range(1, len(stop)) if whole.endswith(stop[:n])]
        return len(text) - len(whole) + max(begun, default=0)

    def end(self, reason: FinishReason) -> None:
        """The answer is complete."""
        self.finished, self.ended_at = reason, time.perf_counter()


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids ``[B, L]`` padded on the right, and the mask of what is real."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True).to(device)
    return ids, torch.arange(ids.shape[1], device=device) < lengths[:, None]


class Writer(Protocol):
    """Gives the logits ``[B, V]`` from which each row's next token is read; only ``active`` ``[B]`` rows count."""

    def first(self, active: Tensor) -> Tensor:
        """Those of the first token."""
        ...

    def next(self, tokens: list[list[int]], active: Tensor) -> Tensor:
        """Those that follow each row's tokens."""
        ...


class LMHead:
    """The base model over its cache, read by the LM head."""

    def __init__(self, reasoner: LatentReasoner, output: LoopOutput, requests: Sequence[Request]) -> None:
        self.reasoner, self.context = reasoner, output.context
        self.looped = torch.tensor(output.kept_iterations, device=reasoner.device) > 0
        self.prefixes = [request.answer_prefix_ids for request in requests]

    def first(self, active: Tensor) -> Tensor:
        """At the context's state, or after the answer prefix."""
        if not any(self.prefixes):
            return self.reasoner.head(self.context.state)
        ids, present = pad(self.prefixes, self.reasoner.device)
        embeds, fed = self.reasoner.embed(ids), present & active[:, None]
        return self.reasoner.head(readout(self.reasoner.write(self.context, embeds, fed, self.looped), present))

    def next(self, tokens: list[list[int]], active: Tensor) -> Tensor:
        """One pass over each row's last token."""
        last = torch.tensor([row[-1:] or [0] for row in tokens], device=self.reasoner.device)
        return self.reasoner.answer(self.context, last, active[:, None], self.looped)[:, 0]


class LatentWriter:
    """The latent decoder, which runs its few layers over all its tokens again for each next one.

    Args:
        reasoner: has a latent decoder.
        memories: what it reads, ``[S, d]`` for each row.
        prefixes: tokens that each row's text begins with.
    """

    def __init__(
        self, reasoner: LatentReasoner, memories: Sequence[Tensor], prefixes: Sequence[tuple[int, ...]] | None = None
    ) -> None:
        self.reasoner = reasoner
        self.prefixes = prefixes or [()] * len(memories)
        lengths = torch.tensor([len(memory) for memory in memories], device=reasoner.device)
        self.memory = pad_sequence(list(memories), batch_first=True)
        self.present = torch.arange(self.memory.shape[1], device=reasoner.device) < lengths[:, None]

    @classmethod
    def of_answers(cls, reasoner: LatentReasoner, output: LoopOutput, requests: Sequence[Request]) -> Self:
        """Reads what each row's loop left; rows without a loop get a stand-in and are not to be asked."""
        memories = [
            reasoner.workspace.memory(states, kept) if kept else states[0]
            for states, kept in zip(output.states, output.kept_iterations, strict=True)
        ]
        return cls(reasoner, memories, [request.answer_prefix_ids for request in requests])

    def first(self, active: Tensor) -> Tensor:
        """After the prefix, or at the decoder's start."""
        return self.next([[] for _ in self.prefixes], active)

    def next(self, tokens: list[list[int]], active: Tensor) -> Tensor:
        """After each row's prefix and tokens."""
        texts = [(*prefix, *row) for prefix, row in zip(self.prefixes, tokens, strict=True)]
        ids, present = pad(texts, self.memory.device)
        logits = self.reasoner.decode_latent(self.memory, self.present, ids)
        return logits[torch.arange(len(logits), device=logits.device), present.sum(-1)]


def write(answers: Sequence[DecodeState], writer: Writer, mine: Sequence[bool]) -> None:
    """Write the answers of the rows that are ``mine`` to their ends."""
    logits: Tensor | None = None
    while True:
        active = [own and answer.finished is None for own, answer in zip(mine, answers, strict=True)]
        if not any(active):
            return
        now = torch.tensor(active, device=answers[0].device)
        logits = writer.first(now) if logits is None else writer.next([answer.tokens for answer in answers], now)
        for row, answer in enumerate(answers):
            if active[row]:
                answer.take(logits[row])


def decode_thoughts(
    reasoner: LatentReasoner, states: Sequence[Tensor], wanted: Sequence[bool]
) -> list[list[str | None]]:
    """What the latent decoder says of each iteration's states.

    Args:
        reasoner: with or without a latent decoder.
        states: h_0 ... h_t ``[t + 1, W, d]`` of each row.
        wanted: whose.

    Returns:
        One text an iteration and row; ``None`` where nobody asked or can say.
    """
    latent = reasoner.config.loop.decoder.latent_decoder
    said: list[list[str | None]] = [[None] * (len(row) - 1) for row in states]
    if latent is None:
        return said
    # A state that is not finite has nothing to say, and would spoil the batch.
    places = [
        (row, t)
        for row, asked in enumerate(wanted)
        for t in range(len(states[row]) - 1)
        if asked and states[row][t + 1].isfinite().all()
    ]
    if not places:
        return said
    writer = LatentWriter(reasoner, [states[row][t + 1] for row, t in places])
    ends = reasoner.end_tokens
    tokens: list[list[int]] = [[] for _ in places]
    everyone = torch.ones(len(places), dtype=torch.bool, device=reasoner.device)
    for _ in range(latent.max_thought_tokens):
        chosen = writer.next(tokens, everyone).argmax(-1).tolist()
        # A finished thought is written on with the batch, and cut below.
        tokens = [[*row, token] for row, token in zip(tokens, chosen, strict=True)]
        if all(ends.intersection(row) for row in tokens):
            break
    for (row, t), ids in zip(places, tokens, strict=True):
        end = next((at for at, token in enumerate(ids) if token in ends), len(ids))
        said[row][t] = str(reasoner.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
    return said

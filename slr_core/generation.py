"""From prompts to answers with the reference: render, encode, loop, decode; one batch at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slr_core.diagnostics import IterationRecord, Stability
from slr_core.errors import RequestError
from slr_core.loop.convergence import ExitReason, LoopSettings
from slr_core.model import LatentReasoner, LoopOutput
from slr_core.sampling import SamplingSettings, choose

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One prompt, ready to run: tokenized, every setting resolved. Made by :func:`prepare`."""

    prompt_ids: tuple[int, ...]
    loop: LoopSettings
    max_new_tokens: int
    sampling: SamplingSettings
    stop: tuple[str, ...]
    trace: bool
    top_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds. ``loop_s`` ends when the request leaves the loop; waiting for its batch counts as decoding."""

    queue_s: float
    prefill_s: float
    loop_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True)
class Result:
    """What became of a request.

    ``final_change`` is the relative change of the last iteration; ``forward_passes`` what the request
    alone would have cost. The head's measures in ``records`` are complete for a traced request alone.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    iterations: int
    exit_reason: ExitReason
    final_change: float | None
    prompt_tokens: int
    forward_passes: int
    timings: Timings
    records: tuple[IterationRecord, ...]
    stability: Stability

    @property
    def completion_tokens(self) -> int:
        """Tokens written, the end token included."""
        return len(self.token_ids)


def prepare(
    reasoner: LatentReasoner,
    prompt: str,
    loop: LoopSettings,
    *,
    max_new_tokens: int | None = None,
    sampling: SamplingSettings | None = None,
    stop: Sequence[str] = (),
    trace: bool = False,
    top_tokens: int = 0,
) -> Request:
    """Apply the checkpoint's text settings and check that the request fits the model.

    Raises:
        RequestError: a setting is out of range, the prompt is empty, or prompt, loop and answer together
            exceed the model's positions.
    """
    text = reasoner.config.text
    if max_new_tokens is not None and max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1, got {max_new_tokens}", param="max_new_tokens")
    if "" in stop:
        raise RequestError("stop must not hold an empty string", param="stop")
    if not prompt.strip():
        raise RequestError("prompt must not be empty", param="prompt")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"prompt is not valid Unicode: {error.reason}", param="prompt") from error
    ids = reasoner.tokenizer(text.prompt_prefix + prompt + text.prompt_suffix).input_ids
    if not ids:
        raise RequestError("prompt holds no tokens of this model", param="prompt")
    limit = reasoner.max_positions
    most = text.max_new_tokens if max_new_tokens is None else max_new_tokens
    if len(ids) + loop.max_iterations + 1 > limit:
        raise RequestError(
            f"prompt has {len(ids)} tokens; with {loop.max_iterations} iterations and an answer at most "
            f"{max(0, limit - loop.max_iterations - 1)} fit this model",
            param="prompt",
        )
    if len(ids) + loop.max_iterations + most > limit:
        if max_new_tokens is not None:
            raise RequestError(
                f"max_new_tokens must be at most {limit - len(ids) - loop.max_iterations} with this prompt of "
                f"{len(ids)} tokens and {loop.max_iterations} iterations, got {most}",
                param="max_new_tokens",
            )
        most = limit - len(ids) - loop.max_iterations
    return Request(
        prompt_ids=tuple(ids),
        loop=loop,
        max_new_tokens=most,
        sampling=sampling or SamplingSettings(),
        stop=(*text.stop, *stop),
        trace=trace,
        top_tokens=top_tokens,
    )


class _Answer:
    """A row while its answer is written."""

    def __init__(self, reasoner: LatentReasoner, request: Request) -> None:
        self.tokenizer, self.request = reasoner.tokenizer, request
        self.end_tokens = reasoner.end_tokens
        self.generator = request.sampling.generator()
        self.tokens: list[int] = []
        self.text = ""
        self.finished: FinishReason | None = None
        self.ended_at = 0.0

    def take(self, logits: Tensor) -> None:
        """Choose the next token from logits ``[V]`` and see whether the answer ends with it."""
        token = choose(logits, self.request.sampling, self.generator)
        self.tokens.append(token)
        self.text = str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        cuts = [at for stop in self.request.stop if (at := self.text.find(stop)) >= 0]
        if cuts:
            self.text = self.text[: min(cuts)]
        if cuts or token in self.end_tokens:
            self.end("stop")
        elif len(self.tokens) >= self.request.max_new_tokens:
            self.end("length")

    def end(self, reason: FinishReason) -> None:
        self.finished, self.ended_at = reason, time.perf_counter()


@torch.inference_mode()
def generate(
    reasoner: LatentReasoner, requests: Sequence[Request], *, queued_s: Sequence[float] | None = None
) -> list[Result]:
    """Run a batch to its end: each row gets the iterations and the tokens that it would get alone.

    Args:
        reasoner: in eval mode.
        requests: any mix of settings.
        queued_s: seconds that each request waited before, for its timings.
    """
    started = time.perf_counter()
    ids = [torch.tensor(request.prompt_ids) for request in requests]
    padded = pad_sequence(ids, batch_first=True).to(reasoner.device)
    lengths = torch.tensor([len(x) for x in ids], device=reasoner.device)
    context = reasoner.encode(padded, torch.arange(padded.shape[1], device=reasoner.device) < lengths[:, None])
    prefill_s = time.perf_counter() - started
    looped = reasoner.loop(
        context,
        [request.loop for request in requests],
        top_tokens=max(request.top_tokens for request in requests),
        read_head=any(request.trace for request in requests),
    )
    answers = _decode(reasoner, looped, requests)
    return [
        _result(request, looped, i, answer, prefill_s, started, queued_s[i] if queued_s else 0.0)
        for i, (request, answer) in enumerate(zip(requests, answers, strict=True))
    ]


def _decode(reasoner: LatentReasoner, output: LoopOutput, requests: Sequence[Request]) -> list[_Answer]:
    answers = [_Answer(reasoner, request) for request in requests]
    context, looped = output.context, torch.tensor(output.kept, device=reasoner.device) > 0
    logits = reasoner.head(context.hidden)
    while True:
        for row, answer in enumerate(answers):
            if answer.finished is None:
                answer.take(logits[row])
        active = torch.tensor([answer.finished is None for answer in answers], device=reasoner.device)
        if not active.any():
            return answers
        tokens = torch.tensor([answer.tokens[-1:] for answer in answers], device=reasoner.device)
        logits = reasoner.answer(context, tokens, active[:, None], looped)[:, 0]


def _result(
    request: Request, looped: LoopOutput, row: int, answer: _Answer, prefill_s: float, started: float, queue_s: float
) -> Result:
    loop_s = looped.durations_s[row]
    own_s = answer.ended_at - started
    return Result(
        text=answer.text,
        token_ids=tuple(answer.tokens),
        finish_reason=answer.finished or "length",
        iterations=looped.iterations[row],
        exit_reason=looped.exit_reasons[row],
        final_change=looped.records[row][-1].relative_change if looped.records[row] else None,
        prompt_tokens=len(request.prompt_ids),
        forward_passes=1 + looped.iterations[row] + len(answer.tokens) - 1,
        timings=Timings(queue_s, prefill_s, loop_s, own_s - prefill_s - loop_s, queue_s + own_s),
        # A batch reads as many tokens as its most curious row.
        records=tuple(replace(r, top_tokens=r.top_tokens[: request.top_tokens]) for r in looped.records[row]),
        stability=looped.stability[row],
    )

"""From prompts to answers with the reference: render, encode, loop, decode; one batch at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from slr_core.generation.decoding import DecodeState, LatentWriter, LMHead, decode_thoughts, pad, write
from slr_core.generation.logprobs import score
from slr_core.model.context import Context, LoopOutput
from slr_core.model.reasoner import LatentReasoner
from slr_core.params import ResolvedLoopParams
from slr_core.types import Request, Result, Timings, TokenScore

Think = Callable[[Context, Sequence[ResolvedLoopParams]], LoopOutput]
"""From an encoded batch to its finished loops."""


@torch.inference_mode()
def generate(
    reasoner: LatentReasoner,
    requests: Sequence[Request],
    *,
    queued_s: Sequence[float] | None = None,
    run_loop: Think | None = None,
) -> list[Result]:
    """Run a batch to its end: each row gets the iterations and the tokens that it would get alone.

    Args:
        reasoner: in eval mode.
        requests: any mix of settings.
        queued_s: seconds that each request waited before, for its timings.
        think: runs the loop in place of :meth:`LatentReasoner.loop`, for experiments that interfere with it.
    """
    started = time.perf_counter()
    ids, present = pad([request.prompt_ids for request in requests], reasoner.device)
    context = reasoner.encode(ids, present)
    prefill_s = time.perf_counter() - started
    top_tokens, traced = max(request.top_tokens for request in requests), any(request.trace for request in requests)
    run_loop = run_loop or partial(reasoner.loop, top_tokens=top_tokens, read_head=traced)
    looped = run_loop(context, [request.loop for request in requests])
    answers = [DecodeState(reasoner, request) for request in requests]
    by_decoder = [reasoner.answers_from_states and kept > 0 for kept in looped.kept_iterations]
    write(answers, LMHead(reasoner, looped, requests), [not by for by in by_decoder])
    write(answers, LatentWriter.of_answers(reasoner, looped, requests), by_decoder)
    scored = [_prompt_scores(reasoner, request) for request in requests]
    thoughts = decode_thoughts(reasoner, looped.states, [request.trace for request in requests])
    results = [
        _result(
            reasoner, looped, i, request, answers[i], thoughts[i], prefill_s, started, queued_s[i] if queued_s else 0.0
        )
        for i, request in enumerate(requests)
    ]
    return [replace(result, prompt_scores=scores) for result, scores in zip(results, scored, strict=True)]


def _prompt_scores(reasoner: LatentReasoner, request: Request) -> tuple[TokenScore, ...]:
    if not request.score_prompt:
        return ()
    ids = torch.tensor([request.prompt_ids], device=reasoner.device)
    with reasoner.adapters.use(None):
        logits = reasoner.base(input_ids=ids, use_cache=False).logits[0, :-1]
    return (
        TokenScore(request.prompt_ids[0], None),
        *score(logits, request.prompt_ids[1:], request.logprobs or 0),
    )


def _result(
    reasoner: LatentReasoner,
    looped: LoopOutput,
    row: int,
    request: Request,
    answer: DecodeState,
    thoughts: list[str | None],
    prefill_s: float,
    started: float,
    queue_s: float,
) -> Result:
    loop_s = looped.durations_s[row]
    own_s = answer.ended_at - started
    records = looped.records[row]
    return Result(
        text=answer.text,
        token_ids=tuple(answer.tokens),
        finish_reason=answer.finished or "length",
        iterations=looped.iterations[row],
        exit_reason=looped.exit_reasons[row],
        final_change=records[-1].relative_change if records else None,
        prompt_tokens=len(request.prompt_ids),
        forward_passes=passes(
            reasoner, request, looped.iterations[row], looped.kept_iterations[row], len(answer.tokens)
        ),
        timings=Timings(queue_s, prefill_s, loop_s, own_s - prefill_s - loop_s, queue_s + own_s),
        first_token_s=queue_s + answer.began_at - started,
        # A batch reads as many tokens as its most curious row.
        records=tuple(
            replace(record, top_tokens=record.top_tokens[: request.top_tokens], thought=thought)
            for record, thought in zip(records, thoughts, strict=True)
        ),
        stability=looped.stability[row],
        states=looped.states[row].float().cpu() if request.include_states else None,
        scores=tuple(answer.scores),
    )


def passes(reasoner: LatentReasoner, request: Request, iterations: int, kept: int, tokens: int) -> int:
    """Passes of the base model that a request alone takes; those of the latent decoder's few layers do not count."""
    passes = reasoner.workspace.passes(iterations) + (request.score_prompt and not reasoner.workspace.prefills)
    if reasoner.answers_from_states and kept:
        return passes
    return passes + reasoner.workspace.closing_passes(kept) + bool(request.answer_prefix_ids) + tokens - 1

"""From requests to results with the reference: encode, loop, decode; one batch at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from slr_core.generation.decoding import (
    DecodeState,
    LatentTextDecoder,
    LMHeadDecoder,
    TokenLoop,
    TokenLoopDecoder,
    count_token_passes,
    decode_answers,
    decode_thoughts,
    pad_ids,
)
from slr_core.generation.logprobs import score
from slr_core.loop.context import Context
from slr_core.loop.lora import DECODE
from slr_core.model.exits import LoopOutput, loop_until_exit
from slr_core.model.looped import LoopedModel
from slr_core.params import ResolvedLoopParams
from slr_core.types import Request, Result, Timings, TokenScore, combine_exit_reasons

RunLoop = Callable[[Context, Sequence[ResolvedLoopParams]], LoopOutput]
"""From an encoded batch to its finished loops."""


@torch.inference_mode()
def generate(reasoner: LoopedModel, requests: Sequence[Request], *, run_loop: RunLoop | None = None) -> list[Result]:
    """Run a batch to its end: each row gets the iterations and the tokens that it would get alone.

    Args:
        reasoner: in eval mode.
        requests: any mix of settings.
        run_loop: replaces :func:`loop_until_exit`, for experiments that change the loop.
    """
    started = time.perf_counter()
    ids, present = pad_ids([request.prompt_ids for request in requests], reasoner.device)
    context = reasoner.encode(ids, present)
    prefill_s = time.perf_counter() - started
    top_tokens, traced = max(request.top_tokens for request in requests), any(request.trace for request in requests)
    run_loop = run_loop or partial(loop_until_exit, reasoner, top_tokens=top_tokens, read_head=traced)
    output = run_loop(context, [request.loop for request in requests])
    answers = [DecodeState(reasoner, request) for request in requests]
    from_states = [reasoner.answers_from_states and kept > 0 for kept in output.kept_iterations]
    token_loops = TokenLoopDecoder(reasoner, output, requests) if reasoner.workspace.per_token else None
    head_decoder = token_loops or LMHeadDecoder(reasoner, output, requests)
    decode_answers(answers, head_decoder, [not latent for latent in from_states])
    decode_answers(answers, LatentTextDecoder.for_answers(reasoner, output, requests), from_states)
    prompt_scores = [_score_prompt(reasoner, request) for request in requests]
    thoughts = decode_thoughts(reasoner, output.states, [request.trace for request in requests])
    results = [
        _result(reasoner, output, i, request, answers[i], thoughts[i], prefill_s, started)
        for i, request in enumerate(requests)
    ]
    results = [replace(result, prompt_scores=scores) for result, scores in zip(results, prompt_scores, strict=True)]
    if token_loops is None:
        return results
    return [
        with_token_loops(reasoner, *row)
        for row in zip(results, requests, token_loops.loops, token_loops.depths, strict=True)
    ]


def _score_prompt(reasoner: LoopedModel, request: Request) -> tuple[TokenScore, ...]:
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
    reasoner: LoopedModel,
    output: LoopOutput,
    row: int,
    request: Request,
    answer: DecodeState,
    thoughts: list[str | None],
    prefill_s: float,
    started: float,
) -> Result:
    loop_s, total_s = output.durations_s[row], answer.finished_at - started
    records = output.records[row]
    return Result(
        text=answer.text,
        token_ids=tuple(answer.tokens),
        finish_reason=answer.finish_reason or "length",
        iterations=output.iterations[row],
        exit_reason=output.exit_reasons[row],
        final_change=records[-1].relative_change if records else None,
        prompt_tokens=len(request.prompt_ids) + len(request.forced_ids),
        forward_passes=count_passes(
            reasoner, request, output.iterations[row], output.kept_iterations[row], len(answer.tokens)
        ),
        timings=Timings(0.0, prefill_s, loop_s, total_s - prefill_s - loop_s, total_s),
        first_token_s=answer.first_token_at - started,
        # The loop records as many top tokens for every row as the row with the most asks for.
        records=tuple(
            replace(record, top_tokens=record.top_tokens[: request.top_tokens], thought=thought)
            for record, thought in zip(records, thoughts, strict=True)
        ),
        stability=output.stability[row],
        states=output.states[row].float().cpu() if request.include_states else None,
        scores=tuple(answer.scores),
        forced_tokens=len(request.forced_ids),
    )


def prefix_joins_loop(reasoner: LoopedModel, request: Request) -> bool:
    """Whether the answer prefix can be run in the pass of the last thought.

    It must be known before that pass that it is the last one, and the same adapter must run both. The reference runs
    the prefix in a pass of its own, which gives the same answer.
    """
    loop, names = request.loop, reasoner.adapters.names
    if not request.answer_prefix_ids or loop.criterion != "fixed" or loop.max_iterations == 0:
        return False
    if reasoner.config.loop.workspace != "append" or reasoner.answers_from_states:
        return False
    answering = DECODE if DECODE in names else reasoner.adapters.default
    return reasoner.adapter_name(loop.max_iterations) == answering


def with_token_loops(
    reasoner: LoopedModel, result: Result, request: Request, loops: Sequence[TokenLoop], depth: int
) -> Result:
    """Add to a result what the loops before its tokens come to, in the workspace ``token``.

    Args:
        reasoner: the model.
        result: its loop is the prompt's.
        request: the request.
        loops: the loop before each token.
        depth: iterations that each position of the answer could run; fewer than the maximum after a divergence.
    """
    reasons = [loop.exit_reason for loop in loops]
    if depth < request.loop.max_iterations:
        reasons.append("diverged")
    shared_cache = reasoner.config.loop.deeper_cache == "shared"
    return replace(
        result,
        exit_reason=combine_exit_reasons(reasons),
        forward_passes=count_token_passes(request, loops, depth, shared_cache=shared_cache),
        iterations_per_token=tuple(loop.iterations for loop in loops),
        # The reference records as many top tokens for every row as the row with the most asks for.
        records_per_token=tuple(
            tuple(replace(record, top_tokens=record.top_tokens[: request.top_tokens]) for record in loop.records)
            for loop in loops[: request.trace_tokens]
        ),
    )


def count_passes(reasoner: LoopedModel, request: Request, iterations: int, kept_iterations: int, tokens: int) -> int:
    """Forward passes of the base model that a request takes alone; those of the latent decoder do not count.

    An answer prefix that can join the last thought (:func:`prefix_joins_loop`) counts as part of its pass.

    Args:
        reasoner: the model.
        request: the request.
        iterations: iterations that its loop ran.
        kept_iterations: those that were kept; fewer after a divergence.
        tokens: tokens of its answer.
    """
    workspace = reasoner.workspace
    passes = workspace.passes(iterations) + (request.score_prompt and not workspace.prefills)
    if reasoner.answers_from_states and kept_iterations:
        return passes
    joined = kept_iterations == iterations and prefix_joins_loop(reasoner, request)
    prefix_passes = bool(request.answer_prefix_ids) and not joined
    return passes + workspace.closing_passes(kept_iterations) + prefix_passes + tokens - 1

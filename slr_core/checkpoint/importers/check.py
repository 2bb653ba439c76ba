"""The check at the end of an import: the folder answers, and answers as the peer's own code did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slr_core.checkpoint.importers.peer import LoopStates, Recorded
from slr_core.checkpoint.validate import checkpoint_error, read_json, read_tensors
from slr_core.errors import RequestError
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.model.looped import LoopedModel
from slr_core.types import Result

PROMPT = "What is 2 plus 3?"
"""The question of the check's greedy answer."""
TOLERANCE = 2e-3
"""Largest difference of a thought or a logit: recorded in fp32 after loops that amplify rounding."""


@dataclass(frozen=True)
class Comparison:
    """Answers beside a peer's recorded ones.

    Attributes:
        cases: number of recorded cases.
        equal_prompts: cases with the recorded prompt ids.
        equal_answers: cases with the recorded answer ids.
        thoughts: largest difference of a thought; ``None`` if none were recorded.
        logits: largest difference of a logit of the first token; ``None`` if none were recorded.
        first_difference: what differs in the first case that does; ``None`` if all are equal.
    """

    cases: int
    equal_prompts: int
    equal_answers: int
    thoughts: float | None
    logits: float | None
    first_difference: str | None


@dataclass(frozen=True)
class SelfCheck:
    """What an imported folder does.

    Attributes:
        markers: ids of the marker tokens.
        latents: thoughts of a chain, or latent positions of a block.
        iterations: iterations of every answer.
        prompt_ids: ids of :data:`PROMPT` with the folder's texts.
        answer: the greedy answer to it.
        answer_ids: its ids.
        forward_passes: forward passes of that answer alone.
        comparison: with a peer's recorded answers; ``None`` if none were given.
    """

    markers: dict[str, int]
    latents: int
    iterations: int
    prompt_ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    forward_passes: int
    comparison: Comparison | None = None


def run_self_check(
    reasoner: LoopedModel, markers: dict[str, int], recorded: Recorded, expect: Path | None
) -> SelfCheck:
    """Answer one question, and those of ``expect``.

    Args:
        reasoner: the imported folder, loaded.
        markers: ids that the marker tokens must have.
        recorded: the peer's; see there.
        expect: a peer's recorded output, a JSON file with ``cases``; ``None``: no comparison.

    Raises:
        CheckpointError: the tokenizer has other ids, the loop does not run its length, or a recorded answer is not
            reproduced.
    """
    where, loop = "the imported folder", reasoner.config.loop
    for token, expected in markers.items():
        found = reasoner.tokenizer.convert_tokens_to_ids(token)
        if found != expected:
            raise checkpoint_error(where, f"the written tokenizer has {token} at id {found}, expected {expected}")
    try:
        (result,) = _answer(reasoner, [PROMPT], 16)
    except RequestError as error:
        raise checkpoint_error(where, f"it cannot answer a question ({error})") from error
    if loop.convergence.criterion == "fixed" and result.iterations != loop.max_iterations:
        raise checkpoint_error(
            where, f"its loop ended after {result.iterations} of {loop.max_iterations} iterations: {result.exit_reason}"
        )
    comparison = None if expect is None else _compare(reasoner, recorded, expect)
    return SelfCheck(
        markers=markers,
        latents=loop.block_size if loop.workspace == "block" else loop.max_iterations,
        iterations=loop.max_iterations,
        prompt_ids=_prompt_ids(result),
        answer=result.text,
        answer_ids=result.token_ids,
        forward_passes=result.forward_passes,
        comparison=comparison,
    )


def _answer(reasoner: LoopedModel, prompts: list[str], max_new_tokens: int) -> list[Result]:
    # Scored prompts come back with their ids.
    requests = [
        prepare(reasoner, prompt, max_new_tokens=max_new_tokens, score_prompt=True, logprobs=0) for prompt in prompts
    ]
    return generate(reasoner, requests)


def _prompt_ids(result: Result) -> tuple[int, ...]:
    return tuple(score.token_id for score in result.prompt_scores)


@torch.inference_mode()
def run_loop(reasoner: LoopedModel, prompt_ids: Sequence[int]) -> LoopStates:
    """The states of a prompt's loop, one iteration past its end."""
    ids = torch.tensor([prompt_ids], device=reasoner.device)
    context = reasoner.encode(ids, torch.ones_like(ids))
    (states,) = reasoner.unroll(context, reasoner.config.loop.max_iterations + 1)
    states, _ = reasoner.workspace.measured(states, None)
    return LoopStates(states, context.state[0])


@torch.inference_mode()
def first_logits(reasoner: LoopedModel, prompt_ids: Sequence[int]) -> Tensor:
    """Logits ``[V]`` of the first token of the answer to a prompt."""
    prefix = reasoner.config.text.answer_prefix
    prefix_ids = reasoner.tokenizer(prefix, add_special_tokens=False).input_ids if prefix else []
    answer = torch.tensor([[*prefix_ids, 0]], device=reasoner.device)
    logits = reasoner(torch.tensor([prompt_ids], device=reasoner.device), labels=answer).logits
    assert isinstance(logits, Tensor)
    return logits[0, -1]


def _compare(reasoner: LoopedModel, recorded: Recorded, expect: Path) -> Comparison:
    data = read_json(expect)
    cases: list[dict[str, Any]] = data.get("cases", []) if isinstance(data, dict) else []
    if not cases or not all({"prompt", "prompt_ids", "tokens"} <= set(case) for case in cases):
        raise checkpoint_error(expect, "not a peer's recorded output: it has no cases with prompt, prompt_ids, tokens")
    beside = expect.parent / "thoughts.safetensors"
    thoughts = read_tensors(beside) if beside.is_file() else {}
    count = int(data.get("new_tokens", max(len(case["tokens"]) for case in cases)))
    try:
        results = _answer(reasoner, [case["prompt"] for case in cases], count)
    except RequestError as error:
        raise checkpoint_error(expect, f"a recorded prompt cannot be answered ({error})") from error
    end = reasoner.tokenizer.eos_token_id
    prompts = answers = 0
    first, thought_differences, logit_differences = None, [], []
    for number, (case, result) in enumerate(zip(cases, results, strict=True)):
        same_prompt = list(_prompt_ids(result)) == case["prompt_ids"]
        # Some peers keep the end token in an answer and some drop it.
        ours, theirs = _without_end(list(result.token_ids), end), _without_end(case["tokens"], end)
        prompts, answers = prompts + same_prompt, answers + (ours == theirs)
        prompt_ids = _prompt_ids(result)
        for key, state in recorded(reasoner, run_loop(reasoner, prompt_ids)).items() if thoughts else ():
            wanted = thoughts.get(f"{number}{key}")
            if wanted is not None:
                thought_differences.append(_difference(state, wanted))
        if top := case.get("first_logits_top5"):
            logit_differences.append(_difference_of_logits(first_logits(reasoner, prompt_ids), top, expect))
        if first is None and not same_prompt:
            first = f"case {number}: prompt ids {_prompt_ids(result)}, recorded {tuple(case['prompt_ids'])}"
        elif first is None and ours != theirs:
            first = f"case {number}: answer ids {ours}, recorded {theirs}"
    thought, logit = (max(found, default=None) for found in (thought_differences, logit_differences))
    for what, difference in (("thought", thought), ("logit of a first token", logit)):
        if difference is not None and first is None and not difference <= TOLERANCE:
            first = f"a {what} differs by {difference:.2g}, at most {TOLERANCE:g} is rounding"
    if first is not None:
        raise checkpoint_error(
            expect, f"not reproduced: {answers} of {len(cases)} answers are equal, {prompts} prompts; {first}"
        )
    return Comparison(len(cases), prompts, answers, thought, logit, first)


def _difference(state: Tensor, wanted: Tensor) -> float:
    """Largest difference; infinite where the shapes say that N is another."""
    return float((state.double() - wanted.double()).abs().max()) if state.shape == wanted.shape else float("inf")


def _difference_of_logits(logits: Tensor, recorded: Any, expect: Path) -> float:
    try:
        return max(abs(float(logits[int(token)]) - float(logit)) for token, logit in recorded)
    except (TypeError, ValueError, IndexError) as error:
        raise checkpoint_error(expect, "first_logits_top5 must be pairs of a token id and its logit") from error


def _without_end(ids: list[int], end: int | None) -> list[int]:
    return ids[:-1] if ids and ids[-1] == end else ids


def widest_exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a folder of this dtype is compared: half precision is too coarse for that."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

"""The methods that are compared: the loop, its controls, and what models do without one.

A method is a name, the weights it needs, and a function from prompts to answers. ``weights`` names a
checkpoint trained for it (``no_thought`` is the same recipe without its loop); ``None`` is the model under test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slr_core.errors import ConfigError
from slr_core.evaluation.backends import Backend, GenerationOptions, Local
from slr_core.evaluation.interventions import (
    add_noise,
    randomize_thoughts,
    replace_states,
    shuffle_thoughts,
    swap_thoughts,
)
from slr_core.evaluation.outcomes import MethodAnswer
from slr_core.generation.decoding import pad_ids
from slr_core.generation.reference import RunLoop
from slr_core.model.reasoner import LatentReasoner
from slr_core.tasks.base import Task


@dataclass(frozen=True)
class MethodSettings:
    """What the methods have in common.

    Attributes:
        loop: changes of the loop's settings, for the methods that loop.
        cot_tokens: most tokens of a chain of thought.
        samples: rollouts of the methods that vote or choose.
        temperature: of their sampling.
        beams: of the beam search.
        noise: standard deviation of latent noise, as a share of a state's RMS.
        seed: of everything random.
    """

    loop: dict[str, Any]
    cot_tokens: int = 256
    samples: int = 5
    temperature: float = 0.7
    beams: int = 4
    noise: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Questions that are answered together.

    Attributes:
        backend: with the weights of the method.
        task: knows what counts of an answer.
        prompts: as the task puts them.
        seeds: one a question, far enough apart for every sample.
        settings: of the comparison.
        before: the prompt before the first one in the whole set, before its first the last; ``None`` where there is
            no other.
    """

    backend: Backend
    task: Task
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: MethodSettings
    before: str | None = None

    def local(self, method: str) -> Local:
        """The backend, where the method reaches into the model."""
        if not isinstance(self.backend, Local):
            raise ConfigError(f"{method} needs the model in this process, not a server")
        return self.backend


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: on the command line and in every table.
        help: what it does, in a line.
        run: answers a batch.
        weights: name of the checkpoint that it needs besides the model under test; ``None``: none.
        remote: whether a server can run it.
        control: whether it is there to be compared against, not to win.
    """

    name: str
    help: str
    run: Callable[[Batch], list[MethodAnswer]]
    weights: str | None = None
    remote: bool = True
    control: bool = False


def _loop(**changes: Any) -> Callable[[Batch], list[MethodAnswer]]:
    def run(batch: Batch) -> list[MethodAnswer]:
        ask = GenerationOptions({**batch.settings.loop, **changes})
        return [answers[0] for answers in batch.backend.answer(batch.prompts, ask, batch.seeds)]

    return run


def _plain(batch: Batch) -> list[MethodAnswer]:
    answers = batch.backend.answer(batch.prompts, GenerationOptions({"max_iterations": 0}), batch.seeds)
    return [own[0] for own in answers]


def _cot(batch: Batch) -> list[MethodAnswer]:
    ask = GenerationOptions({"max_iterations": 0}, max_new_tokens=batch.settings.cot_tokens)
    return [answers[0] for answers in batch.backend.answer(batch.prompts, ask, batch.seeds)]


def _self_consistency(batch: Batch) -> list[MethodAnswer]:
    s = batch.settings
    ask = GenerationOptions({"max_iterations": 0}, s.cot_tokens, s.temperature, s.samples)
    return [_vote(batch.task, answers) for answers in batch.backend.answer(batch.prompts, ask, batch.seeds)]


def _vote(task: Task, answers: Sequence[MethodAnswer]) -> MethodAnswer:
    """The text whose answer most rollouts share; of equals, the first."""
    votes = Counter(answer for text in answers if (answer := task.extract(text.text)) is not None)
    if not votes:
        return MethodAnswer.combine(answers[0].text, answers)
    winner = votes.most_common(1)[0][0]
    return MethodAnswer.combine(next(a.text for a in answers if task.extract(a.text) == winner), answers)


def _slr_vote(batch: Batch) -> list[MethodAnswer]:
    s, local = batch.settings, batch.local("slr_vote")
    rollouts = []
    for sample in range(s.samples):
        run_loop = add_noise(local.reasoner, s.noise, [seed + sample for seed in batch.seeds])
        answers = local.answer(batch.prompts, GenerationOptions(s.loop), batch.seeds, run_loop)
        rollouts.append([own[0] for own in answers])
    return [_vote(batch.task, own) for own in zip(*rollouts, strict=True)]


def _noisy_start(batch: Batch) -> list[MethodAnswer]:
    local = batch.local("noise in h_0")
    run_loop = add_noise(local.reasoner, batch.settings.noise, batch.seeds, start_only=True)
    return [
        own[0] for own in local.answer(batch.prompts, GenerationOptions(batch.settings.loop), batch.seeds, run_loop)
    ]


def _replaced(run_loop: Callable[[LatentReasoner, Sequence[int]], RunLoop]) -> Callable[[Batch], list[MethodAnswer]]:
    def run(batch: Batch) -> list[MethodAnswer]:
        local = batch.local("replacing thoughts")
        answers = local.answer(
            batch.prompts, GenerationOptions(batch.settings.loop), batch.seeds, run_loop(local.reasoner, batch.seeds)
        )
        return [own[0] for own in answers]

    return run


def _foreign(batch: Batch) -> list[MethodAnswer]:
    local = batch.local("replacing thoughts")
    if batch.before is None:
        raise ConfigError("thoughts of another question need another question")
    # The question before comes along to lend its thoughts: whose thoughts a question gets is no matter of the batch.
    prompts, seeds = [batch.before, *batch.prompts], [0, *batch.seeds]
    answers = local.answer(
        prompts, GenerationOptions(batch.settings.loop), seeds, replace_states(local.reasoner, swap_thoughts)
    )
    return [own[0] for own in answers[1:]]


def _beam(batch: Batch) -> list[MethodAnswer]:
    s = batch.settings
    return _search(batch, s.cot_tokens, num_beams=s.beams, do_sample=False)


def _best_of_n(batch: Batch) -> list[MethodAnswer]:
    s = batch.settings
    sampling = {"do_sample": True, "temperature": s.temperature, "num_return_sequences": s.samples}
    return _search(batch, s.cot_tokens, **sampling)


_UNTOUCHED: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""Against what a base's generation config, or transformers itself (top_k 50), would put in: as our own sampling."""


@torch.inference_mode()
def _search(batch: Batch, max_new_tokens: int, **options: Any) -> list[MethodAnswer]:
    """Texts by ``transformers``' own search over the plain base; of several, the likeliest per token."""
    local = batch.local("beam search")
    reasoner = local.reasoner
    answered = []
    for prompt, seed in zip(batch.prompts, batch.seeds, strict=True):
        # Sampling draws from torch's global generator, so one prompt at a time: its batch must not matter.
        torch.manual_seed(seed)
        request = local.request(prompt, GenerationOptions({"max_iterations": 0}, max_new_tokens), seed)
        ids = [*request.prompt_ids, *request.answer_prefix_ids]
        padded, present = pad_ids([ids], reasoner.device)
        base: Any = reasoner.base
        output = base.generate(
            padded,
            attention_mask=present.long(),
            max_new_tokens=request.max_new_tokens,
            eos_token_id=sorted(reasoner.end_tokens) or None,
            pad_token_id=reasoner.tokenizer.pad_token_id or 0,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
            **_UNTOUCHED,
            **options,
        )
        texts = [str(reasoner.tokenizer.decode(row[len(ids) :], skip_special_tokens=True)) for row in output.sequences]
        best = int(_mean_log_probability(reasoner, output, len(ids)).argmax())
        steps = len(output.scores)
        width = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
        answered.append(
            MethodAnswer(
                text=_cut(texts[best], request.stop),
                prompt_tokens=len(request.prompt_ids),
                tokens=steps * width,
                forward_passes=1 + (steps - 1) * width,
                flops=local.cost.request(len(request.prompt_ids), 0, steps) * width,
                added_parameters=0,
            )
        )
    return answered


def _cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for end in stop if (at := text.find(end)) >= 0), default=len(text))]


def _mean_log_probability(reasoner: LatentReasoner, output: Any, start: int) -> torch.Tensor:
    scores = getattr(output, "sequences_scores", None)
    if scores is not None:
        return torch.as_tensor(scores)
    written = output.sequences[:, start:]
    logits = torch.stack(output.logits, dim=1).float().log_softmax(-1)
    chosen = logits.gather(-1, written[..., None])[..., 0]
    ends = torch.isin(written, torch.tensor(sorted(reasoner.end_tokens), device=written.device, dtype=written.dtype))
    counts = (ends.long().cumsum(-1) - ends.long()) == 0  # up to and with the first end token
    return (chosen * counts).sum(-1) / counts.sum(-1)


_ALL = (
    Method("no_cot", "the model's base answers at once", _plain, control=True),
    Method("cot", "a chain of thought in words, then the answer", _cot, weights="cot"),
    Method("self_consistency", "several sampled chains of thought, the majority's answer", _self_consistency, "cot"),
    Method("beam", "a chain of thought by beam search", _beam, "cot", remote=False),
    Method("best_of_n", "several sampled chains of thought, the likeliest", _best_of_n, "cot", remote=False),
    Method("pause", "pause tokens before the answer, trained so", _loop(), "pause"),
    Method("slr", "the latent loop, which stops by itself", _loop()),
    Method("slr_fixed", "the latent loop, always to its last iteration", _loop(criterion="fixed")),
    Method("slr_vote", "several loops with noise in their states, the majority's answer", _slr_vote, remote=False),
    Method("no_thought", "trained alike without the loop", _plain, "no_thought", control=True),
    Method(
        "pause_as_thought", "trained alike, every thought a learned vector", _loop(), "pause_as_thought", control=True
    ),
    Method("multipass_pause", "the same, one pass a thought", _loop(), "multipass_pause", control=True),
    Method(
        "shuffled_thoughts",
        "the loop's own thoughts in another order",
        _replaced(lambda reasoner, seeds: replace_states(reasoner, shuffle_thoughts(seeds))),
        remote=False,
        control=True,
    ),
    Method(
        "noised_thoughts",
        "noise of the same length in place of the thoughts",
        _replaced(lambda reasoner, seeds: replace_states(reasoner, randomize_thoughts(seeds))),
        remote=False,
        control=True,
    ),
    Method(
        "foreign_thoughts",
        "the thoughts of the question before",
        _foreign,
        remote=False,
        control=True,
    ),
)
METHODS = {method.name: method for method in _ALL}
NOISY_START = Method("noisy_start", "the latent loop from a disturbed h_0", _noisy_start, remote=False)
"""Not compared: its noise is what varies, in :mod:`slr_core.evaluation.stability`."""


def get_method(name: str) -> Method:
    """A method by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {name}")
    return METHODS[name]

"""The methods to compare: the loop, its controls, and methods without a loop.

A method is a name, the weights that it needs, and a function from prompts to answers. ``weights`` names a checkpoint
trained for the method (``no_thought``: the same recipe without its loop); ``None`` is the model under test.
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
    pause_thoughts,
    randomize_thoughts,
    replace_states,
    shuffle_thoughts,
    swap_thoughts,
    zero_thoughts,
)
from slr_core.evaluation.outcomes import MethodAnswer
from slr_core.generation.decoding import pad_ids
from slr_core.generation.reference import RunLoop
from slr_core.reasoner import LatentReasoner
from slr_core.suggest import did_you_mean
from slr_core.tasks.base import Task


@dataclass(frozen=True)
class MethodSettings:
    """The settings of all methods.

    Attributes:
        loop: fields of :class:`~slr_core.params.LoopParams`, for the methods with a loop.
        cot_tokens: maximum length of a chain of thought, in tokens.
        samples: number of samples of the methods that vote or choose.
        temperature: their sampling temperature.
        beams: number of beams of the beam search.
        noise: standard deviation of latent noise, as a share of a state's RMS.
        seed: seed of all random choices.
    """

    loop: dict[str, Any]
    cot_tokens: int = 256
    samples: int = 5
    temperature: float = 0.7
    beams: int = 4
    noise: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class BatchPrompts:
    """Prompts that are answered together.

    Attributes:
        prompts: of the questions.
        seeds: one per question, so far apart that the samples of a question can use the seeds that follow.
        before: the prompt before ``prompts[0]`` in the whole set; the last prompt if that is the first of the set;
            ``None`` if the set has one question.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    before: str | None = None

    def first(self) -> BatchPrompts:
        """The first prompt alone."""
        return BatchPrompts(self.prompts[:1], self.seeds[:1], self.before)


@dataclass(frozen=True)
class Batch:
    """Prompts that are answered together, and what answers them.

    Attributes:
        backend: holds the weights of the method.
        task: reads the answers.
        prompts: see :class:`BatchPrompts`.
        seeds: the same.
        settings: settings of all methods.
        before: see :class:`BatchPrompts`.
    """

    backend: Backend
    task: Task
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: MethodSettings
    before: str | None = None

    @classmethod
    def of(cls, prompts: BatchPrompts, backend: Backend, task: Task, settings: MethodSettings) -> Batch:
        """A batch of these prompts."""
        return cls(backend, task, prompts.prompts, prompts.seeds, settings, prompts.before)

    def local(self, method: str) -> Local:
        """The backend, if it is a model in this process.

        Raises:
            ConfigError: it is not; ``method`` names what needs one.
        """
        if not isinstance(self.backend, Local):
            raise ConfigError(f"{method} needs the model in this process, not a server")
        return self.backend


@dataclass(frozen=True)
class Method:
    """A way to answer questions: one row of a comparison.

    Attributes:
        name: on the command line and in every table.
        help: what it does, in one line.
        run: answers a batch.
        weights: name of the checkpoint that it needs instead of the model under test; ``None``: that model.
        remote: whether a server can run it.
        control: whether it is a control: a method that lacks what the loop is supposed to contribute.
    """

    name: str
    help: str
    run: Callable[[Batch], list[MethodAnswer]]
    weights: str | None = None
    remote: bool = True
    control: bool = False


def _loop(**changes: Any) -> Callable[[Batch], list[MethodAnswer]]:
    def run(batch: Batch) -> list[MethodAnswer]:
        options = GenerationOptions({**batch.settings.loop, **changes})
        return [answers[0] for answers in batch.backend.answer(batch.prompts, options, batch.seeds)]

    return run


def _plain(batch: Batch) -> list[MethodAnswer]:
    answers = batch.backend.answer(batch.prompts, GenerationOptions({"max_iterations": 0}), batch.seeds)
    return [samples[0] for samples in answers]


def _cot(batch: Batch) -> list[MethodAnswer]:
    options = GenerationOptions({"max_iterations": 0}, max_new_tokens=batch.settings.cot_tokens)
    return [answers[0] for answers in batch.backend.answer(batch.prompts, options, batch.seeds)]


def _self_consistency(batch: Batch) -> list[MethodAnswer]:
    s = batch.settings
    options = GenerationOptions({"max_iterations": 0}, s.cot_tokens, s.temperature, s.samples)
    return [_vote(batch.task, answers) for answers in batch.backend.answer(batch.prompts, options, batch.seeds)]


def _vote(task: Task, answers: Sequence[MethodAnswer]) -> MethodAnswer:
    """The first text with the most frequent answer."""
    votes = Counter(answer for text in answers if (answer := task.vote(text.text)) is not None)
    if not votes:  # no text states an answer
        return MethodAnswer.combine(answers[0].text, answers)
    winner = votes.most_common(1)[0][0]
    return MethodAnswer.combine(next(a.text for a in answers if task.vote(a.text) == winner), answers)


def _slr_vote(batch: Batch) -> list[MethodAnswer]:
    s, local = batch.settings, batch.local("slr_vote")
    rounds = []
    for sample in range(s.samples):
        run_loop = add_noise(local.reasoner, s.noise, [seed + sample for seed in batch.seeds])
        answers = local.answer(batch.prompts, GenerationOptions(s.loop), batch.seeds, run_loop)
        rounds.append([samples[0] for samples in answers])
    return [_vote(batch.task, samples) for samples in zip(*rounds, strict=True)]


def _noisy_start(batch: Batch) -> list[MethodAnswer]:
    local = batch.local("noise in h_0")
    run_loop = add_noise(local.reasoner, batch.settings.noise, batch.seeds, start_only=True)
    return [
        samples[0]
        for samples in local.answer(batch.prompts, GenerationOptions(batch.settings.loop), batch.seeds, run_loop)
    ]


def _replaced(run_loop: Callable[[LatentReasoner, Sequence[int]], RunLoop]) -> Callable[[Batch], list[MethodAnswer]]:
    def run(batch: Batch) -> list[MethodAnswer]:
        local = batch.local("replacing thoughts")
        answers = local.answer(
            batch.prompts, GenerationOptions(batch.settings.loop), batch.seeds, run_loop(local.reasoner, batch.seeds)
        )
        return [samples[0] for samples in answers]

    return run


def _foreign_thoughts(batch: Batch) -> list[MethodAnswer]:
    local = batch.local("replacing thoughts")
    if batch.before is None:
        raise ConfigError("foreign_thoughts needs at least two questions")
    # The preceding question is part of the batch, so that thoughts do not depend on where batches are cut.
    prompts, seeds = [batch.before, *batch.prompts], [0, *batch.seeds]
    answers = local.answer(
        prompts, GenerationOptions(batch.settings.loop), seeds, replace_states(local.reasoner, swap_thoughts)
    )
    return [samples[0] for samples in answers[1:]]


def _beam(batch: Batch) -> list[MethodAnswer]:
    s = batch.settings
    return _search(batch, s.cot_tokens, num_beams=s.beams, do_sample=False)


def _best_of_n(batch: Batch) -> list[MethodAnswer]:
    s = batch.settings
    sampling = {"do_sample": True, "temperature": s.temperature, "num_return_sequences": s.samples}
    return _search(batch, s.cot_tokens, **sampling)


_PLAIN_SAMPLING: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""Override defaults of the base's generation config and of transformers (top_k 50), as in the engine's sampling."""


@torch.inference_mode()
def _search(batch: Batch, max_new_tokens: int, **options: Any) -> list[MethodAnswer]:
    """Generate with the search of transformers on the base; of several texts, take the most likely one per token."""
    local = batch.local("beam search")
    reasoner = local.reasoner
    answered = []
    for prompt, seed in zip(batch.prompts, batch.seeds, strict=True):
        # One prompt at a time: sampling uses torch's global generator, and prompts must not depend on each other.
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
            suppress_tokens=list(reasoner.config.text.suppressed_token_ids) or None,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
            **_PLAIN_SAMPLING,
            **options,
        )
        texts = [str(reasoner.tokenizer.decode(row[len(ids) :], skip_special_tokens=True)) for row in output.sequences]
        best = int(_mean_log_probability(reasoner, output, len(ids)).argmax())
        steps = len(output.scores)
        width = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
        answered.append(
            MethodAnswer(
                text=_truncate(texts[best], request.stop),
                prompt_tokens=len(request.prompt_ids),
                tokens=steps * width,
                forward_passes=1 + (steps - 1) * width,
                flops=local.cost.request(len(request.prompt_ids), 0, steps) * width,
                added_parameters=0,
            )
        )
    return answered


def _truncate(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for end in stop if (at := text.find(end)) >= 0), default=len(text))]


def _mean_log_probability(reasoner: LatentReasoner, output: Any, start: int) -> torch.Tensor:
    scores = getattr(output, "sequences_scores", None)
    if scores is not None:
        return torch.as_tensor(scores)
    generated = output.sequences[:, start:]
    logits = torch.stack(output.logits, dim=1).float().log_softmax(-1)
    chosen = logits.gather(-1, generated[..., None])[..., 0]
    ends = torch.isin(
        generated, torch.tensor(sorted(reasoner.end_tokens), device=generated.device, dtype=generated.dtype)
    )
    counts = (ends.long().cumsum(-1) - ends.long()) == 0  # up to and including the first end token
    return (chosen * counts).sum(-1) / counts.sum(-1)


_ALL = (
    Method("no_cot", "the base model answers directly", _plain, control=True),
    Method("cot", "a written chain of thought, then the answer", _cot, weights="cot"),
    Method("self_consistency", "several sampled chains of thought, majority vote", _self_consistency, "cot"),
    Method("beam", "a chain of thought by beam search", _beam, "cot", remote=False),
    Method("best_of_n", "several sampled chains of thought, the most likely one", _best_of_n, "cot", remote=False),
    Method("pause", "pause tokens before the answer, with a model trained for it", _loop(), "pause"),
    Method("slr", "the latent loop with early exit", _loop()),
    Method("slr_fixed", "the latent loop, always all iterations", _loop(criterion="fixed")),
    Method("slr_vote", "several loops with noise in their states, majority vote", _slr_vote, remote=False),
    Method("no_thought", "trained with the same recipe without the loop", _plain, "no_thought", control=True),
    Method(
        "pause_as_thought",
        "trained with the same recipe; every thought is a learned vector",
        _loop(),
        "pause_as_thought",
        control=True,
    ),
    Method(
        "multipass_pause", "as pause_as_thought, with one pass per thought", _loop(), "multipass_pause", control=True
    ),
    Method(
        "shuffled_thoughts",
        "the loop's thoughts in random order",
        _replaced(lambda reasoner, seeds: replace_states(reasoner, shuffle_thoughts(seeds))),
        remote=False,
        control=True,
    ),
    Method(
        "noised_thoughts",
        "noise of the same norms in place of the thoughts",
        _replaced(lambda reasoner, seeds: replace_states(reasoner, randomize_thoughts(seeds))),
        remote=False,
        control=True,
    ),
    Method(
        "zeroed_thoughts",
        "zeros in place of the thoughts",
        _replaced(lambda reasoner, seeds: replace_states(reasoner, zero_thoughts)),
        remote=False,
        control=True,
    ),
    Method(
        "paused_thoughts",
        "the mean token embedding in place of every thought",
        _replaced(lambda reasoner, seeds: replace_states(reasoner, pause_thoughts(reasoner))),
        remote=False,
        control=True,
    ),
    Method(
        "foreign_thoughts",
        "the thoughts of the preceding question",
        _foreign_thoughts,
        remote=False,
        control=True,
    ),
)
METHODS = {method.name: method for method in _ALL}
NOISY_START = Method("noisy_start", "the latent loop with noise in h_0", _noisy_start, remote=False)
"""Not part of a comparison: :mod:`slr_core.evaluation.stability` runs it with different amounts of noise."""


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {name}{did_you_mean(name, METHODS)}")
    return METHODS[name]

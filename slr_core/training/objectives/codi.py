"""Self-distillation at one token: the objective ``codi``.

CODI (Shen et al., 2025, arXiv 2502.21074): teacher and student are the same weights. The teacher has the chain in
words before it, the student its loop; at the position from which the answer is read, every layer's hidden
state of the student is drawn to the teacher's, which is detached. Combine it with ``answer`` and ``cot``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_core.loop.workspace import readout
from slr_core.training.objectives.rollout import Mean, Rollout


def codi(run: Rollout) -> Mean:
    """Smooth L1 over all layers, embeddings included, each scaled by the teacher's deviation in the batch."""
    rows = torch.arange(len(run.exits), device=run.exits.device)
    teacher = [layer[rows, run.batch["mark_at"]] for layer in run.in_words.layers]
    return layer_distance(_before_the_answer(run), teacher, run.exits > run.blind)


def layer_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], counts: Tensor) -> Mean:
    """Mean over layers of smooth L1 / deviation: ``[B, d]`` a layer, over the rows that ``counts`` ``[B]``."""
    total = torch.zeros((), device=counts.device)
    for valid_mask, target in zip(student, teacher, strict=True):
        target = target.detach().float()
        distance = F.smooth_l1_loss(valid_mask.float(), target, reduction="none").mean(-1)
        total = total + distance.masked_fill(~counts, 0).sum() / target.std().clamp_min(1e-6)
    return Mean(total / len(student), counts.sum())


def _before_the_answer(run: Rollout) -> list[Tensor]:
    """Every layer's states ``[B, d]`` in the pass from which the first token after the loop is read."""
    passes = run._context.passes
    assert passes is not None
    if run.reasoner.config.loop.workspace == "append":
        rows, at = torch.arange(len(run.exits), device=run.exits.device), (run.exits - 1).clamp_min(0)
        iterations = passes[: run.iterations]
        return [torch.stack(layer, dim=1)[rows, at, 0] for layer in zip(*iterations, strict=True)]
    _ = run.closed
    # The closing pass of the rows that looped comes first after the iterations.
    return [readout(layer, run.valid_mask) for layer in passes[run.iterations]]

"""Self-distillation at one token: the objective ``codi``.

CODI (Shen et al., 2025, arXiv 2502.21074): teacher and student share their weights. The teacher reads the written
chain of thought, the student loops. At the position from which the answer is read, the loss is the distance of the
student's hidden states in every layer to the detached states of the teacher. Combine it with ``answer`` and ``cot``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_core.loop.workspace import readout
from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.token_loss import Mean


def codi(rollout: Rollout) -> Mean:
    """Smooth L1 distance in all layers and the embeddings, divided by the teacher's standard deviation."""
    rows = torch.arange(len(rollout.exits), device=rollout.exits.device)
    teacher = [layer[rows, rollout.batch["mark_at"]] for layer in rollout.chain_outputs.layers]
    return layer_distance(_before_the_answer(rollout), teacher, rollout.exits > rollout.detached)


def layer_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Mean:
    """Mean over layers of smooth L1 / standard deviation: layers ``[B, d]``, over the rows in ``mask`` ``[B]`` bool."""
    total = torch.zeros((), device=mask.device)
    for layer, target in zip(student, teacher, strict=True):
        target = target.detach().float()
        distance = F.smooth_l1_loss(layer.float(), target, reduction="none").mean(-1)
        total = total + distance.masked_fill(~mask, 0).sum() / target.std().clamp_min(1e-6)
    return Mean(total / len(student), mask.sum())


def _before_the_answer(rollout: Rollout) -> list[Tensor]:
    """Each layer's states ``[B, d]`` in the pass from which the first token after the loop is read."""
    passes = rollout._context.passes
    assert passes is not None
    if rollout.reasoner.config.loop.workspace == "append":
        rows, at = torch.arange(len(rollout.exits), device=rollout.exits.device), (rollout.exits - 1).clamp_min(0)
        iterations = passes[: rollout.iterations]
        return [torch.stack(layer, dim=1)[rows, at, 0] for layer in zip(*iterations, strict=True)]
    _ = rollout.closed_context  # runs the closing pass, which adds its layers to `passes`
    # After the passes of the iterations, the closing pass of the rows that looped comes first.
    return [readout(layer, rollout.valid_mask) for layer in passes[rollout.iterations]]

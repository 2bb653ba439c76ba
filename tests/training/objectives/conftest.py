"""A tiny model of ProsQA, and batches that hold whatever an objective asks for."""

from typing import Any

import pytest
import torch

from slr_core.training.build import build
from slr_core.training.config import TrainConfig
from slr_core.training.data import Collator, LoopPlan, StageStream
from slr_core.training.objectives import Rollout, losses
from slr_core.validation import validated
from tests import tiny
from tests.training.recipe import DATA


class Setup:
    """A recipe with one objective (or several), its model and a batch for it.

    Args:
        objectives: their weights; the others are off.
        loop: changes of the tiny loop.
        shake: random values where training would have put some; without, the model is as it starts.
        recipe: other changes.
    """

    def __init__(
        self, objectives: dict[str, float], loop: dict[str, Any] | None = None, *, shake: bool = True, **recipe: Any
    ) -> None:
        data = {**DATA, "objectives": {"answer": 0.0, **objectives}, "loop": {**DATA["loop"], **(loop or {})}, **recipe}
        # `steps` need words: the mark must be in the tokenizer.
        self.config = validated(TrainConfig, {**data, "output_dir": "unused"})
        self.reasoner = build(self.config).eval()
        if shake:
            tiny.shake(self.reasoner)
        self.collator = Collator(
            self.reasoner.tokenizer,
            self.config,
            self.reasoner.config.text,
            by_token=self.config.thinks_by_token(self.reasoner.config.loop),
        )
        self.items = list(StageStream(self.config))[-1]
        self.batch = self.collator(self.items)

    def rollout(self, **changes: Any) -> Rollout:
        """A rollout of the batch with changes."""
        return Rollout(self.reasoner, {**self.batch, **changes}, self.config)

    def terms(self, **changes: Any) -> dict[str, torch.Tensor]:
        """The loss terms."""
        return {name: term.value for name, term in losses(self.rollout(**changes)).items()}

    def plan(self, iterations: int, backprop: int | None = None) -> dict[str, Any]:
        """Changes that make the batch loop otherwise."""
        return {"plan": LoopPlan(iterations, backprop), "exits": self.batch["exits"].clamp_max(iterations)}

    def learn(self, steps: int = 30, rate: float = 1e-2) -> list[dict[str, float]]:
        """Steps of AdamW on the one batch: the terms before each."""
        self.reasoner.train()
        trained = [p for p in self.reasoner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate)
        history = []
        for _ in range(steps):
            terms = self.terms()
            history.append({name: float(value.detach()) for name, value in terms.items()})
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
        return history


GRAPHS = {"answer": 1.0, "frontier": 1.0, "start": 0.1, "chains": 1.0, "fixed_point": 1.0}


@pytest.fixture(scope="module")
def graphs() -> Setup:
    """The objectives of the bundled recipe."""
    return Setup(GRAPHS)

"""All that was found by looking into the states, as one record that a results file keeps and a report draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from pydantic import TypeAdapter

from slr_core.evaluation import plots
from slr_core.evaluation.lens import Lens, Movement, Trajectories
from slr_core.evaluation.plots import Plot
from slr_core.evaluation.probes import ProbeScore


@dataclass(frozen=True)
class StateAnalysis:
    """What ``slr probe`` found.

    Attributes:
        iterations: how far every loop was made to run.
        accuracy: of the answers after them.
        lens: what the states read as.
        movement: how far they moved.
        trajectories: their paths in the plane; ``None`` where too few loops ran to the end.
        probes: what classifiers found in them.
    """

    iterations: int
    accuracy: float
    lens: Lens
    movement: Movement
    trajectories: Trajectories | None
    probes: tuple[ProbeScore, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse, also of what went through a file; ``ValueError`` where ``data`` is something else."""
        return TypeAdapter(cls).validate_python(data)

    def plots(self) -> dict[str, Plot]:
        """Its plots by name."""
        drawn = {
            "lens": Plot(
                "Logit lens",
                "What the model's own head says of the states: how much goes to the answer, and how sure it is.",
                plots.draw_lens_curves(self.lens),
            ),
            "readings": Plot(
                "States in words",
                "The first questions: the likeliest token of every state and its probability, and the thought in "
                "words where the checkpoint has a latent decoder. Below each: the answer, and whether it is right.",
                plots.draw_readings(self.lens.examples),
            ),
            "steps": Plot(
                "Steps of the states",
                "Medians and quartiles over the questions. A loop that settles takes ever shorter steps.",
                plots.draw_change_and_contraction(self.movement),
            ),
        }
        if self.trajectories is not None:
            drawn["trajectories"] = Plot(
                "Paths of the states",
                "Principal components over all questions and iterations; numbers are iterations.",
                plots.draw_pca_trajectories(self.trajectories),
            )
        if self.probes:
            drawn["probes"] = Plot(
                "Probes",
                "What classifiers find in the states of questions that they were not trained on. What counts is the "
                "distance to the same probe on shuffled labels; that a state holds something does not mean that the "
                "model uses it.",
                plots.draw_probe_scores(self.probes),
            )
        return drawn

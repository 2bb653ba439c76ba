"""The results of ``slr probe``, as one record that a results file stores and a report draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from slr_core.evaluation import plots
from slr_core.evaluation.lens import Lens, Movement, Trajectories
from slr_core.evaluation.plots import Plot
from slr_core.evaluation.probes import ProbeScore
from slr_core.validation import from_stored


@dataclass(frozen=True)
class StateAnalysis:
    """Measurements on the hidden states of a loop.

    Attributes:
        iterations: number of iterations of every loop.
        accuracy: accuracy of the answers after them.
        lens: the logit lens on every state.
        movement: how far the states moved.
        trajectories: the states in the plane of their principal components; ``None`` if too few loops ran to the end.
        probes: scores of classifiers on the states.
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
        """The inverse of :meth:`to_json`.

        Raises:
            DataError: ``data`` is something else.
        """
        return from_stored(cls, data)

    def plots(self) -> dict[str, Plot]:
        """The plots, by name."""
        drawn = {
            "lens": Plot(
                "Logit lens",
                "The LM head applied to every state: the probability of the answer, and the entropy.",
                plots.draw_lens_curves(self.lens),
            ),
            "readings": Plot(
                "Logit lens, question by question",
                "The first questions: the most likely token of every state, its probability, and the decoded thought "
                "if the checkpoint has a latent decoder. Below each question: the answer, and whether it is right.",
                plots.draw_readings(self.lens.examples),
            ),
            "steps": Plot(
                "Steps of the states",
                "Medians and quartiles over the questions. In a loop that converges, steps get shorter.",
                plots.draw_change_and_contraction(self.movement),
            ),
        }
        if self.trajectories is not None:
            drawn["trajectories"] = Plot(
                "Trajectories of the states",
                "Principal components over all questions and iterations; the numbers are iterations.",
                plots.draw_pca_trajectories(self.trajectories),
            )
        if self.probes:
            drawn["probes"] = Plot(
                "Probes",
                "Scores of classifiers on the states of held-out questions. Compare each with the same probe trained "
                "on shuffled labels. A high score shows that a state contains the label, not that the model uses it.",
                plots.draw_probe_scores(self.probes),
            )
        return drawn

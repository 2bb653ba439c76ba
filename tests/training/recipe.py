"""A recipe that trains in a moment."""

from typing import Any

from slr_core.training.config import TrainConfig
from slr_core.validation import validated

GRAPHS = [
    {"task": "prosqa", "generator_options": {"nodes": 6, "min_hops": 1, "max_hops": 2, "balanced": True}},
    {"task": "prosqa", "generator_options": {"nodes": 8, "min_hops": 2, "max_hops": 3, "balanced": False}},
]

DATA: dict[str, Any] = {
    "output_dir": "unused",
    "seed": 3,
    "base": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 96,
    },
    "loop": {"trained_iterations": 4, "max_iterations": 4, "lora": {"rank": 2}, "timestep": {"kind": "learned"}},
    "text": {"max_new_tokens": 6},
    "optimizer": {"batch_size": 4, "warmup_steps": 2, "learning_rate": 0.01},
    "objectives": {"answer": 1.0, "frontier": 1.0, "start": 0.1, "chains": 1.0, "fixed_point": 1.0},
    "chains": 2,
    "save_steps": 100,
    "log_steps": 2,
    "stages": [
        {"steps": 2, "iterations": 2, "data": GRAPHS[:1]},
        {"steps": 4, "iterations": 4, "data": GRAPHS},
    ],
}


def recipe(**changes: Any) -> TrainConfig:
    """The recipe with top-level fields changed."""
    return validated(TrainConfig, {**DATA, **{key: str(x) if key == "output_dir" else x for key, x in changes.items()}})

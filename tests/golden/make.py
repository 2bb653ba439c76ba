"""Golden traces: a fixed model and a few requests per workspace and feedback, and what their loops do, in JSON.

    python -m tests.golden.make

writes ``append.json`` and the other files of this folder anew from the reference. That is due
only where the semantics of the design change on purpose; say so in the commit, with the rows of the files that moved.

A file must read the same on every CPU. So the model is a GPT-2, which computes in double precision throughout;
its weights are a formula, in steps of 1/256 (the last digit of a sine does not matter); states are hashed as rounded
integers, and :func:`make` refuses a state that rounding could tip either way. Distances are fp32 by definition:
those are written out, and compared with a tolerance.
"""

import json
import math
import re
import zlib
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.types import Request, Result
from tests import tiny

FOLDER = Path(__file__).parent
MEASURES = ("relative_change", "cosine", "norm", "contraction", "kl", "entropy")

LOOPS = {
    "append": {
        "projection": {"kind": "rms_match"},
        "timestep": {"kind": "learned", "combine": "add"},
        "lora": {"rank": [2, 1, 3], "decode_rank": 2, "past_end": "last"},
        "residual": {"source": "previous", "mix": "gated", "norm": True},
        "convergence": {"criterion": "relative_change", "threshold": 0.5},
    },
    "block": {
        "workspace": "block",
        "block_size": 3,
        "projection": {"kind": "mlp"},
        "timestep": {"kind": "sinusoidal", "combine": "concat", "noise_level": True},
        "lora": {"rank": [1, 3, 2], "past_end": "cycle"},
        "residual": {"source": "initial", "mix": "convex", "alpha": 0.77},
        "convergence": {"criterion": "learned", "threshold": 0.6},
        "halting_head": True,
        "decoder": {"latent_decoder": tiny.LATENT_DECODER},
    },
    "block_shifted": {
        "workspace": "block",
        "block_size": 4,
        "feedback": "shifted",
        "projection": {"kind": "mlp", "inner_size": 9, "norm": False},
        "timestep": {"kind": "none"},
        "lora": {"rank": [1, 2, 2], "decode_rank": 1},
        "residual": {"source": "none"},
        "convergence": {"criterion": "relative_change", "threshold": 0.5},
    },
    "prompt": {
        "workspace": "prompt",
        "projection": {"kind": "linear"},
        "timestep": {"kind": "learned", "combine": "concat"},
        "lora": {"kind": "shared", "rank": 3, "decode_rank": 1},
        "residual": {"source": "previous", "mix": "convex", "alpha": 0.5, "norm": True},
        "convergence": {"criterion": "cosine", "threshold": 0.05},
    },
    "token": {
        "workspace": "token",
        "projection": {"kind": "rms_match"},
        "timestep": {"kind": "learned"},
        "lora": {"rank": [2, 1, 3], "past_end": "cycle"},
        "residual": {"source": "initial", "mix": "convex", "alpha": 0.8},
        "convergence": {"criterion": "survival", "threshold": 0.2},
        "halting_head": True,
    },
    "token_shared": {
        "workspace": "token",
        "deeper_cache": "shared",
        "feedback": "raw",
        "projection": {"kind": "identity"},
        "timestep": {"kind": "learned", "combine": "concat"},
        "lora": {"rank": [2, 1, 2]},
        "residual": {"source": "previous", "mix": "gated", "norm": True},
        "convergence": {"criterion": "cosine", "threshold": 0.2},
    },
}
TEXT = {"append": {"answer_prefix": "w7 w8"}, "block": {"prompt_suffix": " w9"}, "prompt": {"answer_prefix": "w11"}}
TEXT["block_shifted"] = {"answer_prefix": "w7", "suppressed_token_ids": [5, 6]}
TEXT |= {"token": {"prompt_suffix": " w9"}, "token_shared": {"suppressed_token_ids": [5, 6]}}
# The block's noise level passes through fp32, as distances do: its states agree to that.
DECIMALS = {"append": 6, "block": 3, "block_shifted": 6, "prompt": 6, "token": 6, "token_shared": 6}
MARGINS = {name: 1e-6 if name == "block" else 1e-10 for name in LOOPS}

REQUESTS = (
    {"prompt": tiny.PROMPTS[2], "loop": {"min_iterations": 4}},  # its own exit
    {"prompt": tiny.PROMPTS[1], "loop": {"max_iterations": 5, "criterion": "fixed"}},  # past the last trained
    {"prompt": tiny.PROMPTS[3], "loop": {"max_iterations": 0}},  # the base model
    {"prompt": tiny.PROMPTS[0], "loop": {"criterion": "kl", "threshold": 0.09, "patience": 2, "min_iterations": 2}},
    {"prompt": tiny.PROMPTS[5], "loop": {"max_iterations": 2, "criterion": "argmax_stable"}},
)


def model(workspace: str) -> LatentReasoner:
    """The fixed model of a workspace, in double precision."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": tiny.POSITIONS}
    special = {"vocab_size": len(tiny.WORDS), "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD, "bos_token_id": None}
    plain = GPT2LMHeadModel(GPT2Config(**special, **sizes)).double()
    made = tiny.reasoner("gpt2", {"max_iterations": 9, **LOOPS[workspace]}, plain=plain, text=TEXT[workspace])
    with torch.no_grad():
        for name, parameter in made.double().named_parameters():
            parameter.copy_(weights(name.replace(".base_layer.", "."), parameter.shape))
    return made.eval()


def weights(name: str, shape: torch.Size) -> torch.Tensor:
    """The formula: a sine of squared indices, in steps of 1/256; norms lie around 1, gates around 0.7."""
    phase = zlib.crc32(name.encode()) % 1000
    waves = [math.sin(1.3 * i * i + i + phase) for i in range(math.prod(shape))]
    norm = len(shape) == 1 and name.endswith("weight")
    if "level_mlp" in name:  # what comes from fp32 may not move the states by much
        middle, scale = 0.0, 0.2
    elif norm:
        middle, scale = 1.0, 0.25
    elif name.endswith("gate"):
        middle, scale = 1.0, 1.0
    else:
        middle, scale = 0.0, 0.3 if "lora_" in name else 0.6
    return torch.tensor([round(256 * (middle + scale * wave)) / 256 for wave in waves], dtype=torch.double).view(shape)


def requests(made: LatentReasoner) -> list[Request]:
    """The requests of every file, for one model."""
    return [
        prepare(
            made,
            request["prompt"],
            LoopParams(**request["loop"]),
            max_new_tokens=4,
            trace=True,
            include_states=True,
        )
        for request in REQUESTS
    ]


def fingerprint(values: torch.Tensor, decimals: int) -> str:
    """Hash of a tensor, rounded: integers have no negative zero."""
    rounded = (values.double() * 10**decimals).round().long()
    return sha256(f"{list(rounded.shape)}{rounded.flatten().tolist()}".encode()).hexdigest()[:16]


def margin(states: torch.Tensor, workspace: str) -> float:
    """How far the nearest value of h_1 ... h_t lies from where it would round the other way; h_0 may be exact."""
    scaled = states[1:].double() * 10 ** DECIMALS[workspace]
    nearest = (scaled - scaled.floor() - 0.5).abs().flatten().tolist()
    return min(nearest, default=0.5) / 10 ** DECIMALS[workspace]


def row(result: Result, workspace: str) -> dict:
    """What a file holds of one result, but for the passes."""
    assert result.states is not None
    return {
        "iterations": result.iterations,
        "exit_reason": result.exit_reason,
        "finish_reason": result.finish_reason,
        "tokens": list(result.token_ids),
        "text": result.text,
        "forward_passes": result.forward_passes,
        "states": [fingerprint(h, DECIMALS[workspace]) for h in result.states],
        "trace": [
            {"t": r.t, "adapter": r.adapter, "thought": r.thought, **{name: getattr(r, name) for name in MEASURES}}
            for r in result.records
        ],
        "stability": asdict(result.stability),
        **({"iterations_per_token": list(result.iterations_per_token)} if result.iterations_per_token else {}),
    }


def trace(workspace: str) -> dict:
    """A whole file: every request alone."""
    made = model(workspace)
    rows = []
    for given, request in zip(REQUESTS, requests(made), strict=True):
        with tiny.passes(made) as passes:
            (result,) = generate(made, [request])
        ran = [{"adapter": adapter, "positions": positions} for adapter, (positions,) in passes]
        rows.append({"request": given, **row(result, workspace), "passes": ran})
    state = {name.replace(".base_layer.", "."): x for name, x in made.state_dict().items()}
    return {
        "made_by": "python -m tests.golden.make",
        "workspace": workspace,
        "decimals": DECIMALS[workspace],
        "weights": fingerprint(torch.cat([state[name].flatten() for name in sorted(state)]), 3),
        "rows": rows,
    }


def make(folder: Path = FOLDER) -> None:
    """Write all files."""
    for workspace in LOOPS:
        made = model(workspace)
        results = generate(made, requests(made))
        if min(margin(result.states, workspace) for result in results) < MARGINS[workspace]:
            raise SystemExit(f"{workspace}: a state lies where rounding may tip it; change REQUESTS or LOOPS a little")
        text = json.dumps(trace(workspace), indent=1)
        flat = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
        (folder / f"{workspace}.json").write_text(flat + "\n", encoding="utf-8")


if __name__ == "__main__":
    make()

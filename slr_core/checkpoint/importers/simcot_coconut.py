"""SIM-CoT (Wei et al., 2025, arXiv 2509.20317) on Coconut: a Coconut checkpoint with an auxiliary decoder.

The auxiliary decoder is a second whole model that read the thoughts in training alone.
"""

from __future__ import annotations

from slr_core.checkpoint.importers.coconut import chain, recorded_thoughts, with_markers
from slr_core.checkpoint.importers.files import read_weights
from slr_core.checkpoint.importers.peer import Conversion, Peer, PeerCheckpoint

DECODER = r"expainable_llm\..*"  # their spelling
WHY = (
    "its auxiliary decoder, a whole language model that read one thought as its first input; no latent decoder of this "
    "project has that form"
)


def convert_simcot_coconut(source: PeerCheckpoint) -> Conversion:
    """Convert a checkpoint of SIM-CoT on Coconut; one of its first step, without the decoder, is Coconut's."""
    source.options.refuse("simcot-coconut", "iterations", "lora_alpha", "keep_eos", "keep_adapter")
    weights = read_weights(source.checkpoint)
    latents = source.options.require(
        "latents", "the number of thoughts, c_thought x max_latent_stage of its training (10)"
    )
    weights.drop(DECODER, "expainable_llm.*", WHY)
    return with_markers(source, weights, chain(latents))


PEER = Peer(
    name="simcot-coconut",
    title="SIM-CoT (Coconut)",
    repository="https://github.com/InternLM/SIM-CoT",
    licence="Apache-2.0",
    convert=convert_simcot_coconut,
    recorded=recorded_thoughts,
)

"""SIM-CoT (Wei et al., 2025, arXiv 2509.20317) on CODI: a CODI checkpoint with an auxiliary decoder."""

from __future__ import annotations

from slr_core.checkpoint.importers.codi import convert_weights, recorded_projections
from slr_core.checkpoint.importers.files import read_weights
from slr_core.checkpoint.importers.peer import Conversion, Peer, PeerCheckpoint
from slr_core.checkpoint.importers.simcot_coconut import WHY

DECODER = {
    r"decoder\..*": "decoder.*",
    r"pj_in\..*": "pj_in.*",
    r"pj_out\..*": "pj_out.*",
}


def convert_simcot_codi(source: PeerCheckpoint) -> Conversion:
    """Convert a checkpoint of SIM-CoT on CODI."""
    weights = read_weights(source.checkpoint)
    for pattern, name in DECODER.items():
        weights.drop(pattern, name, WHY)
    return convert_weights(source, weights, "simcot-codi")


PEER = Peer(
    name="simcot-codi",
    title="SIM-CoT (CODI)",
    repository="https://github.com/InternLM/SIM-CoT",
    licence="Apache-2.0",
    convert=convert_simcot_codi,
    recorded=recorded_projections,
)

from slr_core.checkpoint.write import modules_state
from slr_core.config import LoopConfig
from slr_core.loop.modules import LoopModules
from tests import tiny


def test_a_config_names_what_there_is():
    plain = LoopModules.build(LoopConfig(), 16)
    assert plain.halting is None
    assert plain.decoder is None
    full = LoopConfig.model_validate({"halting_head": True, "decoder": {"latent_decoder": tiny.LATENT_DECODER}})
    assert all(part is not None for part in LoopModules.build(full, 16))


def test_weights_in_a_checkpoint_have_the_names_of_their_parts():
    loop = {"halting_head": True, "decoder": {"latent_decoder": tiny.LATENT_DECODER}, "workspace": "block"}
    made = tiny.reasoner(loop={**loop, "projection": {"kind": "linear"}})
    assert {name.partition(".")[0] for name in modules_state(made)} == set(LoopModules._fields)

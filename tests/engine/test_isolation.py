"""Requests of a loop adapter set with infinite values do not affect others, with every LoRA method."""

import pytest
import torch

from slr_core.engine import Engine
from slr_core.errors import ConfigError
from slr_core.generation.reference import generate
from tests import tiny


def poisoned(made, value):
    other = tiny.twin(made)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.fill_(value)
    return other


@pytest.mark.parametrize("method", ["masked", "grouped", "segments"])
def test_infinite_values_stay_in_their_set(tmp_path, method):
    made = tiny.reasoner()
    poisoned(made, 1e38).save_pretrained(str(tmp_path / "poisoned"))
    expected = generate(made, [tiny.request(made, prompt) for prompt in tiny.PROMPTS])
    with Engine(made, threads=1) as engine:
        engine.load_loop_set("poisoned", str(tmp_path / "poisoned"))
        for layer in engine._lora_batch.layers.values():
            layer.method = method
        poison = [engine.submit(tiny.request(made, p), loop_set="poisoned") for p in tiny.PROMPTS]
        beside = [engine.submit(tiny.request(made, p)) for p in tiny.PROMPTS]
        assert {future.result().exit_reason for future in poison} == {"diverged"}
        for future, alone in zip(beside, expected, strict=True):
            assert (future.result().token_ids, future.result().exit_reason) == (alone.token_ids, alone.exit_reason)


def test_weights_with_infinite_scale_are_refused(tmp_path):
    made = tiny.reasoner()
    poisoned(made, 3e38).save_pretrained(str(tmp_path / "poisoned"))
    with Engine(made, threads=1) as engine:
        with pytest.raises(ConfigError, match=r"adapter loop_01 at .* not finite"):
            engine.load_loop_set("poisoned", str(tmp_path / "poisoned"))
        assert list(engine.loop_sets) == ["default"]

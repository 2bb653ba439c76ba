"""What a loop is held against: the base model without iterations, PEFT's own adapter at the first; and which bases."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from slr_core.engine import Engine
from slr_core.errors import ConfigError, RequestError
from slr_core.generation.reference import generate
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams
from tests import tiny
from tests.contract.derivation import clone, plain_base, with_peft

PROMPTS = tiny.PROMPTS[::2]
DECODER = {"decoder": {"answers": "latent_decoder", "latent_decoder": tiny.LATENT_DECODER}}


@pytest.mark.parametrize(("writer", "prefix"), [({}, ""), (DECODER, "w7 w8")], ids=["lm-head", "latent-decoder"])
def test_without_iterations_it_is_the_base_model(kind, loop, saved, writer, prefix):
    plain = plain_base(saved[1])
    made = tiny.reasoner(kind, {**loop, **writer}, decode=True, text={"answer_prefix": prefix})
    results = generate(made, [tiny.request(made, p, {"max_iterations": 0}, max_new_tokens=8) for p in PROMPTS])
    for prompt, result in zip(PROMPTS, results, strict=True):
        prompt_ids = torch.tensor([tiny.ids(f"{prompt} {prefix}")])
        expected = plain.generate(
            prompt_ids, attention_mask=torch.ones_like(prompt_ids), do_sample=False, max_new_tokens=8
        )
        assert list(result.token_ids) == expected[0, prompt_ids.shape[1] :].tolist()
        assert (result.iterations, result.exit_reason, result.final_change) == (0, "max_iterations", None)
        assert result.records == ()
    # Iterations do change the answer, or the above would say nothing.
    looped = generate(made, [tiny.request(made, p, {"max_iterations": 3}, max_new_tokens=8) for p in PROMPTS])
    assert [r.token_ids for r in looped] != [r.token_ids for r in results]


def test_iteration_1_is_what_peft_makes_of_the_first_adapter(saved):
    made, folder = saved
    peft_model = with_peft(plain_base(folder), folder, ["loop_01"])
    input_ids, mask = tiny.batch([tiny.PROMPTS[3]])
    length, workspace = input_ids.shape[1], made.config.loop.workspace
    with torch.inference_mode():
        context = made.encode(input_ids, mask)
        h_0 = context.hidden
        u = made.timestep(made.project_in(h_0), 1)
        g, _ = made.iterate(context, 1)

        with peft_model.disable_adapter():
            prompt = peft_model(input_ids=input_ids, use_cache=True, output_hidden_states=True)
        start = {
            "append": lambda: prompt.hidden_states[-1][:, -1:],
            "block": lambda: made.workspace.vectors[None],
            "prompt": lambda: peft_model.get_input_embeddings()(input_ids),
        }[workspace]()
        torch.testing.assert_close(start, h_0, rtol=1e-5, atol=1e-5)
        first = 0 if workspace == "prompt" else length

        def run():
            return peft_model(
                inputs_embeds=u,
                position_ids=torch.arange(first, first + u.shape[1])[None],
                past_key_values=None if workspace == "prompt" else clone(prompt.past_key_values),
            ).logits

        with_adapter = run()
        with peft_model.disable_adapter():
            without = run()
        torch.testing.assert_close(made.head(g), with_adapter, rtol=1e-5, atol=1e-5)
        assert (with_adapter - without).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "qwen3_windowed"])
def test_a_sliding_window_caps_the_positions(kind):
    """Within the window, the engine writes what transformers does, looped or not; beyond it, requests are refused."""
    plain = tiny.base(kind)
    window = plain.config.sliding_window
    made = tiny.reasoner(plain=tiny.base(kind), trained=False)
    assert made.max_positions == window < plain.config.max_position_embeddings
    prompts = [tiny.words(*range(n)) for n in (2, 7, window - 4)]
    with Engine(made, threads=1, slots=2) as engine:
        assert engine.capacity == window
        for prompt, result in zip(prompts, engine.generate(prompts, max_new_tokens=4), strict=True):
            ids = torch.tensor([tiny.ids(prompt)])
            with torch.inference_mode():
                output = plain.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=tiny.PAD
                )
            assert list(result.token_ids) == output[0, ids.shape[1] :].tolist()
        loop = {"max_iterations": 3, "criterion": "fixed"}
        requests = [tiny.request(made, prompt, loop, max_new_tokens=1) for prompt in prompts]
        looped = [engine.submit(request).result() for request in requests]
        assert [r.token_ids for r in looped] == [r.token_ids for r in generate(made, requests)]
        with pytest.raises(RequestError, match=f"fit this model .positions end at its sliding window of {window}"):
            engine.generate(tiny.words(*range(window)))
        with pytest.raises(RequestError, match=f"max_new_tokens must be at most 4 .*sliding window of {window}"):
            engine.generate(prompts[-1], max_new_tokens=5)


SIZES = {"vocab_size": len(tiny.WORDS), "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("field", "value"), [("final_logit_softcapping", 30.0), ("logit_scale", 0.5), ("logits_scaling", 8.0)]
)
def test_a_head_that_is_not_plainly_linear_is_refused(field, value):
    plain = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1))
    setattr(plain.config, field, value)
    with pytest.raises(ConfigError, match=f"{field} is not supported"):
        tiny.reasoner(plain=plain)


def test_a_layer_of_another_kind_is_refused():
    plain = tiny.base("qwen2")
    plain.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ConfigError, match=r"Qwen2ForCausalLM: layers without full attention .*: chunked_attention"):
        tiny.reasoner(plain=plain)


@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_the_same_architecture_without_its_window_runs(workspace):
    config = MistralConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=2, sliding_window=None)
    made = tiny.reasoner(loop=tiny.WORKSPACES[workspace], plain=MistralForCausalLM(config).eval())
    settings = LoopParams(max_iterations=3, criterion="fixed").resolve(made.config)
    with torch.inference_mode():
        output = loop_until_exit(made, made.encode(*tiny.batch(tiny.PROMPTS)), [settings] * 8)
    assert output.iterations == [3] * 8
    assert output.exit_reasons == ["max_iterations"] * 8

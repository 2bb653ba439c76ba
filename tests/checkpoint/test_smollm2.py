"""SmolLM2-135M-Instruct, from the package that brings it, against transformers' own greedy ``generate``."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slr_core.checkpoint.init import PACKAGED, init_checkpoint
from slr_core.engine import Engine
from slr_core.engine.runner.device import load_reasoner
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.params import LoopParams

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "The three primary colors are",
    "In 1969,",
    "To make bread, you need",
    "The opposite of hot is",
    "Two plus three equals",
    "Dear Sir or Madam,",
)
NEW = 12

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec(PACKAGED["smollm2"][0]) is None, reason="the extra smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "fresh"
    init_checkpoint("smollm2", out)
    return out


def test_answers_of_the_base(folder):
    """Completions and chats, with the base's chat template and end tokens, token for token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    assert plain.dtype == torch.float32

    def greedy(ids):
        with torch.inference_mode():
            output = plain.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
        end = next((i for i, token in enumerate(output) if token == tokenizer.eos_token_id), len(output))
        return output[:end]

    assert tokenizer.eos_token == "<|im_end|>"
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    rendered = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    assert all(ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) >= 2 for ids in rendered)
    end = tokenizer.eos_token_id
    with Engine(load_reasoner(str(folder), device="cpu"), threads=1) as engine:
        completions = engine.generate(list(PROMPTS), max_new_tokens=NEW)
        answers = engine.chat(chats, max_new_tokens=NEW)
    assert all(result.iterations == 0 for result in (*completions, *answers))
    for prompt, result in zip(PROMPTS, completions, strict=True):
        assert [token for token in result.token_ids if token != end] == greedy(tokenizer(prompt).input_ids), prompt
    for ids, result in zip(rendered, answers, strict=True):
        assert [token for token in result.token_ids if token != end] == greedy(ids)


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8"), ("bfloat16", "int4"), ("float32", "int4")],
)
def test_engine_equals_reference(folder, dtype, quantization):
    """The reference has the same products, in other batches: fp32 gives the same tokens, others like distances."""
    reasoner = load_reasoner(str(folder), device="cpu", dtype=dtype, quantization=quantization)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in reasoner.base.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.01)
    loops = [LoopParams(max_iterations=t, min_iterations=t) for t in (0, 1, 2, 4)]
    requests = [prepare(reasoner, *pair, max_new_tokens=4) for pair in zip(PROMPTS[:4], loops, strict=True)]
    expected = [generate(reasoner, [request])[0] for request in requests]
    assert [result.iterations for result in expected] == [0, 1, 2, 4]
    exact = (dtype, quantization) == ("float32", "none")
    for slots in (1, 4):
        with Engine(reasoner, slots=slots, capacity=64, threads=1) as engine:
            results = [future.result() for future in [engine.submit(request) for request in requests]]
        for ours, theirs in zip(results, expected, strict=True):
            assert (ours.iterations, ours.exit_reason) == (theirs.iterations, theirs.exit_reason)
            changes = [[record.relative_change for record in result.records] for result in (ours, theirs)]
            assert changes[0] == pytest.approx(changes[1], rel=1e-3 if exact else 0.1)
            # With random adapters the likeliest tokens are nearly tied: rounding decides.
            if exact or (slots == 1 and not ours.iterations):
                assert ours.token_ids == theirs.token_ids

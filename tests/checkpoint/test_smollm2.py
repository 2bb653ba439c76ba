"""SmolLM2-135M-Instruct, from the package that brings it, against transformers' own greedy ``generate``."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slr_core.engine import Engine
from slr_core.engine.runner.device import load_reasoner

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

pytestmark = pytest.mark.slow


def test_answers_of_the_base(smollm2):
    """Completions and chats, with the base's chat template and end tokens, token for token."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    plain = AutoModelForCausalLM.from_pretrained(smollm2 / "base").eval()
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
    with Engine(load_reasoner(str(smollm2), device="cpu"), threads=1) as engine:
        completions = engine.generate(list(PROMPTS), max_new_tokens=NEW)
        answers = engine.chat(chats, max_new_tokens=NEW)
    assert all(result.iterations == 0 for result in (*completions, *answers))
    for prompt, result in zip(PROMPTS, completions, strict=True):
        assert [token for token in result.token_ids if token != end] == greedy(tokenizer(prompt).input_ids), prompt
    for ids, result in zip(rendered, answers, strict=True):
        assert [token for token in result.token_ids if token != end] == greedy(ids)

"""Tiny random models of the architectures that the project runs, and latent reasoners made of them."""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from slr_core.config import SLRConfig
from slr_core.generation.prepare import prepare
from slr_core.loop.lora import DECODE, new_adapter_configs
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.types import Request

KINDS = ("llama", "qwen2", "qwen3", "gpt2")
WORDS = ("<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(37)))
PAD, EOS = 0, 1
POSITIONS = 64

LOOP: dict[str, Any] = {
    "trained_iterations": 3,
    "max_iterations": 5,
    "lora": {"rank": 2, "alpha": 4},
    "timestep": {"kind": "learned"},
}
WORKSPACES: dict[str, dict[str, Any]] = {
    "append": {},
    "block": {"workspace": "block", "block_size": 3},
    "prompt": {"workspace": "prompt"},
}
"""The changes to ``LOOP`` that make each workspace."""
LATENT_DECODER: dict[str, Any] = {"hidden_size": 16, "layers": 2, "heads": 2, "max_thought_tokens": 4}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, words between blanks."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def base(kind: str = "llama", seed: int = 0) -> PreTrainedModel:
    """Two layers of 32 channels, weights large enough that positions, adapters and context all matter.

    ``mistral``, ``gemma3`` and ``qwen3_windowed`` have sliding windows; they are not among ``KINDS``.
    """
    torch.manual_seed(seed)
    special = {"vocab_size": len(WORDS), "eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None}
    llama_like = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.12,
    }
    match kind:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**special, **llama_like)).eval()
        case "mistral":
            return MistralForCausalLM(MistralConfig(**special, **llama_like, sliding_window=16)).eval()
        case "gemma3":
            windowed = Gemma3TextConfig(
                **special,
                **llama_like,
                head_dim=8,
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"],
            )
            return Gemma3ForCausalLM(windowed).eval()
        case "qwen3_windowed":
            windowed = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
            return Qwen3ForCausalLM(Qwen3Config(**special, **llama_like, head_dim=8, **windowed)).eval()
        case "qwen2":
            made = Qwen2ForCausalLM(Qwen2Config(**special, **llama_like)).eval()
            with torch.no_grad():  # attention biases, which start at zero
                for name, parameter in made.named_parameters():
                    if name.endswith(".bias"):
                        parameter.normal_(std=0.3)
            return made
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**special, **llama_like, head_dim=8, tie_word_embeddings=True)).eval()
        case "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.12}
            return GPT2LMHeadModel(GPT2Config(**special, **sizes)).eval()
    raise AssertionError(kind)


def config(loop: dict[str, Any] | None = None, **top: Any) -> SLRConfig:
    """The tiny loop with nested changes."""
    return SLRConfig.from_dict({"loop": LOOP}).replace(loop=loop or {}, **top)


def reasoner(
    kind: str = "llama",
    loop: dict[str, Any] | None = None,
    *,
    decode: bool = False,
    seed: int = 0,
    plain: PreTrainedModel | None = None,
    **top: Any,
) -> LatentReasoner:
    """A tiny reasoner in eval mode, every weight that starts as a no-op made to matter."""
    plain = plain or base(kind, seed)
    settings = config(loop, **top)
    adapters = new_adapter_configs(settings.loop)
    if decode:
        targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
        adapters[DECODE] = LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # GPT-2's Conv1D; test_lora.py asks that nobody needs to see it.
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        made = LatentReasoner(plain, tokenizer(), settings, adapters)
    shake(made, seed)
    return made.eval()


def shake(made: LatentReasoner, seed: int = 0) -> None:
    """Random values where training would have put some."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif not name.startswith("base."):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                if name.startswith("decoder.") and parameter.dim() > 1:
                    parameter.mul_(4)  # or it would write the same whatever it reads


def twin(made: LatentReasoner) -> LatentReasoner:
    """An independent copy."""
    return copy.deepcopy(made)


@contextmanager
def passes(made: LatentReasoner) -> Iterator[list[tuple[str | None, list[list[int]]]]]:
    """The base model's forward passes inside the block: the adapter that acts, and the position ids ``[B, q]``."""
    seen: list[tuple[str | None, list[list[int]]]] = []
    layers = [module for module in made.base.modules() if isinstance(module, LoraLayer)]

    def note(_module: torch.nn.Module, _args: Any, options: dict[str, Any]) -> None:
        (active,) = {tuple(layer.active_adapters) for layer in layers} or {()}
        (adapter,) = active or (None,)
        seen.append((adapter, options["position_ids"].tolist()))

    handle = made.base.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def words(*ids: int) -> str:
    """A prompt of the tokens ``w<id>``."""
    return " ".join(f"w{i}" for i in ids)


PROMPTS = (
    words(3),
    words(1, 2, 3, 4, 5),
    words(30, 4, 4, 17),
    words(9, 8, 7, 6, 5, 4, 3, 2, 1),
    words(20, 21),
    words(36, 0, 35, 1, 34, 2),
    words(12, 13, 14),
    words(5, 5, 5, 5, 5, 5, 5, 5),
)


def request(made: LatentReasoner, prompt: str, loop: dict[str, Any] | None = None, **options: Any) -> Request:
    """A prepared request; ``loop`` goes to ``LoopParams``."""
    options.setdefault("max_new_tokens", 6)
    return prepare(made, prompt, LoopParams(**loop or {}), **options)


def ids(prompt: str) -> list[int]:
    """Token ids of a prompt."""
    return list(tokenizer()(prompt).input_ids)


def batch(prompts: tuple[str, ...] | list[str], side: str = "right") -> tuple[Tensor, Tensor]:
    """Padded ids and their mask."""
    made = tokenizer()(list(prompts), padding=True, padding_side=side, return_tensors="pt")
    return made["input_ids"], made["attention_mask"]


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens, a byte each: letters, and the bytes of characters that need two, three and four of them."""
    # The printable stand-ins for bytes that GPT-2 introduced.
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(kept)))}
    letters = {byte: shifted.get(byte, chr(byte)) for byte in range(256)}
    needed = sorted({*b" abcdefghijklmnopqr", *"éèß€😀😎".encode()})
    pieces = ("<pad>", "<eos>", "<unk>", *(letters[byte] for byte in needed))
    pieces += tuple(letters[byte] for byte in b"stuvwxyzABCDEFGHIJKLMNOP")[: len(WORDS) - len(pieces)]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

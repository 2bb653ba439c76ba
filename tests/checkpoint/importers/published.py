"""Tiny checkpoints in the form in which the published projects leave them, written from random weights."""

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from tests import tiny

COCONUT = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")


@dataclass
class Published:
    """A written checkpoint and what it was made of."""

    checkpoint: Path
    base: Path
    model: torch.nn.Module
    vocab: int
    project: Callable[[torch.Tensor], torch.Tensor] = lambda h: h

    def prompt(self, text, *markers):
        """Ids of a text and of markers, which are numbered from 0."""
        return [*tiny.ids(text), *(self.vocab + i for i in markers)]


def write_base(folder, kind):
    """Configuration and tokenizer of a tiny base, and its weights."""
    model = tiny.base(kind)
    model.config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def enlarge(model, count):
    """More rows for an embedding table and an LM head, random like the others."""
    torch.manual_seed(9)
    model.resize_token_embeddings(len(tiny.WORDS) + count, mean_resizing=False)
    return model


def coconut(folder, kind="gpt2", extra=None):
    """A state dict in the form of ``checkpoint_N``; ``extra`` adds tensors."""
    model = enlarge(write_base(folder / "base", kind), 3)
    state = OrderedDict((f"base_causallm.{name}", x.clone()) for name, x in model.state_dict().items())
    state["embedding.weight"] = model.get_input_embeddings().weight.detach().clone()
    torch.save(state | (extra or {}), folder / "checkpoint_7")
    return Published(folder / "checkpoint_7", folder / "base", model, len(tiny.WORDS))


def codi(folder, kind="gpt2", *, rank=2, alpha=3.0, inner=20, norm=True, projected=True, shards=False, extra=None):
    """``pytorch_model.bin`` or shards: a bfloat16 base wrapped by PEFT, fp32 LoRA, a projection.

    ``model`` has the adapter merged, in float64, and ``project`` the projection.
    """
    model = enlarge(write_base(folder / "base", kind), 3)
    with torch.no_grad():  # not model.to(): that would round the rotary frequencies
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    torch.manual_seed(5)
    state, wrapped = OrderedDict(), "codi.base_model.model."
    merged = model.double().state_dict()
    linear_layers = {name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    for name, x in model.state_dict().items():
        layer, _, part = name.rpartition(".")
        adapted = layer in linear_layers and layer != "lm_head"
        linear = adapted and part == "weight"
        if adapted:
            state[f"{wrapped}{layer}.base_layer.{part}"] = x.to(torch.bfloat16).clone()
        else:
            state[wrapped + name] = x.to(torch.bfloat16).clone()
        if linear and rank:
            transposed = kind == "gpt2"
            rows, columns = reversed(x.shape) if transposed else x.shape
            a, b = 0.2 * torch.randn(rank, columns), 0.2 * torch.randn(rows, rank)
            state[f"{wrapped}{layer}.lora_A.default.weight"] = a
            state[f"{wrapped}{layer}.lora_B.default.weight"] = b
            change = alpha / rank * (b.double() @ a.double())
            merged[name] = x + (change.T if transposed else change)
    model.load_state_dict(merged)
    size = model.get_input_embeddings().weight.shape[1]
    parts = [torch.nn.Linear(size, inner), torch.nn.GELU(), torch.nn.Linear(inner, size)]
    parts += [torch.nn.LayerNorm(size)] if norm else []
    project = torch.nn.Sequential(*parts)
    if projected:
        names = {"0": "prj.1", "2": "prj.3", "3": "prj.ln"}
        for name, x in project.state_dict().items():
            place, _, part = name.partition(".")
            state[f"{names[place]}.{part}"] = 3 * x.clone() if place == "3" else x.clone()
        if norm:
            with torch.no_grad():
                project[3].weight.mul_(3)
    state |= extra or {}
    if not rank:
        state = OrderedDict((name.replace(wrapped, "codi.").replace(".base_layer", ""), x) for name, x in state.items())
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    if shards:
        if model.config.tie_word_embeddings:
            state[f"{wrapped}lm_head.weight"] = state[f"{wrapped}{table_name(model)}"]
        save_torch_state_dict(state, checkpoint, max_shard_size=20_000)
        assert len(list(checkpoint.glob("*.safetensors"))) > 1
    else:
        torch.save(state, checkpoint / "pytorch_model.bin")
    (checkpoint / "config.json").write_text("")
    made = Published(checkpoint, folder / "base", model, len(tiny.WORDS))
    if projected:
        made.project = project.double()
    return made


def table_name(model):
    table = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is table) + ".weight"


def simcot_coconut(folder, kind="gpt2"):
    """Coconut's state dict with a second model."""
    second = tiny.base(kind, seed=3).state_dict()
    return coconut(folder, kind, {f"expainable_llm.{name}": x.clone() for name, x in second.items()})


def simcot_codi(folder, kind="gpt2"):
    """CODI's state dict with a second model and its two projections."""
    second = {f"decoder.{name}": x.clone() for name, x in tiny.base(kind, seed=3).state_dict().items()}
    sizes = {"pj_in.weight": (32, 32), "pj_in.bias": (32,), "pj_out.weight": (32, 32), "pj_out.bias": (32,)}
    return codi(folder, kind, extra=second | {name: torch.zeros(size) for name, size in sizes.items()})


PCCOT = ("<pcot.bot>", "<pcot.eot>", "<pcot.latent>", "[PAD]")


def pccot(folder, kind="gpt2", *, adapter=True, projected=False, latents=4, iterations=3, extra=None):
    """A folder of the training script: an adapter with trained rows of the table, or a whole model."""
    base = write_base(folder / "base", kind)
    base.save_pretrained(folder / "base")
    model, checkpoint = enlarge(copy.deepcopy(base), 4), folder / "checkpoint"
    checkpoint.mkdir()
    words = tiny.tokenizer().__class__.from_pretrained(folder / "base")
    words.add_tokens(list(PCCOT))
    words.save_pretrained(checkpoint)
    vocab = len(tiny.WORDS)
    own = {"num_iterations": iterations, "use_projection": projected, "loss_alpha": 1.0, "model_type": f"pccot-{kind}"}
    config = {**json.loads(model.config.to_json_string()), **own}
    (checkpoint / "config.json").write_text(json.dumps(config))
    ids = {f"{name}_token_id": vocab + i for i, name in enumerate(("bot", "eot", "latent"))}
    args = {**ids, "answer_prompt": "w7 w8", "num_latent_tokens": latents, "lora_alpha": 3}
    (checkpoint / "pccot_args.json").write_text(json.dumps(args))
    torch.manual_seed(6)
    size = model.get_input_embeddings().weight.shape[1]
    project = torch.nn.Sequential(
        torch.nn.Linear(size, 20), torch.nn.GELU(), torch.nn.Linear(20, size), torch.nn.LayerNorm(size)
    )
    state = {f"prj.{name}": x.clone() for name, x in project.state_dict().items()} if projected else {}
    if adapter:
        tensors = {f"base_model.model.{name}": x for name, x in state.items()} | _pccot_adapter(checkpoint, model, kind)
        save_file(tensors | (extra or {}), checkpoint / "adapter_model.safetensors")
    else:
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        state |= {name: x.clone() for name, x in model.state_dict().items() if name not in tied}
        save_file(state | (extra or {}), checkpoint / "model.safetensors")
    made = Published(checkpoint, folder / "base", model.double(), vocab)
    if projected:
        made.project = project.double()
    return made


def _pccot_adapter(checkpoint, model, kind):
    """Write the adapter's config, merge it into ``model``, and return its tensors."""
    rank, alpha, vocab, state = 2, 3, len(tiny.WORDS), {}
    indices = [*range(vocab, vocab + 4), tiny.EOS]  # not sorted: the end token comes last
    name = "wte" if kind == "gpt2" else "embed_tokens"
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "trainable_token_indices": {name: indices}}
    (checkpoint / "adapter_config.json").write_text(json.dumps({**settings, "fan_in_fan_out": kind == "gpt2"}))
    wrapped, table = "base_model.model.", table_name(model)
    tables = [table, "lm_head.weight"] if model.config.tie_word_embeddings else [table]
    rows = torch.randn(5, model.get_input_embeddings().weight.shape[1])
    with torch.no_grad():
        for each in tables:
            layer = each.removesuffix(".weight")
            state[f"{wrapped}{layer}.token_adapter.base_layer.weight"] = model.state_dict()[table].clone()
            state[f"{wrapped}{layer}.token_adapter.trainable_tokens_delta"] = rows.clone()
        model.get_input_embeddings().weight[indices] = rows
        if len(tables) == 1:
            state[f"{wrapped}lm_head.weight"] = model.lm_head.weight.clone()
        for layer, module in model.named_modules():
            if not isinstance(module, (torch.nn.Linear, Conv1D)) or layer == "lm_head":
                continue
            transposed = isinstance(module, Conv1D)
            outputs, inputs = reversed(module.weight.shape) if transposed else module.weight.shape
            a, b = 0.2 * torch.randn(rank, inputs), 0.2 * torch.randn(outputs, rank)
            state[f"{wrapped}{layer}.lora_A.weight"], state[f"{wrapped}{layer}.lora_B.weight"] = a, b
            change = alpha / rank * (b.double() @ a.double())
            merged = module.weight.double() + (change.T if transposed else change)
            module.weight = torch.nn.Parameter(merged)
    return state

"""Build the model of a recipe: from random weights, a base model or a latent reasoner; choose what is trained."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slr_core.checkpoint.base_reference import base_source
from slr_core.checkpoint.folder import CONFIG
from slr_core.checkpoint.hub import find_file
from slr_core.checkpoint.pretrained import is_packaged, load_model_and_tokenizer
from slr_core.config import LoopConfig, SLRConfig, TextConfig
from slr_core.errors import CheckpointError, ConfigError
from slr_core.loop.lora import new_adapter_configs
from slr_core.reasoner import LatentReasoner
from slr_core.training.base_config import BaseConfig
from slr_core.training.config import TrainConfig
from slr_core.training.data import MARK, mark_ids
from slr_core.training.prune import prune
from slr_core.training.sources import Listed, Source, open_source
from slr_core.training.tokenizer import prontoqa_tokenizer, prosqa_tokenizer, start_embeddings, word_tokenizer

_SAMPLED = 4000  # questions per generator from which the `words` tokenizer takes its vocabulary


def build(config: TrainConfig) -> LatentReasoner:
    """The latent reasoner that a recipe starts from, reproducible from its seed.

    Raises:
        ConfigError: an objective or an exit criterion does not work with the loop or the base.
        CheckpointError: the model in ``base.from`` cannot be loaded.
    """
    torch.manual_seed(config.seed)
    source = config.base.source
    reasoner = _from_scratch(config) if source is None else _from_source(config, source)
    config.check(reasoner.config.loop, reasoner.config.text)
    if config.writes_steps and config.train == "full" and not mark_ids(reasoner.tokenizer):
        _add_mark(reasoner)
    _check_end_token(reasoner, config)
    if config.max_iterations != 0:
        reasoner.config = reasoner.config.replace(trained=True)
    set_trainable(reasoner, config.train)
    if not any(parameter.requires_grad for parameter in reasoner.parameters()):
        raise ConfigError(f"train `{config.train}` leaves nothing to train: this loop has no weights of its own")
    return reasoner


def _check_end_token(reasoner: LatentReasoner, config: TrainConfig) -> None:
    """Check that a loop whose thoughts stand for a chain ends at the separator that is written after it."""
    loop, mark = reasoner.config.loop, mark_ids(reasoner.tokenizer)
    ends = loop.convergence.criterion == "end_token" and config.thinks_by_token(loop)
    if ends and mark and loop.convergence.end_token_id != mark[-1]:
        raise ConfigError(
            f"loop.convergence.end_token_id must be {mark[-1]}, this base's token of the separator `{MARK}` after a "
            f"chain, got {loop.convergence.end_token_id}"
        )


def set_trainable(reasoner: LatentReasoner, train: str) -> None:
    """Freeze the parameters that ``train`` (a value of :attr:`TrainConfig.train`) leaves out."""
    reasoner.requires_grad_(True)
    if train == "full":
        return
    for name, parameter in reasoner.base.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    if train == "adapters_and_embeddings":
        reasoner.base.get_input_embeddings().requires_grad_(True)
        head: nn.Module = reasoner.base.get_output_embeddings()  # type: ignore[no-untyped-call]
        head.requires_grad_(True)


def load_teacher(config: TrainConfig, student: LatentReasoner) -> LatentReasoner | None:
    """Load the frozen teacher of the objectives ``teacher_*``; ``None`` if the recipe has none.

    A causal language model without a loop is a teacher too: see :attr:`Rollout.teacher_rollout`.

    Raises:
        ConfigError: teacher and student have different vocabularies.
    """
    if config.teacher is None:
        return None
    teacher = _load_teacher(config.teacher).requires_grad_(False)
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise ConfigError(f"teacher: {config.teacher} and the model that is trained have different vocabularies")
    if config.objectives.teacher_states and not teacher.config.trained:
        raise ConfigError(f"teacher: {config.teacher} has no trained loop, whose states teacher_states would need")
    return teacher


def _load_teacher(source: str) -> LatentReasoner:
    if find_file(source, CONFIG) is not None:
        return LatentReasoner.from_pretrained(source)
    base, tokenizer = load_model_and_tokenizer(source)
    without_loop = {"trained": False, "loop": {"lora": {"kind": "none"}, "timestep": {"kind": "none"}}}
    return LatentReasoner(base, tokenizer, SLRConfig.from_dict(without_loop)).eval()


def _from_source(config: TrainConfig, source: str) -> LatentReasoner:
    found = None if is_packaged(source) or source.endswith(".gguf") else find_file(source, CONFIG)
    if found is None:
        if config.base.keep_adapters:
            raise ConfigError(f"base.keep_adapters needs a latent reasoner in base.from, and {source} is none")
        base, tokenizer = load_model_and_tokenizer(source)
        base = _pruned(base, config.base)
        return LatentReasoner(base, _with_padding(tokenizer), _settings(config.loop, config.text))
    loaded = LatentReasoner.from_pretrained(source)
    _with_padding(loaded.tokenizer)  # it may be that of a base model, as after `slr init`
    if config.loop is None:
        if config.text is not None:
            loaded.config = loaded.config.replace(text=config.text.model_dump(mode="json"))
        return loaded
    # Only its base, and its adapters if the recipe keeps them: the recipe defines a new loop.
    base, _ = load_model_and_tokenizer(base_source(found.parent, loaded.config)[0], tokenizer_from=str(found.parent))
    base = _pruned(base, config.base)
    settings = _settings(config.loop, config.text or loaded.config.text)
    if not config.base.keep_adapters:
        return LatentReasoner(base, loaded.tokenizer, settings)
    _check_adapters(loaded, settings.loop)
    reasoner = LatentReasoner(base, loaded.tokenizer, settings, loaded.adapter_configs)
    weights = {name: x for name, x in loaded.base.state_dict().items() if ".lora_" in name}
    reasoner.base.load_state_dict(weights, strict=False)
    return reasoner


def _check_adapters(source: LatentReasoner, loop: LoopConfig) -> None:
    """Check that a loop has the adapters of ``source``."""
    own = source.config.loop.lora
    if loop.lora != own or own.kind == "none":
        raise ConfigError(
            f"base.keep_adapters: loop.lora must be that of the checkpoint in base.from, "
            f"{own.model_dump(mode='json', exclude_defaults=True)}"
        )
    if new_adapter_configs(loop).keys() != source.adapter_configs.keys():
        raise ConfigError(
            f"base.keep_adapters: the checkpoint in base.from has the adapters {', '.join(source.adapter_configs)}, "
            f"the recipe's loop {', '.join(new_adapter_configs(loop))}: loop.trained_iterations must be its own, "
            f"{source.config.loop.trained_iterations}, and an adapter `decode` needs loop.lora.decode_rank"
        )


def _pruned(base: PreTrainedModel, sizes: BaseConfig) -> PreTrainedModel:
    return prune(base, sizes.num_attention_heads, sizes.intermediate_size) if sizes.is_pruned else base


def _add_mark(reasoner: LatentReasoner) -> None:
    """Give the vocabulary a token for the separator of written steps, which begins as the mean of all others."""
    reasoner.tokenizer.add_tokens([AddedToken(MARK, lstrip=True, rstrip=True)])
    token, base = len(reasoner.tokenizer) - 1, reasoner.base
    table: Any = base.get_input_embeddings()
    if token >= len(table.weight):  # it may have spare rows
        base.resize_token_embeddings(token + 1, mean_resizing=False)
    tables: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for table in tables:
            table.weight[token] = table.weight[:token].mean(0)


def _settings(loop: LoopConfig | None, text: TextConfig | None) -> SLRConfig:
    return SLRConfig(trained=False, loop=loop or LoopConfig(), text=text or TextConfig())


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.eos_token is None:
        raise ConfigError("base.from: the tokenizer has no end-of-text token: answers could not end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token will do
    return tokenizer


def _from_scratch(config: TrainConfig) -> LatentReasoner:
    tokenizer = _tokenizer(config)
    base = _random_model(config.base, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    if config.base.tokenizer in ("prosqa", "prontoqa"):
        generator = torch.Generator().manual_seed(config.seed)
        table: nn.Module = base.get_input_embeddings()
        table.load_state_dict({"weight": start_embeddings(tokenizer, config.base.hidden_size, generator)})
    return LatentReasoner(base, tokenizer, _settings(config.loop, config.text))


def _tokenizer(config: TrainConfig) -> Any:
    kind = config.base.tokenizer
    if kind == "prosqa":
        return prosqa_tokenizer(chain_of_thought=config.writes_steps)
    if kind == "prontoqa":
        return prontoqa_tokenizer()
    if kind == "words":
        texts = [f" {MARK}"] if config.writes_steps else []
        text = config.text or TextConfig()
        texts += [text.prompt_prefix, text.prompt_suffix, text.answer_prefix]
        for source in {data.model_dump_json(): data for stage in config.schedule for data in stage.data}.values():
            texts += _sample(open_source(source, config.seed, config.held_out), config.seed)
        return word_tokenizer(texts)
    try:
        return _with_padding(AutoTokenizer.from_pretrained(kind, trust_remote_code=False))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(f"base.tokenizer: {kind} cannot be loaded ({''.join(first)})") from error


def _sample(source: Source, seed: int) -> Iterator[str]:
    examples = source.examples if isinstance(source, Listed) else source.draw(0, _SAMPLED, random.Random(seed))
    for example in examples:
        yield from (example.question, example.answer, f" {example.answer}")
        yield from (f"{blank}{step}" for step in example.steps for blank in ("", " "))


def _random_model(base: BaseConfig, vocabulary: int, eos: Any, pad: Any) -> PreTrainedModel:
    shared = {
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
    made: PreTrainedConfig
    if base.model_type == "gpt2":
        made = GPT2Config(
            n_embd=base.hidden_size,
            n_inner=base.intermediate_size,
            n_layer=base.num_hidden_layers,
            n_head=base.num_attention_heads,
            n_positions=base.max_position_embeddings,
            embd_pdrop=0.0,  # its defaults are for long training on a fixed corpus; here questions are new
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            **shared,
        )
    else:
        made = LlamaConfig(
            hidden_size=base.hidden_size,
            intermediate_size=base.intermediate_size,
            num_hidden_layers=base.num_hidden_layers,
            num_attention_heads=base.num_attention_heads,
            num_key_value_heads=base.num_attention_heads,
            max_position_embeddings=base.max_position_embeddings,
            **shared,
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
    return model

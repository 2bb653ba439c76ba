"""``slr train``: the recipe in a YAML file, run by ``transformers.Trainer``."""

from __future__ import annotations

import json
import platform
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import is_tensorboard_available
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from slr_core._version import __version__
from slr_core.checkpoint import load_weights
from slr_core.config import SLRConfig
from slr_core.errors import ConfigError, TrainingError
from slr_core.model import LatentReasoner
from slr_core.training.config import ObjectiveWeights, ScratchConfig, TrainConfig
from slr_core.training.data import Collator, StageStream
from slr_core.training.objectives import losses
from slr_core.training.tokenizer import prosqa_tokenizer, start_embeddings

MANIFEST = "training.json"


class Objective(nn.Module):
    """The reasoner as the Trainer sees it: a module that maps a batch to loss terms."""

    def __init__(self, reasoner: LatentReasoner, weights: ObjectiveWeights) -> None:
        super().__init__()
        self.reasoner, self.weights = reasoner, weights

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Unweighted loss terms."""
        return losses(self.reasoner, batch, self.weights)


class LoopTrainer(Trainer):
    """A ``Trainer`` whose loss is the weighted sum of the loop's objectives, each of them logged.

    Its checkpoints are checkpoint folders: any of them can be served.
    """

    def __init__(self, config: TrainConfig, **options: Any) -> None:
        super().__init__(**options)
        self.recipe = config
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The weighted sum of the terms."""
        weights = self.recipe.objectives
        terms: dict[str, Tensor] = model(**inputs)
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros(())) + value.detach()
        self._batches += 1
        # Without a loop, h_0 alone writes the answer's first token: `start` carries the full weight of `answer`.
        scale = {"start": weights.answer} if inputs["plan"].iterations == 0 else {}
        return torch.stack([scale.get(name, getattr(weights, name)) * value for name, value in terms.items()]).sum()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Never replace good weights by broken ones, also between two looks at the loss.
        finite = all(bool(p.isfinite().all()) for p in self._reasoner().parameters())
        if self.args.should_save and finite:
            self._reasoner().save_pretrained(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self._reasoner(), resume_from_checkpoint)

    def _reasoner(self) -> LatentReasoner:
        reasoner = self.accelerator.unwrap_model(self.model).reasoner
        assert isinstance(reasoner, LatentReasoner)
        return reasoner

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term since the last log."""
        if "loss" in logs and self._batches:
            logs |= {name: round(float(total) / self._batches, 4) for name, total in self._sums.items()}
            self._sums, self._batches = {}, 0
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Linear warm-up, then a cosine down to ``final_share`` of the learning rate."""
        if self.lr_scheduler is None:
            recipe = self.recipe.optimizer

            def factor(step: int) -> float:
                warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
                fall = 0.5 * (1 + cos(pi * min(1.0, step / num_training_steps)))
                return warm * (recipe.final_share + (1 - recipe.final_share) * fall)

            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = LambdaLR(optimizer, factor)
        return self.lr_scheduler


class _StopOnNaN(TrainerCallback):
    """Stops a run whose loss is no longer finite: the last checkpoint stays good."""

    failed_at: int | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not isfinite(loss):
            self.failed_at = state.global_step
            control.should_training_stop, control.should_save = True, False


def build(config: TrainConfig) -> LatentReasoner:
    """The untrained latent reasoner of a recipe, reproducible from its seed."""
    torch.manual_seed(config.seed)
    tokenizer = prosqa_tokenizer(chain_of_thought=config.chain_of_thought)
    base = _scratch(config.base, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(config.seed)
    table: nn.Module = base.get_input_embeddings()
    table.load_state_dict({"weight": start_embeddings(tokenizer, config.base.hidden_size, generator)})
    return LatentReasoner(base, tokenizer, SLRConfig(loop=config.loop, text=config.text))


def _scratch(base: ScratchConfig, vocabulary: int, eos: Any, pad: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=base.hidden_size,
            intermediate_size=base.intermediate_size,
            num_hidden_layers=base.num_hidden_layers,
            num_attention_heads=base.num_attention_heads,
            num_key_value_heads=base.num_attention_heads,
            max_position_embeddings=base.max_position_embeddings,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=pad,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
    )


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train a recipe and write the checkpoint folder ``output_dir``; the path is returned.

    The Trainer's own checkpoints (optimizer, scheduler, step) lie below ``output_dir/steps``, from where
    ``resume`` goes on.

    Raises:
        ConfigError: there is nothing to resume.
        TrainingError: the loss stopped being finite.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    reasoner = build(config)
    output, optimizer = Path(config.output_dir), config.optimizer
    arguments = TrainingArguments(
        output_dir=str(output / "steps"),
        max_steps=config.total_steps,
        per_device_train_batch_size=optimizer.batch_size,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta2=optimizer.adam_beta2,
        max_grad_norm=optimizer.max_grad_norm,
        warmup_steps=optimizer.warmup_steps,
        logging_steps=50,
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=8,
        dataloader_pin_memory=False,
        dataloader_persistent_workers=True,
        remove_unused_columns=False,
        report_to=["tensorboard"] if is_tensorboard_available() else [],  # type: ignore[no-untyped-call]
        logging_nan_inf_filter=False,
        ignore_data_skip=True,  # the stream itself starts where a resumed run goes on
    )
    steps = Path(str(arguments.output_dir))
    last = get_last_checkpoint(str(steps)) if resume and steps.is_dir() else None  # type: ignore[no-untyped-call]
    if resume and last is None:
        raise ConfigError(f"--resume: no checkpoint below {steps}")
    state = TrainerState() if last is None else TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME))
    watch = _StopOnNaN()
    trainer = LoopTrainer(
        config,
        model=Objective(reasoner, config.objectives),
        args=arguments,
        train_dataset=StageStream(config, state.global_step),
        data_collator=Collator(
            reasoner.tokenizer,
            config.text.prompt_prefix,
            config.text.prompt_suffix,
            chain_of_thought=config.chain_of_thought,
        ),
        callbacks=[watch],
    )
    if last is not None and state.global_step >= config.total_steps:
        load_weights(reasoner, last)  # interrupted between its last step and the end
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=last)
    if watch.failed_at is not None:
        raise TrainingError(
            f"the loss was not finite at step {watch.failed_at}; the last checkpoint in {steps} is kept"
        )
    reasoner.eval().save_pretrained(str(output))
    (output / MANIFEST).write_text(json.dumps(_manifest(config, trainer), indent=2) + "\n", encoding="utf-8")
    return output


def _manifest(config: TrainConfig, trainer: LoopTrainer) -> dict[str, Any]:
    return {
        "recipe": config.model_dump(mode="json", exclude={"output_dir"}),
        "graphs": config.total_steps * config.optimizer.batch_size,
        "steps": trainer.state.global_step,
        "last_log": trainer.state.log_history[-2] if len(trainer.state.log_history) > 1 else {},
        "seconds_since_start_or_resume": round(trainer.state.log_history[-1].get("train_runtime", 0.0))
        if trainer.state.log_history
        else 0,
        "versions": {
            "slr": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }

"""``slr train``: the recipe in a YAML file, run by ``transformers.Trainer``."""

from __future__ import annotations

import json
import os
import platform
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import is_tensorboard_available
from transformers.trainer import TRAINER_STATE_NAME

from slr_core._version import __version__
from slr_core.checkpoint.read import load_weights
from slr_core.errors import ConfigError, TrainingError
from slr_core.model.base_support import hidden_size
from slr_core.model.reasoner import LatentReasoner
from slr_core.training.build import build, teacher_of
from slr_core.training.config import TrainConfig
from slr_core.training.data import Collator, Share, StageStream
from slr_core.training.objectives import Mean, Rollout, losses
from slr_core.training.watch import Watch

MANIFEST = "training.json"
BRIDGE = "bridge.safetensors"


class Objective(nn.Module):
    """The reasoner as the Trainer sees it: a module that maps a batch to loss terms.

    Args:
        reasoner: what is trained.
        config: the recipe.
        teacher: frozen; for the objectives ``teacher_*``.
    """

    def __init__(self, reasoner: LatentReasoner, config: TrainConfig, teacher: LatentReasoner | None = None) -> None:
        super().__init__()
        self.reasoner, self.recipe, self.teacher = reasoner, config, teacher  # `config` would be the Trainer's to set
        self.bridge: nn.Module | None = None
        if teacher is not None and config.objectives.teacher_states:
            self.bridge = nn.Linear(hidden_size(reasoner.base), hidden_size(teacher.base), bias=False)

    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Mean], dict[str, Tensor]]:
        """Unweighted loss terms, and figures for the log."""
        run = Rollout(self.reasoner, batch, self.recipe, self.teacher, self.bridge)
        return losses(run), _figures(run)


def _figures(run: Rollout) -> dict[str, Tensor]:
    if run.iterations < 2:
        return {}
    last, before = run.states[:, -1].detach().float(), run.states[:, -2].detach().float()
    return {
        "state_norm": last.norm(dim=-1).mean(),
        "last_relative_change": ((last - before).norm(dim=-1) / before.norm(dim=-1)).mean(),
    }


class LoopTrainer(Trainer):
    """A ``Trainer`` whose loss is the weighted sum of the loop's objectives, each of them logged.

    Its checkpoints are checkpoint folders: any of them can be served.
    """

    def __init__(self, config: TrainConfig, first_step: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.recipe, self.first_step = config, first_step
        self.watch = Watch(config.guard)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._gradient_norms: list[float] = []

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The recipe's batches, this process's own part of each."""
        share = Share(self.args.process_index, self.args.world_size, self.recipe.optimizer.accumulate)
        return DataLoader(
            StageStream(self.recipe, self.first_step, share),
            batch_size=None,
            collate_fn=self.data_collator,
            num_workers=1,
            prefetch_factor=8,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The weighted sum of the terms, as if one process had the whole batch.

        Raises:
            TrainingError: the loss is not finite, or has exploded.
        """
        terms, figures = model(inputs)
        weights, processes = self.recipe.objectives, self.args.world_size
        # Every process divides by what all have; averaging their gradients then gives the whole batch's.
        counts = self.accelerator.reduce(torch.stack([term.divisor for term in terms.values()]).float(), "sum")
        # Without a loop, h_0 alone writes the answer's first token: `start` carries the full weight of `answer`.
        scale = {"start": weights.answer} if inputs["plan"].iterations == 0 else {}
        loss = torch.zeros((), device=counts.device)
        for (name, term), count in zip(terms.items(), counts, strict=True):
            value = term.total * processes / count.clamp_min(1)
            self._note(name, value)
            loss = loss + scale.get(name, getattr(weights, name)) * value
        for name, value in figures.items():
            self._note(name, value)
        whole = self.accelerator.reduce(loss.detach(), "mean")
        self.watch.loss(float(whole), self.state.global_step)
        return loss

    def _note(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        self._counts[name] = self._counts.get(name, 0) + 1

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))  # type: ignore[no-untyped-call]
        self.watch.gradient(norm, self.state.global_step)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Never replace good weights by broken ones, also between two looks at the loss.
        if self.watch.calm and all(bool(p.isfinite().all()) for p in self._reasoner().parameters()):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        self._reasoner().save_pretrained(str(folder))
        if (bridge := self._objective().bridge) is not None:
            save_file(bridge.state_dict(), folder / BRIDGE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self._reasoner(), resume_from_checkpoint)
        if (bridge := self._objective().bridge) is not None:
            bridge.load_state_dict(load_file(Path(resume_from_checkpoint) / BRIDGE))

    def _objective(self) -> Objective:
        objective = self.accelerator.unwrap_model(self.model)
        assert isinstance(objective, Objective)
        return objective

    def _reasoner(self) -> LatentReasoner:
        return self._objective().reasoner

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term and figure since the last log."""
        if "loss" in logs and self._sums:
            means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
            shared = self.accelerator.reduce(means, "mean").tolist()
            logs |= {name: round(value, 4) for name, value in zip(self._sums, shared, strict=True)}
            self._sums, self._counts = {}, {}
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


class _ResetOptimizer(TrainerCallback):
    """Makes AdamW forget its moments where a stage asks for it, as Coconut's code does at a switch of stages."""

    def __init__(self, config: TrainConfig) -> None:
        starts, step = set(), 0
        for stage in config.schedule:
            if stage.reset_optimizer:
                starts.add(step)
            step += stage.steps
        self.starts = starts

    def on_step_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        if state.global_step in self.starts:
            about["optimizer"].state.clear()


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train a recipe and write the checkpoint folder ``output_dir``; the path is returned.

    The Trainer's own checkpoints (optimizer, scheduler, step) lie below ``output_dir/steps``, from where
    ``resume`` goes on: from the last complete one, or from the beginning where the run had not got to any.

    Raises:
        ConfigError: there is nothing to resume, or the batch cannot be shared among the processes.
        TrainingError: the run diverged.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    output, optimizer = Path(config.output_dir), config.optimizer
    steps = output / "steps"
    if resume and not steps.is_dir():
        raise ConfigError(f"--resume: no run was started in {output}")
    arguments = TrainingArguments(
        output_dir=str(steps),
        max_steps=config.total_steps,
        per_device_train_batch_size=optimizer.batch_size,
        gradient_accumulation_steps=optimizer.accumulate,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta2=optimizer.adam_beta2,
        max_grad_norm=optimizer.max_grad_norm,
        warmup_steps=optimizer.warmup_steps,
        logging_steps=config.log_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=not torch.accelerator.is_available(),  # or bf16 would be refused there
        ddp_find_unused_parameters=True,  # a batch need not reach every iteration's adapter
        remove_unused_columns=False,
        report_to=["tensorboard"] if is_tensorboard_available() else [],  # type: ignore[no-untyped-call]
        logging_nan_inf_filter=False,
        ignore_data_skip=True,  # the stream itself starts where a resumed run goes on
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # a process has one device: more are for torchrun or accelerate to launch
    parts = arguments.world_size * optimizer.accumulate
    if optimizer.batch_size % parts:
        raise ConfigError(f"optimizer.batch_size must be a multiple of {parts}, processes times optimizer.accumulate")
    last = _last_complete(steps)
    if last is not None and not resume:
        raise ConfigError(f"{output} holds a run already: --resume goes on with it, or choose another output_dir")
    first_step = 0 if last is None else TrainerState.load_from_json(str(last / TRAINER_STATE_NAME)).global_step
    reasoner = build(config)
    trainer = LoopTrainer(
        config,
        first_step,
        model=Objective(reasoner, config, teacher_of(config, reasoner)),
        args=arguments,
        train_dataset=StageStream(config, first_step),
        data_collator=Collator(reasoner.tokenizer, config, reasoner.config.text),
        callbacks=[_ResetOptimizer(config)],
    )
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except TrainingError as error:
        raise TrainingError(f"{error}; the last checkpoint in {steps} is kept") from error
    if arguments.should_save:
        reasoner.eval().save_pretrained(str(output))
        manifest = json.dumps(_manifest(config, trainer), indent=2) + "\n"
        partial = output / f"{MANIFEST}.partial"
        partial.write_text(manifest, encoding="utf-8")
        os.replace(partial, output / MANIFEST)  # whoever finds it finds a whole one, and whole weights beside it
    return output


def _last_complete(steps: Path) -> Path | None:
    """The newest checkpoint that was saved to the end: the Trainer writes its state last."""
    found = sorted(steps.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)
    for folder in found:
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return folder
    return None


def _manifest(config: TrainConfig, trainer: LoopTrainer) -> dict[str, Any]:
    history = trainer.state.log_history
    logged = [entry for entry in history if "loss" in entry]
    stream = trainer.train_dataset
    assert isinstance(stream, StageStream)
    sources = {source.about: source.sha256 for stage in stream.sources for source in stage}
    return {
        "recipe": config.model_dump(mode="json", by_alias=True, exclude={"output_dir"}),
        "questions": config.total_steps * config.optimizer.batch_size,
        "steps": trainer.state.global_step,
        "data": [{"source": about, "sha256": digest} for about, digest in sources.items()],
        "last_log": logged[-1] if logged else {},
        "seconds_since_start_or_resume": round(history[-1].get("train_runtime", 0.0)) if history else 0,
        "versions": {
            "slr": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }

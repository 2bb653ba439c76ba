"""``slr train``: run a recipe with ``transformers.Trainer``."""

from __future__ import annotations

import json
import platform
import sys
import time
from contextlib import nullcontext
from math import cos, log, pi
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import is_tensorboard_available
from transformers.trainer import TRAINER_STATE_NAME

from slr_core._version import __version__
from slr_core.checkpoint.read import load_weights
from slr_core.checkpoint.validate import check_tensors, read_tensors
from slr_core.errors import ConfigError, DataError, RequestError, TrainingError
from slr_core.reasoner import LatentReasoner
from slr_core.training.build import build, load_teacher
from slr_core.training.callbacks import RecipeIntervals, ResetOptimizer
from slr_core.training.card import write_training_card
from slr_core.training.config import TrainConfig
from slr_core.training.data import IGNORE, Collator, Share, StageStream, check_longest, unknown_share
from slr_core.training.guard import TrainingGuard
from slr_core.training.held_out import HeldOutSet, answer_held_out, held_out_sets, write_held_out
from slr_core.training.loader import BatchLoader
from slr_core.training.loss_module import LossModule
from slr_core.training.memory import keep_freed_memory
from slr_core.training.progress import ProgressReport
from slr_core.training.resume import (
    GUARD,
    check_run,
    claim,
    describe_inputs,
    find_start,
    is_finished,
    reading,
    write_json,
    write_run,
    writing,
)
from slr_core.training.sharded import WholeCopy, is_sharded_run
from slr_core.training.term_log import TermLog

MANIFEST = "training.json"
BRIDGE = "bridge.safetensors"
_FULL_NAME = f"{DataError.__module__}.{DataError.__qualname__}"


def _count_tokens(batch: dict[str, Any]) -> int:
    """Tokens of prompts, answers and chains of a batch, without padding."""
    texts = sum(int((batch[name] != IGNORE).sum()) for name in ("answer_ids", "cot_ids") if name in batch)
    return texts + int(batch["attention_mask"].sum())


class LoopTrainer(Trainer):
    """A ``Trainer`` whose loss is the weighted sum of the objectives. It logs each term.

    Every checkpoint that it saves can be served.
    """

    def __init__(self, config: TrainConfig, first_step: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.recipe, self.first_step = config, first_step
        uniform = log(len(self.reasoner.tokenizer)) * sum(weight for _, weight in config.objectives)
        self.guard = TrainingGuard(config.guard, uniform, config.optimizer.max_grad_norm)
        self._terms = TermLog()
        self._loader: BatchLoader | None = None
        self._tokens, self._since = 0, time.perf_counter()
        self._whole = WholeCopy(self._loss_module()) if is_sharded_run() and self.args.should_save else None

    def get_train_dataloader(self) -> BatchLoader:
        """This process's part of each batch."""
        share = Share(self.args.process_index, self.args.world_size, self.recipe.optimizer.accumulate)
        self._loader = BatchLoader(StageStream(self.recipe, self.first_step, share), self.data_collator)
        return self._loader

    def close_loader(self) -> None:
        """End the process that makes the batches."""
        if self._loader is not None:
            self._loader.close()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The weighted sum of the terms, as if one process had the whole batch.

        Raises:
            TrainingError: the run diverged.
        """
        terms, log_values = model(inputs)
        self._tokens += _count_tokens(inputs)
        weights, processes = self.recipe.objectives, self.args.world_size
        # Each process divides by the total count: the average of the gradients is then that of the whole batch.
        counts = self.accelerator.reduce(torch.stack([term.divisor for term in terms.values()]).float(), "sum")
        loss = torch.zeros((), device=counts.device)
        for (name, term), count in zip(terms.items(), counts, strict=True):
            value = term.total * processes / count.clamp_min(1)
            self._terms.add(name, value, count)
            loss = loss + getattr(weights, name) * value
        for name, value in log_values.items():
            self._terms.add(name, value)
        mean = self.accelerator.reduce(loss.detach(), "mean")
        self.guard.check_loss(float(mean), self.state.global_step)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))  # type: ignore[no-untyped-call]
        self.guard.check_gradient(norm, self.state.global_step)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Never replace good weights with bad ones. A sharded parameter is looked at where its parts are.
        parts = (p.to_local() if isinstance(p, DTensor) else p for p in self.reasoner.parameters())
        finite = torch.tensor(float(all(bool(part.isfinite().all()) for part in parts)), device=self.args.device)
        if self.guard.is_stable and float(self.accelerator.reduce(finite, "mean")) == 1:
            with writing(str(self.args.output_dir)):
                super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        module = self._loss_module()
        if self._whole is not None:
            assert state_dict is not None
            module = cast(LossModule, self._whole.fill(state_dict))
        module.reasoner.save_pretrained(str(folder))
        if (bridge := module.bridge) is not None:
            save_file(bridge.state_dict(), folder / BRIDGE)
        write_json(folder / GUARD, self.guard.state())

    def collect(self) -> LatentReasoner:
        """What is trained, whole, in the process that saves; to be called in all processes."""
        if not self.is_fsdp_enabled:
            return self.reasoner
        weights = self.accelerator.get_state_dict(self.model)
        return self.reasoner if self._whole is None else cast(LossModule, self._whole.fill(weights)).reasoner

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.reasoner, resume_from_checkpoint)
        if (bridge := self._loss_module().bridge) is not None:
            path = Path(resume_from_checkpoint) / BRIDGE
            found = read_tensors(path)
            check_tensors(path, found, bridge.state_dict())
            bridge.load_state_dict(found)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
                self.guard.restore(json.loads((Path(checkpoint) / GUARD).read_text(encoding="utf-8")))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading(checkpoint):
                super()._load_rng_state(checkpoint)

    @property
    def reasoner(self) -> LatentReasoner:
        """What is trained."""
        return self._loss_module().reasoner

    def _loss_module(self) -> LossModule:
        objective = self.accelerator.unwrap_model(self.model)
        assert isinstance(objective, LossModule)
        return objective

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each term and value, and the tokens per second, since the last log."""
        if "loss" in logs and (terms := self._terms.take_means()):
            means = torch.stack(list(terms.values()))
            shared = self.accelerator.reduce(means, "mean").tolist()
            logs |= {name: round(value, 4) for name, value in zip(terms, shared, strict=True)}
            now = time.perf_counter()
            tokens = self.accelerator.reduce(torch.tensor(self._tokens, device=means.device), "sum")
            logs["tokens_per_second"] = round(float(tokens) / (now - self._since), 1)
            self._tokens, self._since = 0, now
            for name in self._terms.take_empty():
                if self.is_world_process_zero():
                    what = type(self.recipe.objectives).model_fields[name].description
                    print(f"objectives.{name} has had no effect so far: it is the {what}", file=sys.stderr)
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Linear warm-up, then cosine decay to ``final_share`` of the learning rate."""
        if self.lr_scheduler is None:
            recipe = self.recipe.optimizer

            def factor(step: int) -> float:
                warm_up = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
                decay = 0.5 * (1 + cos(pi * min(1.0, step / num_training_steps)))
                return warm_up * (recipe.final_share + (1 - recipe.final_share) * decay)

            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = LambdaLR(optimizer, factor)
        return self.lr_scheduler


def train(config: TrainConfig, *, resume: bool = False, command: str | None = None) -> Path:
    """Train a recipe, write the checkpoint, with a model card, to the folder ``output_dir`` and return its path.

    The Trainer's checkpoints, with optimizer, scheduler and step, are in ``output_dir/steps``. With ``resume``,
    training continues from the last complete one, or starts again if there is none; a finished run stays as it is.

    Args:
        config: the recipe.
        resume: continue an interrupted run.
        command: the command line, for the model card.

    Raises:
        ConfigError: there is nothing to resume, the run was started with another recipe or other data, another process
            trains in ``output_dir``, it cannot be written, or the batch cannot be divided among the processes.
        CheckpointError: the base model cannot be loaded.
        DataError: questions cannot be read, or do not fit the task or the model.
        TrainingError: the run diverged, or a checkpoint cannot be written.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    output, optimizer = Path(config.output_dir), config.optimizer
    steps = output / "steps"
    if resume and is_sharded_run():
        raise ConfigError("--resume: a sharded run (FSDP) cannot be resumed")
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
        use_cpu=not torch.accelerator.is_available(),
        save_only_model=is_sharded_run(),
        ddp_find_unused_parameters=True,  # a batch may not use every iteration's adapter
        remove_unused_columns=False,
        report_to=["tensorboard"] if is_tensorboard_available() else [],  # type: ignore[no-untyped-call]
        logging_nan_inf_filter=False,
        disable_tqdm=True,  # ProgressReport is in its place
        ignore_data_skip=True,  # StageStream starts at first_step
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one device per process: torchrun or accelerate start several
    parts = arguments.world_size * optimizer.accumulate
    if optimizer.batch_size % parts:
        raise ConfigError(f"optimizer.batch_size must be a multiple of {parts}, processes times optimizer.accumulate")
    if resume and is_finished(output / MANIFEST, config):
        print(f"the run in {output} is finished", file=sys.stderr)
        return output
    last = find_start(output, config, resume=resume)
    first_step = 0
    if last is not None:
        with reading(last):
            first_step = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME)).global_step
    stream = StageStream(config, first_step)  # before the model: it is quicker to read
    held_out = held_out_sets(config)
    reasoner = build(config)
    teacher = load_teacher(config, reasoner)
    collator = Collator(
        reasoner.tokenizer,
        config,
        reasoner.config.text,
        _room(config, reasoner, *([] if teacher is None else [teacher])),
        by_token=config.thinks_by_token(reasoner.config.loop),
    )
    check_longest(stream, collator)
    if unknown := unknown_share(stream, reasoner.tokenizer):
        print(
            f"the tokenizer does not know {unknown:.0%} of the tokens of the questions: see base.tokenizer",
            file=sys.stderr,
        )
    untrained = range(config.longest + 1, reasoner.config.loop.trained_iterations + 1)
    if config.max_iterations != 0 and untrained:
        print(
            f"iterations {untrained[0]} to {untrained[-1]} of the loop are not trained: no stage has more than "
            f"{config.longest}; see loop.trained_iterations",
            file=sys.stderr,
        )
    inputs = describe_inputs(config, stream, reasoner, teacher)
    if last is not None:
        check_run(steps, inputs)
    with claim(steps) if arguments.should_save else nullcontext():
        if arguments.should_save:
            if find_start(output, config, resume=resume) != last:
                raise ConfigError(f"output_dir: another process has trained in {output} meanwhile")
            write_run(steps, config, inputs)
        if resume:
            start = f"step 0: {steps} has no complete checkpoint" if last is None else str(last)
            print(f"continuing from {start}", file=sys.stderr)
        report = ProgressReport()
        trainer = LoopTrainer(
            config,
            first_step,
            model=LossModule(reasoner, config, teacher),
            args=arguments,
            train_dataset=stream,
            data_collator=collator,
            callbacks=[ResetOptimizer(config), RecipeIntervals(), report],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except TrainingError as error:
            raise TrainingError(f"{error}; the last checkpoint in {steps} is kept") from error
        except DataError as error:
            # From a loader process, whose traceback is part of the message; its last line is the message itself.
            raise DataError(str(error).rstrip().rpartition("\n")[2].removeprefix(f"{_FULL_NAME}: ")) from error
        finally:
            report.close()
            trainer.close_loader()
        reasoner = trainer.collect().eval()
        if arguments.should_save:
            _finish(output, config, trainer, reasoner, held_out, command)
    return output


def _finish(
    output: Path,
    config: TrainConfig,
    trainer: LoopTrainer,
    reasoner: LatentReasoner,
    held_out: list[HeldOutSet],
    command: str | None,
) -> None:
    """Write the checkpoint, the held-out questions and what the model makes of them, the card and the manifest."""
    with writing(output):
        reasoner.save_pretrained(str(output))
        for found in held_out:
            if not found.generated:
                write_held_out(found, output)
    answered = []
    for found in held_out:
        try:
            answered.append(answer_held_out(reasoner, found, config))
            print(f"held-out questions, {found.task}: {answered[-1]}", file=sys.stderr)
        except RequestError as error:  # the model is trained all the same
            print(f"held-out questions, {found.task}: not answered ({error})", file=sys.stderr)
    manifest = {**_manifest(config, trainer), "held_out": [result.to_json() for result in answered], "command": command}
    with writing(output):
        write_training_card(output, reasoner, config, manifest, answered, command)
        write_json(output / MANIFEST, manifest)  # last: whoever finds it finds whole weights beside it


def _room(config: TrainConfig, *models: LatentReasoner) -> list[int]:
    """Positions for prompt and answer together in each of the models, by number of iterations."""
    return [
        min(model.max_positions - model.workspace.loop_positions(t if model.config.trained else 0) for model in models)
        for t in range(config.longest + 1)
    ]


def _manifest(config: TrainConfig, trainer: LoopTrainer) -> dict[str, Any]:
    history = trainer.state.log_history
    logged = [entry for entry in history if "loss" in entry]
    stream = trainer.train_dataset
    assert isinstance(stream, StageStream)
    sources = dict.fromkeys((source.description, source.sha256) for stage in stream.sources for source in stage)
    return {
        "recipe": config.model_dump(mode="json", by_alias=True, exclude={"output_dir"}, exclude_none=True),
        "questions": config.total_steps * config.optimizer.batch_size,
        "steps": trainer.state.global_step,
        "data": [{"source": source, "sha256": digest} for source, digest in sources],
        "last_log": logged[-1] if logged else {},
        "seconds_since_start_or_resume": round(history[-1].get("train_runtime", 0.0)) if history else 0,
        "versions": {
            "slr": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }

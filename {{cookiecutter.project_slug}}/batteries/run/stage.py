"""One stage of a run: iteration over epochs with checkpoints, progress and logging."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from batteries.checkpoint.io import make_checkpoint
from batteries.checkpoint.manager import CheckpointManager
from batteries.core.memory import peak_memory, return_freed_memory
from batteries.core.ranks import is_rank_zero, world_size
from batteries.core.signals import Preempted
from batteries.core.text import count_of
from batteries.data.loaders import Batch, EpochBatches
from batteries.run.checkpoint_policy import CheckpointPolicy
from batteries.run.config import RunConfig, StageConfig
from batteries.run.directory import RunDirectory
from batteries.run.logger import RunLogger, finite_or_none
from batteries.run.messages import describe_improvement, epoch_line
from batteries.run.metadata import gpu_name, versions
from batteries.run.position import TrainingPosition
from batteries.run.timing import Stopwatch, profile_steps
from batteries.training.metrics import MeanMetrics
from batteries.training.nonfinite import NonFiniteGuard
from batteries.training.state import TrainState

logger = logging.getLogger("batteries")

LOG_EVERY = 20  # steps between two reads of the metrics for progress and curves: each read waits for the device


@dataclass
class RunParts:
    """What the stages of a run share.

    Attributes:
        config: The options.
        values: The options as JSON values, as they are written.
        model_args: The arguments of build_model.
        data: The fingerprint of the training data and their split.
        code: The sha256 of the user's files.
        device: The device of this process.
        directory: The run directory.
        logger: Log lines, .jsonl files and trackers.
        policy: When to write a checkpoint within an epoch.
        guard: Watches for steps that are skipped.
        total_step: The optimizer steps of the run so far.
        timing: The timing of the last epoch; empty before the first.
        stopped_early: Whether the last stage ended before its last epoch.
        is_profiled: Whether the steps of an epoch were profiled.
        warnings: The warnings that were logged, and are not repeated.
    """

    config: RunConfig
    values: Mapping[str, Any]
    model_args: Mapping[str, Any]
    data: str
    code: Mapping[str, str]
    device: torch.device
    directory: RunDirectory
    logger: RunLogger
    policy: CheckpointPolicy
    guard: NonFiniteGuard
    total_step: int = 0
    timing: dict[str, float] = field(default_factory=dict)
    stopped_early: bool = False
    is_profiled: bool = False
    warnings: set[str] = field(default_factory=set)


class StageRun:
    """One stage of a run. It is the StepLogger of train_fn and valid_fn.

    Attributes:
        position: Where the stage begins, or continues.
        device: The device of this process.
    """

    def __init__(self, parts: RunParts, number: int, state: TrainState, checkpoints: CheckpointManager) -> None:
        self.device = parts.device
        self.position = TrainingPosition(number)
        self.steps_before = parts.total_step  # optimizer steps of the run before this stage
        self._parts = parts
        self._number = number
        self._stage: StageConfig = parts.config.stages[number]
        self._state = state
        self._checkpoints = checkpoints
        self._lr = math.nan  # of the last step
        self._max_lr = 0.0  # the highest of the epoch
        self._running_metrics: list[dict[str, Any]] = []  # of the epoch that is continued

    def restore(self, checkpoint: Mapping[str, Any], name: str, position: TrainingPosition) -> None:
        """Continue in this stage from a checkpoint called `name`."""
        saved = checkpoint["resume"]
        self._state.restore(checkpoint, name)
        self._checkpoints.restore(checkpoint)
        self.position = position
        self._lr = saved["lr"]
        self._max_lr = saved.get("max_lr", saved["lr"])  # a checkpoint of an earlier version has none
        self._running_metrics = saved["running"]
        self._parts.guard.monitor.skipped = saved["skipped"]
        self._parts.guard.streak = saved["row"]
        self._parts.total_step = saved["total_step"]
        self.steps_before = saved["total_step"] - checkpoint["step"]

    def check_state(self) -> None:
        """Raise UserError if a checkpoint cannot hold a value of the state."""
        self._make_checkpoint(1, 0, {}, self.position, running=[])

    def track(self, batches: EpochBatches, metrics: MeanMetrics) -> Iterator[Batch]:
        """Iterate over `batches`: show the progress, keep the time, and write the checkpoints within the epoch.

        Args:
            batches: The micro-batches of one epoch.
            metrics: The metrics of the epoch; restored if the epoch is continued.
        """
        parts = self._parts
        if batches.first_step:
            metrics.restore(self._running_metrics)
        else:
            self._max_lr = 0.0
        watch = Stopwatch(batches, metrics)
        step = batches.first_step
        with profile_steps(self._profile_directory(), len(batches) - step) as profiler:
            for batch in parts.logger.console.track(watch, self._label(batches.epoch), LOG_EVERY):
                yield batch
                if batch.ends_step:
                    step += 1
                    self._after_step(step, batches, watch, metrics)
                    profiler.step()
        self._check_gradients(step, batches)
        return_freed_memory()
        parts.timing = watch.timing(step - batches.first_step)
        parts.timing["peak_memory_bytes"] = peak_memory(self.device)

    def log_step(self, lr: float, gradient_norm: torch.Tensor) -> None:
        """Record one optimizer step; does not wait for the device.

        Args:
            lr: The learning rate of the step.
            gradient_norm: The norm before clipping, shape ().
        """
        self._lr = lr
        self._max_lr = max(self._max_lr, lr)
        self._parts.guard.monitor.add(gradient_norm)

    def warn_once(self, text: str) -> None:
        """Log a warning from rank 0, once in a run."""
        if is_rank_zero() and text not in self._parts.warnings:
            logger.warning(text)
        self._parts.warnings.add(text)

    def log_epoch(
        self, epoch: int, step: int, metrics: Mapping[str, Mapping[str, float]], score: float, *, is_over: bool = False
    ) -> None:
        """Log one epoch: a line on the console, metrics.jsonl, timings.jsonl, and a point for each curve.

        Numbers that are not finite become null in the files, because JSON has none.

        Args:
            epoch: The epoch, from 1.
            step: The optimizer steps of the stage so far.
            metrics: The metrics of train and valid, and of valid_ema if weights are averaged.
            score: The main metric.
            is_over: Whether the stage ends early.
        """
        parts = self._parts
        comment = describe_improvement(score, self._checkpoints.best_score, self._checkpoints.is_better(score))
        parts.total_step = self.steps_before + step
        parts.stopped_early = is_over
        if not is_rank_zero():
            return
        line: dict[str, Any] = {"stage": self._stage.name, "epoch": epoch, "step": step}
        line |= {"lr": self._lr, "max_lr": self._max_lr}
        line |= {split: finite_or_none(values) for split, values in metrics.items()}
        parts.logger.log_epoch(line, parts.timing, parts.total_step)
        logger.info(epoch_line(self._label(epoch), metrics, parts.timing["seconds"], comment))
        if is_over:
            patience = count_of(parts.config.patience or 0, "epoch")
            logger.info(f"{self._stage.name} stopped early: no better score in {patience}.")

    def make_checkpoint(
        self, epoch: int, step: int, metrics: Mapping[str, Any], *, ends_stage: bool = False
    ) -> dict[str, Any]:
        """Build the checkpoint at the end of an epoch. Every rank must call it.

        Args:
            epoch: The epoch, from 1.
            step: The optimizer steps of the stage so far.
            metrics: The metrics of the epoch, by split.
            ends_stage: Whether the stage ends early.
        """
        last = self._stage.epochs if ends_stage else epoch
        return self._make_checkpoint(epoch, step, metrics, TrainingPosition(self._number, last + 1), running=[])

    def raise_if_preempted(self) -> None:
        """Raise Preempted if a signal asked any rank to stop; call it when the epoch is saved."""
        try:
            self._parts.policy.raise_if_preempted()
        except Preempted:
            self._checkpoints.wait()
            raise

    def _after_step(self, step: int, batches: EpochBatches, watch: Stopwatch, metrics: MeanMetrics) -> None:
        """Log curves every LOG_EVERY steps; write a checkpoint if one is due, and end the run after a signal."""
        if step % LOG_EVERY == 0:
            self._check_gradients(step, batches)
            if step < len(batches):  # at the end of an epoch log_epoch logs the point
                self._log_curves(step, batches, watch, metrics)
        save, signal_number = self._parts.policy.should_save(step, len(batches))
        if not save:
            return
        self._check_gradients(step, batches)
        position = TrainingPosition(self._number, batches.epoch, step)
        step_of_stage = self._step_of_stage(step, batches)
        self._checkpoints.save(self._make_checkpoint(batches.epoch, step_of_stage, {}, position, metrics.state()))
        self._parts.policy.note_saved()
        if signal_number:
            self._checkpoints.wait()
            raise Preempted(signal_number)

    def _make_checkpoint(
        self, epoch: int, step: int, metrics: Mapping[str, Any], position: TrainingPosition, running: list
    ) -> dict[str, Any]:
        parts = self._parts
        resume = {
            "cursor": list(position),
            "running": running,
            "data": parts.data,
            "world_size": None if parts.config.shards is not None else world_size(),  # with shards it changes nothing
            "gpu": gpu_name(parts.device),
            "threads": torch.get_num_threads(),
            "code": parts.code,
            "versions": versions(),
            "total_step": self.steps_before + step,
            "unwritten": parts.directory.jsonl.unwritten,
            "skipped": parts.guard.monitor.skipped,
            "row": parts.guard.streak,
            "lr": self._lr,
            "max_lr": self._max_lr,
        }
        return make_checkpoint(
            stage=self._stage.name,
            epoch=epoch,
            model=self._state.model,
            optimizer=self._state.optimizer,
            scheduler=self._state.scheduler,
            metrics=metrics,
            experiment_args=parts.values,
            model_args=parts.model_args,
            step=step,
            extra={**self._state.extra(), "resume": resume},
        )

    def _check_gradients(self, step: int, batches: EpochBatches) -> None:
        lr_flag = f"--stages.{self._number}.lr"
        self._parts.guard.check(self._label(batches.epoch), step, batches.samples_of, lr_flag)

    def _log_curves(self, step: int, batches: EpochBatches, watch: Stopwatch, metrics: MeanMetrics) -> None:
        """Log means since the start of the epoch on this rank."""
        if not self._parts.logger.trackers:
            return
        values = {**metrics.compute_local(), "lr": self._lr, "samples_per_second": watch.samples_per_second()}
        values["gradient_norm"] = self._parts.guard.monitor.last
        total_step = self.steps_before + self._step_of_stage(step, batches)
        self._parts.logger.log_curves(self._stage.name, values, total_step)

    def _step_of_stage(self, step: int, batches: EpochBatches) -> int:
        return (batches.epoch - 1) * len(batches) + step

    def _label(self, epoch: int) -> str:
        return f"{self._stage.name} {epoch}/{self._stage.epochs}"

    def _profile_directory(self) -> Path | None:
        """Return where the trace goes in the first epoch of this process, otherwise None."""
        wanted = self._parts.config.profile and not self._parts.is_profiled
        self._parts.is_profiled = True
        return self._parts.directory.path / "profile" if wanted else None

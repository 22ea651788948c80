"""The state of a stage, and what the training loop needs of a run."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.amp import GradScaler

from batteries.checkpoint.io import apply_checkpoint
from batteries.core.errors import UserError
from batteries.data.loaders import Batch, EpochBatches
from batteries.training.early_stopping import EarlyStopping
from batteries.training.ema import EMA
from batteries.training.metrics import MeanMetrics
from batteries.training.nonfinite import BufferSnapshot
from batteries.training.optimizer_step import start_momentum
from batteries.training.schedules import ScheduleByScore, ScheduleByStep


class StepLogger(Protocol):
    """What train_fn and valid_fn need of a run."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        ...

    def track(self, batches: EpochBatches, metrics: MeanMetrics) -> Iterator[Batch]:
        """Iterate over `batches`; show the progress and save within the epoch."""
        ...

    def log_step(self, lr: float, gradient_norm: torch.Tensor) -> None:
        """Record one optimizer step: its learning rate, and the gradient norm, shape (), before clipping."""

    def warn_once(self, text: str) -> None:
        """Log a warning, once in a run."""


class SilentLogger:
    """A StepLogger that shows, logs and saves nothing: for checks, averaging and tests."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def track(self, batches: Iterable[Batch], metrics: MeanMetrics) -> Iterator[Batch]:
        """Iterate over `batches`."""
        return iter(batches)

    def log_step(self, lr: float, gradient_norm: torch.Tensor) -> None:
        """Do nothing."""

    def warn_once(self, text: str) -> None:
        """Do nothing."""


@dataclass
class TrainState:
    """Everything that changes while a stage trains; a checkpoint contains all of it.

    Attributes:
        model: The model, wrapped for DDP, DataParallel or torch.compile.
        optimizer: The optimizer over the trainable parameters.
        scheduler: The learning-rate schedule.
        scaler: The loss scaler; enabled for fp16.
        ema: The moving average of the weights, or None.
        stopping: The early-stopping counter.
        frozen: The names of the modules that are frozen in this stage.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: ScheduleByStep | ScheduleByScore
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu", enabled=False))
    ema: EMA | None = None
    stopping: EarlyStopping = field(default_factory=lambda: EarlyStopping(None, minimize=False))
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        start_momentum(self.optimizer)
        self.buffers = BufferSnapshot(self.model)

    def extra(self) -> dict[str, Any]:
        """Return the entries of a checkpoint besides model, optimizer and scheduler."""
        return {
            "scaler_state_dict": self.scaler.state_dict(),
            "ema_state_dict": None if self.ema is None else self.ema.state_dict(),
            "ema_steps": None if self.ema is None else self.ema.steps,
            "stopping_state_dict": self.stopping.state_dict(),
        }

    def restore(self, checkpoint: Mapping[str, Any], name: str) -> None:
        """Load the state from a checkpoint.

        Args:
            checkpoint: The output of `make_checkpoint` with `extra()`.
            name: What errors call it, such as its path.

        Raises:
            UserError: If it has another architecture, or no averaged weights although `ema` is set.
        """
        apply_checkpoint(checkpoint, name, self.model, self.optimizer, self.scheduler)
        if checkpoint["scaler_state_dict"] and self.scaler.is_enabled():  # on a CPU it is empty
            self.scaler.load_state_dict(checkpoint["scaler_state_dict"])
        self.stopping.load_state_dict(checkpoint["stopping_state_dict"])
        if self.ema is not None:
            if checkpoint["ema_state_dict"] is None:
                raise UserError(f"{name} has no averaged weights; leave --ema-decay out.")
            self.ema.load_state_dict(checkpoint["ema_state_dict"])
            # Older checkpoints have no ema_steps. Each optimizer step of a stage updates the EMA, so it equals `step`.
            self.ema.steps = checkpoint.get("ema_steps", checkpoint["step"])

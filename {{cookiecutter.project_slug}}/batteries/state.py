"""Everything that changes while a stage trains, and that a checkpoint therefore holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from batteries.checkpoints import apply_checkpoint
from batteries.errors import BadInput
from batteries.schedules import ScheduleByScore, ScheduleByStep
from batteries.steps import Buffers, start_momentum
from batteries.stopping import EarlyStopping
from batteries.weights import EMA


@dataclass
class TrainState:
    """What learns in a stage, and what steers it. `frozen` names the modules that do not learn."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: ScheduleByStep | ScheduleByScore
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu", enabled=False))
    ema: EMA | None = None
    stopping: EarlyStopping = field(default_factory=lambda: EarlyStopping(None, minimize=False))
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        start_momentum(self.optimizer)
        self.buffers = Buffers(self.model)

    def extra(self) -> dict[str, Any]:
        """What a checkpoint holds of it beside model, optimizer and scheduler."""
        return {
            "scaler_state_dict": self.scaler.state_dict(),
            "ema_state_dict": None if self.ema is None else self.ema.state_dict(),
            "stopping_state_dict": self.stopping.state_dict(),
        }

    def restore(self, checkpoint: Mapping[str, Any], name: str) -> None:
        """Go on from a checkpoint called `name`. Raises BadInput where it is of another architecture."""
        apply_checkpoint(checkpoint, name, self.model, self.optimizer, self.scheduler)
        if checkpoint["scaler_state_dict"] and self.scaler.is_enabled():  # one of a CPU is empty
            self.scaler.load_state_dict(checkpoint["scaler_state_dict"])
        self.stopping.load_state_dict(checkpoint["stopping_state_dict"])
        if self.ema is not None:
            if checkpoint["ema_state_dict"] is None:
                raise BadInput(f"{name} holds no averaged weights; leave --ema-decay out.")
            self.ema.load_state_dict(checkpoint["ema_state_dict"])

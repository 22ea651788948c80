"""Learning-rate schedules.

They are functions of the optimizer step, without history (except plateau), so a resumed run has the same rates.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from batteries.core.errors import UserError
from batteries.core.ranks import is_rank_zero
from batteries.core.text import count_of

MILESTONES = (0.5, 0.75)  # multi-step: the fractions of the steps of a stage after which the learning rate drops
Schedule = Literal["one-cycle", "cosine", "multi-step", "constant", "plateau"]


class StageSchedule(Protocol):
    """The options of a stage that determine its learning rate. train.py documents each one."""

    @property
    def name(self) -> str: ...
    @property
    def epochs(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def warmup_epochs(self) -> float: ...


class ScheduleByStep:
    """A learning rate that depends only on the optimizer step.

    - one-cycle: from 1/25 of the maximum to the maximum over 30 % of the steps, then to 1/250,000 of it; both with a
      cosine shape (Smith and Topin 2019).
    - cosine: after a linear warmup, from the maximum to 0 (Loshchilov and Hutter 2017).
    - multi-step: after a linear warmup, multiplied by 0.1 at each milestone.
    - constant: after a linear warmup, the maximum.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        shape: Schedule,
        steps: int,
        warmup: int = 0,
        milestones: Sequence[float] = MILESTONES,
    ) -> None:
        """Set the learning rate of the first step.

        Args:
            optimizer: The optimizer; the learning rates of its groups are the maxima.
            shape: Any schedule except "plateau".
            steps: The optimizer steps of the stage.
            warmup: The steps of linear warmup; not for one-cycle.
            milestones: The fractions of the steps after which multi-step lowers the rate.
        """
        self._optimizer = optimizer
        self._max_lrs = [group["lr"] for group in optimizer.param_groups]
        self._shape: Schedule = shape
        self._steps = steps
        self._warmup = warmup
        self._milestones = milestones
        self._set_step(0)

    def step(self) -> None:
        """Set the learning rate of the next step; call it after each optimizer step."""
        self._set_step(self._next_step + 1)

    def end_epoch(self, score: float) -> None:
        """Do nothing; this schedule does not depend on the score."""

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict:
        """Return the state for a checkpoint."""
        return {"next_step": self._next_step}

    def load_state_dict(self, state: dict) -> None:
        """Load the output of `state_dict`."""
        self._set_step(state["next_step"])

    def _set_step(self, step: int) -> None:
        """Set the learning rates of optimizer step `step`, from 0."""
        self._next_step = step
        factor = learning_rate_factor(self._shape, step, self._steps, self._warmup, self._milestones)
        for group, max_lr in zip(self._optimizer.param_groups, self._max_lrs, strict=True):
            group["lr"] = max_lr * factor


class ScheduleByScore:
    """Multiplies the learning rate by 0.1 after `patience` epochs without a better score (ReduceLROnPlateau)."""

    def __init__(self, optimizer: torch.optim.Optimizer, minimize: bool, patience: int = 3) -> None:
        """Start with the learning rate of the optimizer.

        Args:
            optimizer: The optimizer.
            minimize: Whether a lower score is better.
            patience: The number of epochs.
        """
        # torch waits for one epoch more than its patience. Its default threshold is relative, and would count a tie of
        # negative scores as an improvement.
        self._plateau = ReduceLROnPlateau(
            optimizer,
            "min" if minimize else "max",
            factor=0.1,
            patience=patience - 1,
            threshold=0.0,
            threshold_mode="abs",
        )

    def step(self) -> None:
        """Do nothing; this schedule does not depend on the step."""

    def end_epoch(self, score: float) -> None:
        """Add the score of an epoch. A score that is not finite is not an improvement."""
        worst = math.inf if self._plateau.mode == "min" else -math.inf
        self._plateau.step(score if math.isfinite(score) else worst)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        return float(self._plateau.get_last_lr()[0])

    def state_dict(self) -> dict:
        """Return the state for a checkpoint."""
        return self._plateau.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Load the output of `state_dict`."""
        self._plateau.load_state_dict(state)


def make_schedule(
    optimizer: torch.optim.Optimizer, stage: StageSchedule, steps_per_epoch: int, *, minimize: bool = False
) -> ScheduleByStep | ScheduleByScore:
    """Build the schedule of a stage.

    Args:
        optimizer: The optimizer, with the maximum learning rate.
        stage: The options of the stage.
        steps_per_epoch: The optimizer steps of an epoch.
        minimize: Whether a lower score is better, for plateau.
    """
    if stage.schedule == "plateau":
        return ScheduleByScore(optimizer, minimize)
    steps = stage.epochs * steps_per_epoch
    warmup = min(round(stage.warmup_epochs * steps_per_epoch), steps - 1)
    return ScheduleByStep(optimizer, stage.schedule, steps, warmup)


def print_schedule(stages: Sequence[StageSchedule], steps_per_epoch: int) -> float:
    """Print the learning rate at the start of each epoch and at the end of each stage, on rank 0.

    Returns:
        NaN, because train.py returns it as its score.
    """
    if not is_rank_zero():
        return math.nan
    print("stage        epoch     step  learning rate")
    for stage in stages:
        last_step = stage.epochs * steps_per_epoch - 1
        for step, lr in enumerate(learning_rates(stage, steps_per_epoch)):
            if step % steps_per_epoch == 0 or step == last_step:
                print(f"{stage.name:12} {step // steps_per_epoch + 1:5} {step + 1:8}  {lr:.3e}")
    return math.nan


def learning_rates(stage: StageSchedule, steps_per_epoch: int) -> list[float]:
    """Return the learning rate of each step of a stage; for plateau those of a score that always improves."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=stage.lr)
    schedule = make_schedule(optimizer, stage, steps_per_epoch)
    rates = []
    for _ in range(stage.epochs * steps_per_epoch):
        rates.append(schedule.learning_rate())
        optimizer.step()
        schedule.step()
    return rates


def learning_rate_factor(shape: Schedule, step: int, steps: int, warmup: int, milestones: Sequence[float]) -> float:
    """Return the learning rate of a step as a fraction of the maximum.

    Args:
        shape: Any schedule except "plateau".
        step: The step, from 0.
        steps: The steps of the stage.
        warmup: The steps of linear warmup; one-cycle ignores it.
        milestones: The fractions of the steps after which multi-step lowers the rate.
    """
    if shape == "one-cycle":
        peak = 0.3 * steps - 1  # as in OneCycleLR of torch
        if step <= peak:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 250_000, (step - peak) / (steps - 1 - peak))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if shape == "cosine":
        return _cosine(1.0, 0.0, (step - warmup) / (steps - warmup))
    if shape == "multi-step":
        return 0.1 ** sum(step >= milestone * steps for milestone in milestones)
    return 1.0


def _cosine(start: float, end: float, fraction: float) -> float:
    """Interpolate from `start` to `end` with half a period of a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(fraction, 1.0))) / 2


def check_warmup(number: int, stage: StageSchedule) -> None:
    """Raise UserError if the warmup of stage `number` is too long, or its schedule has none."""
    flag = f"--stages.{number}.warmup-epochs {stage.warmup_epochs:g}"
    if stage.warmup_epochs and stage.schedule in ("one-cycle", "plateau"):
        raise UserError(
            f"{flag} has no effect with --stages.{number}.schedule {stage.schedule}; remove it, or use cosine."
        )
    first_drop = MILESTONES[0] * stage.epochs
    if stage.schedule == "multi-step" and stage.warmup_epochs > first_drop:
        raise UserError(f"{flag} exceeds the {first_drop:g} epochs before the first drop of multi-step; use less.")
    if stage.warmup_epochs >= stage.epochs:
        raise UserError(f"{flag} is not shorter than the stage, which has {count_of(stage.epochs, 'epoch')}; use less.")

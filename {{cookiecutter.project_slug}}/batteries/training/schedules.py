"""The learning rate as a function of the optimizer step: no history, so that a run that is resumed cannot differ."""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from batteries.core.errors import UserError
from batteries.core.ranks import is_rank_zero

MILESTONES = (0.5, 0.75)  # where multi-step drops, as shares of the steps of a stage
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
    """A learning rate that follows from the step alone. `shape` is one of Schedule but "plateau".

    one-cycle: from 1/25 up to the whole learning rate over 30 % of the steps, then down to nearly nothing, each by half
    a cosine (Smith and Topin 2019). The others rise in a line over `warmup` steps; then cosine: down to 0 (Loshchilov
    and Hutter 2017); multi-step: a tenth after each of `milestones`, as shares of the steps; constant: as it is.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        shape: Schedule,
        steps: int,
        warmup: int = 0,
        milestones: Sequence[float] = MILESTONES,
    ) -> None:
        self.optimizer = optimizer
        self.highest = [group["lr"] for group in optimizer.param_groups]
        self.factor = lambda step: learning_rate_factor(shape, step, steps, warmup, milestones)
        self.go_to(0)

    def go_to(self, step: int) -> None:
        """Set the learning rate of each group to that of optimizer step `step`, from 0."""
        self.next_step, factor = step, self.factor(step)
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * factor

    def step(self) -> None:
        """After each optimizer step."""
        self.go_to(self.next_step + 1)

    def end_epoch(self, score: float) -> None:
        """After each validation; this schedule does not look at it."""

    def learning_rate(self) -> float:
        """That of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there."""
        self.go_to(state["next_step"])


class ScheduleByScore:
    """A tenth of the learning rate after `patience` epochs without a better score, by torch's ReduceLROnPlateau."""

    def __init__(self, optimizer: torch.optim.Optimizer, minimize: bool, patience: int = 3) -> None:
        mode = "min" if minimize else "max"
        # torch waits for one epoch more than its patience, and its relative threshold makes a tie of negative scores
        # a better one.
        self._plateau = ReduceLROnPlateau(optimizer, mode, 0.1, patience - 1, threshold=0.0, threshold_mode="abs")

    def step(self) -> None:
        """After each optimizer step; this schedule does not look at it."""

    def end_epoch(self, score: float) -> None:
        """After each validation. A score that is not finite counts as no better one."""
        worst = math.inf if self._plateau.mode == "min" else -math.inf
        self._plateau.step(score if math.isfinite(score) else worst)

    def learning_rate(self) -> float:
        """That of the next step."""
        return float(self._plateau.get_last_lr()[0])

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return self._plateau.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on from there."""
        self._plateau.load_state_dict(state)


def make_schedule(
    optimizer: torch.optim.Optimizer, stage: StageSchedule, steps_per_epoch: int, *, minimize: bool = False
) -> ScheduleByStep | ScheduleByScore:
    """How the learning rate goes in `stage` (its epochs, lr, schedule and warmup_epochs).

    `minimize` says whether a lower score is better, for plateau.
    """
    if stage.schedule == "plateau":
        return ScheduleByScore(optimizer, minimize)
    steps = stage.epochs * steps_per_epoch
    warmup = min(round(stage.warmup_epochs * steps_per_epoch), steps - 1)
    return ScheduleByStep(optimizer, stage.schedule, steps, warmup)


def print_schedule(stages: Sequence[StageSchedule], steps_per_epoch: int) -> float:
    """Print the learning rate at the start of each epoch and at the end of each stage; NaN, since nothing is scored."""
    if is_rank_zero():
        print("stage        epoch     step  learning rate")
        for stage in stages:
            for step, lr in enumerate(learning_rates(stage, steps_per_epoch)):
                if step % steps_per_epoch == 0 or step == stage.epochs * steps_per_epoch - 1:
                    print(f"{stage.name:12} {step // steps_per_epoch + 1:5} {step + 1:8}  {lr:.3e}")
    return math.nan


def learning_rates(stage: StageSchedule, steps_per_epoch: int) -> list[float]:
    """That of each step of a stage. With plateau: as long as scores get better."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=stage.lr)
    schedule, rates = make_schedule(optimizer, stage, steps_per_epoch), []
    for _ in range(stage.epochs * steps_per_epoch):
        rates.append(schedule.learning_rate())
        optimizer.step()
        schedule.step()
    return rates


def learning_rate_factor(shape: Schedule, step: int, steps: int, warmup: int, milestones: Sequence[float]) -> float:
    """What the learning rate is multiplied by at `step` (from 0) of `steps`."""
    if shape == "one-cycle":
        top = 0.3 * steps - 1  # as torch's OneCycleLR counts
        if step <= top:
            return _between(1 / 25, 1.0, step / top)
        return _between(1.0, 1 / 250_000, (step - top) / (steps - 1 - top))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if shape == "cosine":
        return _between(1.0, 0.0, (step - warmup) / (steps - warmup))
    if shape == "multi-step":
        return 0.1 ** sum(step >= milestone * steps for milestone in milestones)
    return 1.0


def _between(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def check_warmup(number: int, stage: StageSchedule) -> None:
    """Raise BadInput for a warm-up that stage `number` is too short for, or that its schedule has no place for."""
    flag = f"--stages.{number}.warmup-epochs {stage.warmup_epochs:g}"
    if stage.warmup_epochs and stage.schedule in ("one-cycle", "plateau"):
        raise UserError(
            f"{flag} has no place in --stages.{number}.schedule {stage.schedule}; leave it out, or use cosine."
        )
    if stage.schedule == "multi-step" and stage.warmup_epochs > MILESTONES[0] * stage.epochs:
        raise UserError(f"{flag} goes on after the first drop, at {MILESTONES[0] * stage.epochs:g} epochs; use less.")
    if stage.warmup_epochs >= stage.epochs:
        raise UserError(f"{flag} is as long as the stage or longer ({stage.epochs} epochs); use less.")

"""Checks of the machine: what limits the speed, how long a run takes, whether its files fit, whether processes meet."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from batteries.checkpoints import count_bytes
from batteries.checks import Row
from batteries.errors import BadInput
from batteries.handshake import meet
from batteries.launch import count_processes
from batteries.logdirs import check_logdir, holds_run
from batteries.model_checks import nearest_folder
from batteries.state import TrainState

MOST_SECONDS = 5.0  # for one measurement, but for the step that is under way then
SECONDS_TO_MEET = 60.0  # each process imports torch first: 2 to 20 s
ALMOST_FULL = 0.8  # of what is free


class Speed(NamedTuple):
    """Seconds: of the loader alone for a step, of the model alone for a step, and of the whole validation."""

    loading: float
    step: float
    validation: float
    workers: int  # of the loader; with 0 it takes turns with the model

    @property
    def whole_step(self) -> float:
        """Seconds from one step to the next."""
        return max(self.loading, self.step) if self.workers else self.loading + self.step


class Length(NamedTuple):
    """How long a stage is, and how fast."""

    epochs: int
    steps: int  # in an epoch
    validations: int  # in an epoch: two where weights are averaged
    speed: Speed

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return self.epochs * (self.steps * self.speed.whole_step + self.validations * self.speed.validation)


def seconds_each(events: Iterable[object], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """The time from each event to the next; the first is left out, since things are built in it.

    Stops after MOST_SECONDS. Where only one event came by then, its own time.
    """
    times = [clock()]
    for _ in events:
        times.append(clock())
        if times[-1] - times[0] > MOST_SECONDS:
            break
    each = [after - before for before, after in pairwise(times)]
    return each[1:] or each


def loader_keeps_up(speeds: Mapping[str, Speed], batch_size: int) -> Row:
    """What is the limit, loader or model, in the stage (by name) where loading is the largest share of a step."""
    name, speed = max(speeds.items(), key=lambda item: item[1].loading / item[1].step)
    loader, model = batch_size / speed.loading, batch_size / speed.step
    seen = f"samples a second: loader {loader:,.0f}, model {model:,.0f}" + f", in {name}" * (
        len(set(speeds.values())) > 1
    )
    how = f"{speed.workers} worker{'s' * (speed.workers != 1)}" if speed.workers else "no workers, so they take turns"
    if speed.loading <= speed.step:
        return Row("pass", f"{seen}: the model is the limit ({how})")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    more = f"--num-workers {max(2, cores)}" if speed.workers < cores else "more cores"
    return Row("warning", f"{seen}: the loader is the limit ({how})", f"{more}, smaller files, fewer transforms")


def run_takes(stages: Sequence[Length], peak_memory: int, *, patient: bool = True) -> Row:
    """How long the run will be; not `patient` where stages may end before their last epoch. `peak_memory` in bytes."""
    from rich.filesize import decimal

    epochs, steps = sum(stage.epochs for stage in stages), sum(stage.epochs * stage.steps for stage in stages)
    slowest = max((stage.speed for stage in stages), key=lambda speed: speed.whole_step)
    seconds = sum(stage.seconds for stage in stages)
    memory = f"; peak memory so far {decimal(peak_memory)}" if peak_memory else ""
    return Row(
        "pass",
        f"{'about' if patient else 'at most about'} {duration(seconds)} for {epochs} epochs, {steps:,} steps; "
        f"{slowest.whole_step:.3g} s a step, {slowest.validation:.3g} s a validation{memory}",
    )


def duration(seconds: float) -> str:
    """A time in words."""
    for most, unit, size in ((100, "s", 1), (6000, "min", 60), (48 * 3600, "hours", 3600)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}" if seconds / size >= 10 else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def kept_checkpoints(epochs: int, save_n_best: int, *, within_epochs: bool) -> int:
    """The most that a stage keeps: the n best and the two newest; `within_epochs` where some are written there too."""
    return min(save_n_best, epochs) + 2 if within_epochs else min(save_n_best + 2, epochs)


def disk_has_room(logdir: Path, sizes: Sequence[int], kept: Sequence[int]) -> Row:
    """Whether the checkpoints of all stages fit: of each stage its size in bytes, and how many it keeps.

    One more is counted, which is being written before an old one goes.
    """
    from rich.filesize import decimal

    folder = nearest_folder(logdir)
    needed = sum(size * count for size, count in zip(sizes, kept, strict=True)) + max(sizes)
    free = shutil.disk_usage(folder).free
    counts = " + ".join(map(str, [*kept, 1]))
    seen = f"up to {decimal(needed)} of {decimal(free)} free: {counts} checkpoints of {decimal(max(sizes))}"
    mend = "less --save-n-best, or a --logdir on another disk"
    if needed > free:
        return Row("fail", seen, mend)
    return Row("warning", seen, mend) if needed > ALMOST_FULL * free else Row("pass", seen)


def count_state_bytes(state: TrainState, pack: Callable[[TrainState], Any]) -> int:
    """Bytes of all tensors in a checkpoint of `state` once its optimizer has stepped: nearly those of its file.

    The step has gradients of zero, since the optimizer makes what it keeps in its first.
    """
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    return count_bytes(pack(state))


def processes_meet(device: torch.device, pieces: int, batch_size: int) -> Row:
    """Whether the processes of scripts/train_ddp.sh find each other here: one per GPU, or two.

    A step of `batch_size` samples is cut into `pieces` micro-batches for each of them.
    """
    if device.type == "mps":
        return Row("pass", "not tried: mps cannot be shared between processes")
    processes = count_processes()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if reason := meet(processes, device.type, SECONDS_TO_MEET):
        seen = f"{processes} processes ({backend}) cannot meet: {reason}"
        mend = (
            "look at the network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), the firewall, and the host's name"
        )
        only = "" if torch.cuda.device_count() > 1 else "; matters for scripts/train_ddp.sh alone"
        return Row("warning" if only else "fail", seen + only, mend)
    seen = f"{processes} process{'es' * (processes != 1)} met ({backend})"
    if batch_size % (processes * pieces):
        what = f"--batch-size {batch_size} does not divide over {processes} x --accumulation-steps {pieces}"
        return Row("warning", f"{seen}, but {what}", "another --batch-size, or NPROC for scripts/train_ddp.sh")
    return Row("pass", seen)


def logdir_is_free(logdir: Path, *, resume: bool) -> Row:
    """Whether train.py would take the folder."""
    if resume and holds_run(logdir):
        return Row("pass", f"{logdir} holds a run, to be resumed")
    try:
        check_logdir(logdir)
    except BadInput as error:
        return Row("warning" if holds_run(logdir) else "fail", str(error))
    return Row("pass", f"{logdir} is free")

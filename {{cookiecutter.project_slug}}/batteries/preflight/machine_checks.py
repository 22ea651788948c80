"""Checks of the machine."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from batteries.checkpoint.io import count_bytes
from batteries.core.errors import UserError
from batteries.core.text import format_duration
from batteries.distributed.connectivity import check_process_group
from batteries.distributed.launch import count_processes
from batteries.preflight.model_checks import nearest_folder
from batteries.preflight.results import CheckResult
from batteries.run.directory import check_logdir, holds_run
from batteries.training.state import TrainState

MOST_SECONDS = 5.0  # for one measurement, but for the step that is under way then
CONNECT_TIMEOUT = 60.0  # each process imports torch first: 2 to 20 s
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


def check_loader_throughput(speeds: Mapping[str, Speed], batch_size: int) -> CheckResult:
    """What is the limit, loader or model, in the stage (by name) where loading is the largest share of a step."""
    name, speed = max(speeds.items(), key=lambda item: item[1].loading / item[1].step)
    loader, model = batch_size / speed.loading, batch_size / speed.step
    details = f"samples a second: loader {loader:,.0f}, model {model:,.0f}" + f", in {name}" * (
        len(set(speeds.values())) > 1
    )
    how = f"{speed.workers} worker{'s' * (speed.workers != 1)}" if speed.workers else "no workers, so they take turns"
    if speed.loading <= speed.step:
        return CheckResult("pass", f"{details}: the model is the limit ({how})")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    more = f"--num-workers {max(2, cores)}" if speed.workers < cores else "more cores"
    return CheckResult(
        "warning", f"{details}: the loader is the limit ({how})", f"{more}, smaller files, fewer transforms"
    )


def estimate_run_time(stages: Sequence[Length], peak_memory: int, *, patient: bool = True) -> CheckResult:
    """How long the run will be; not `patient` where stages may end before their last epoch. `peak_memory` in bytes."""
    from rich.filesize import decimal

    epochs, steps = sum(stage.epochs for stage in stages), sum(stage.epochs * stage.steps for stage in stages)
    slowest = max((stage.speed for stage in stages), key=lambda speed: speed.whole_step)
    seconds = sum(stage.seconds for stage in stages)
    memory = f"; peak memory so far {decimal(peak_memory)}" if peak_memory else ""
    return CheckResult(
        "pass",
        f"{'about' if patient else 'at most about'} {format_duration(seconds)} for {epochs} epochs, {steps:,} steps; "
        f"{slowest.whole_step:.3g} s a step, {slowest.validation:.3g} s a validation{memory}",
    )


def kept_checkpoints(epochs: int, save_n_best: int, *, within_epochs: bool) -> int:
    """The most that a stage keeps: the n best and the two newest; `within_epochs` where some are written there too."""
    return min(save_n_best, epochs) + 2 if within_epochs else min(save_n_best + 2, epochs)


def check_disk_space(logdir: Path, sizes: Sequence[int], kept: Sequence[int]) -> CheckResult:
    """Whether the checkpoints of all stages fit: of each stage its size in bytes, and how many it keeps.

    One more is counted, which is being written before an old one goes.
    """
    from rich.filesize import decimal

    folder = nearest_folder(logdir)
    needed = sum(size * count for size, count in zip(sizes, kept, strict=True)) + max(sizes)
    free = shutil.disk_usage(folder).free
    counts = " + ".join(map(str, [*kept, 1]))
    details = f"up to {decimal(needed)} of {decimal(free)} free: {counts} checkpoints of {decimal(max(sizes))}"
    hint = "less --save-n-best, or a --logdir on another disk"
    if needed > free:
        return CheckResult("fail", details, hint)
    return CheckResult("warning", details, hint) if needed > ALMOST_FULL * free else CheckResult("pass", details)


def count_state_bytes(state: TrainState, pack: Callable[[TrainState], Any]) -> int:
    """Bytes of all tensors in a checkpoint of `state` once its optimizer has stepped: nearly those of its file.

    The step has gradients of zero, since the optimizer makes what it keeps in its first.
    """
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    return count_bytes(pack(state))


def check_processes(device: torch.device, pieces: int, batch_size: int) -> CheckResult:
    """Whether the processes of scripts/train_ddp.sh find each other here: one per GPU, or two.

    A step of `batch_size` samples is cut into `pieces` micro-batches for each of them.
    """
    if device.type == "mps":
        return CheckResult("pass", "not tried: mps cannot be shared between processes")
    processes = count_processes()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if reason := check_process_group(processes, device.type, CONNECT_TIMEOUT):
        details = f"{processes} processes ({backend}) cannot meet: {reason}"
        hint = (
            "look at the network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), the firewall, and the host's name"
        )
        only = "" if torch.cuda.device_count() > 1 else "; matters for scripts/train_ddp.sh alone"
        return CheckResult("warning" if only else "fail", details + only, hint)
    details = f"{processes} process{'es' * (processes != 1)} met ({backend})"
    if batch_size % (processes * pieces):
        what = f"--batch-size {batch_size} does not divide over {processes} x --accumulation-steps {pieces}"
        return CheckResult(
            "warning", f"{details}, but {what}", "another --batch-size, or NPROC for scripts/train_ddp.sh"
        )
    return CheckResult("pass", details)


def check_logdir_is_free(logdir: Path, *, resume: bool) -> CheckResult:
    """Whether train.py would take the folder."""
    if resume and holds_run(logdir):
        return CheckResult("pass", f"{logdir} holds a run, to be resumed")
    try:
        check_logdir(logdir)
    except UserError as error:
        return CheckResult("warning" if holds_run(logdir) else "fail", str(error))
    return CheckResult("pass", f"{logdir} is free")

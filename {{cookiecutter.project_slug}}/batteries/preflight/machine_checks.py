"""Checks of the machine: speed, disk space, processes and the run directory."""

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
from batteries.core.text import count_of, format_duration
from batteries.distributed.connectivity import DID_NOT_START, check_process_group
from batteries.distributed.launch import count_processes
from batteries.preflight.model_checks import nearest_directory
from batteries.preflight.results import CheckResult
from batteries.run.directory import check_logdir, holds_run
from batteries.training.state import TrainState

MAX_SECONDS = 5.0  # of one measurement, plus the rest of the step that is running then
CONNECT_TIMEOUT = 60.0  # seconds from when all processes have started
ALMOST_FULL = 0.8  # fraction of the free disk space
WORTHWHILE = 1.2  # times as fast, from which a pack is recommended


class Speed(NamedTuple):
    """The speed of a stage.

    Attributes:
        loading: The seconds that the loader needs for one step.
        step: The seconds that the model needs for one step.
        validation: The seconds of one validation.
        workers: The number of loader processes. Without any, loading and training alternate.
    """

    loading: float
    step: float
    validation: float
    workers: int

    @property
    def seconds_per_step(self) -> float:
        """The seconds from one step to the next."""
        return max(self.loading, self.step) if self.workers else self.loading + self.step


class LoadingTimes(NamedTuple):
    """The mean seconds that one process needs for a sample.

    Attributes:
        reading: Reading and decoding.
        transform: The transform of the train split.
        packed_reading: Reading and decoding in a pack; None if the data set cannot be packed.
    """

    reading: float
    transform: float
    packed_reading: float | None = None


class StageLength(NamedTuple):
    """The length of a stage, and its speed.

    Attributes:
        epochs: The number of epochs.
        steps: The optimizer steps of an epoch.
        validations: The validations of an epoch: two if there is an EMA of the weights.
        speed: The speed.
    """

    epochs: int
    steps: int
    validations: int
    speed: Speed

    @property
    def seconds(self) -> float:
        """The seconds of the whole stage."""
        per_epoch = self.steps * self.speed.seconds_per_step + self.validations * self.speed.validation
        return self.epochs * per_epoch


def measure_intervals(events: Iterable[object], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Measure the seconds from each event to the next; stop after MAX_SECONDS.

    The time until the first event is left out, because it includes initialisation; it is returned only if no other
    event comes in time.
    """
    times = [clock()]
    for _ in events:
        times.append(clock())
        if times[-1] - times[0] > MAX_SECONDS:
            break
    intervals = [after - before for before, after in pairwise(times)]
    return intervals[1:] or intervals


def check_loader_throughput(
    speeds: Mapping[str, Speed], batch_size: int, measure_times: Callable[[str], LoadingTimes]
) -> CheckResult:
    """Check that the loader is at least as fast as the model, in the stage with the slowest loader relative to it.

    Args:
        speeds: The speed of each stage; the key is its name.
        batch_size: The samples of an optimizer step.
        measure_times: Measures the parts of loading in a stage, from its name; called if the loader is slower.
    """
    name, speed = max(speeds.items(), key=lambda item: item[1].loading / item[1].step)
    loader = batch_size / speed.loading
    model = batch_size / speed.step
    stage = f" in {name}" if len(set(speeds.values())) > 1 else ""
    rates = f"samples per second{stage}: loader {loader:,.0f}, model {model:,.0f}"
    workers = count_of(speed.workers, "worker") if speed.workers else "no workers: loading and training alternate"
    if speed.loading <= speed.step:
        return CheckResult("pass", f"{rates}; the model is the bottleneck ({workers})")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    more = f"--num-workers {max(2, cores)}" if speed.workers < cores else "more cores"
    times = measure_times(name)
    parts = divide_loading(times, speed, batch_size)
    slowest = max(parts, key=lambda part: parts[part])
    shares = ", ".join(f"{part} {value / speed.loading:.0%}" for part, value in parts.items())
    details = f"{rates}; the loader is the bottleneck ({workers}), mainly {slowest}: {shares} of its time"
    advice = {"decoding": "smaller files", "the transform": "fewer transforms"}.get(slowest, "a larger --batch-size")
    hint = f"use {more}, or {advice}"
    if slowest == "decoding" and times.packed_reading is not None:
        saved = (times.reading - times.packed_reading) * batch_size / max(1, speed.workers)
        gain = speed.loading / max(speed.loading - saved, 1e-9)
        if gain > WORTHWHILE:
            hint = f"write a pack with tools/pack.py, which loads about {gain:.1f} times as fast; or use {more}"
    return CheckResult("warning", details, hint)


def divide_loading(times: LoadingTimes, speed: Speed, batch_size: int) -> dict[str, float]:
    """Return the seconds of a step for each part of loading; what no part explains is collation and transport."""
    per_step = batch_size / max(1, speed.workers)
    reading, transform = times.reading * per_step, times.transform * per_step
    excess = max(1.0, (reading + transform) / speed.loading)  # more cores were free when the loader was measured
    parts = {"decoding": reading / excess, "the transform": transform / excess}
    return parts | {"collation and transport": max(0.0, speed.loading - sum(parts.values()))}


def estimate_run_time(stages: Sequence[StageLength], peak_memory: int, *, may_stop_early: bool = False) -> CheckResult:
    """Estimate the time of the whole run.

    Args:
        stages: The length of each stage.
        peak_memory: The peak memory so far, in bytes; 0 if it is not known.
        may_stop_early: Whether a stage may end before its last epoch.
    """
    from rich.filesize import decimal

    epochs = sum(stage.epochs for stage in stages)
    steps = sum(stage.epochs * stage.steps for stage in stages)
    seconds = sum(stage.seconds for stage in stages)
    slowest = max((stage.speed for stage in stages), key=lambda speed: speed.seconds_per_step)
    about = "at most about" if may_stop_early else "about"
    memory = f"; peak memory so far {decimal(peak_memory)}" if peak_memory else ""
    return CheckResult(
        "pass",
        f"{about} {format_duration(seconds)} for {count_of(epochs, 'epoch')}, {count_of(steps, 'step')}; "
        f"{slowest.seconds_per_step:.3g} s per step, {slowest.validation:.3g} s per validation{memory}",
    )


def kept_checkpoints(epochs: int, save_n_best: int, *, within_epochs: bool) -> int:
    """Return the maximum number of checkpoints that a stage keeps: the n best and the two newest.

    Args:
        epochs: The epochs of the stage.
        save_n_best: The option --save-n-best.
        within_epochs: Whether checkpoints are written within epochs too.
    """
    return min(save_n_best, epochs) + 2 if within_epochs else min(save_n_best + 2, epochs)


def check_disk_space(logdir: Path, sizes: Sequence[int], counts: Sequence[int]) -> CheckResult:
    """Check that the checkpoints of all stages fit on the disk.

    One more checkpoint is counted: a new one is written before an old one is deleted.

    Args:
        logdir: The run directory.
        sizes: The bytes of a checkpoint, for each stage.
        counts: The number of checkpoints that are kept, for each stage.
    """
    from rich.filesize import decimal

    needed = sum(size * count for size, count in zip(sizes, counts, strict=True)) + max(sizes)
    free = shutil.disk_usage(nearest_directory(logdir)).free
    checkpoints = " + ".join(map(str, [*counts, 1]))
    details = f"up to {decimal(needed)} of {decimal(free)} free: {checkpoints} checkpoints of {decimal(max(sizes))}"
    hint = "use a smaller --save-n-best, or a --logdir on another disk"
    if needed > free:
        return CheckResult("fail", details, hint)
    if needed > ALMOST_FULL * free:
        return CheckResult("warning", details, hint)
    return CheckResult("pass", details)


def count_state_bytes(state: TrainState, make_checkpoint: Callable[[TrainState], Any]) -> int:
    """Return the bytes of all tensors in the checkpoint of a state, which is nearly the size of the file.

    The optimizer takes one step with gradients of zero, because it creates its state in its first step.
    """
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    return count_bytes(make_checkpoint(state))


def check_processes(
    device: torch.device, accumulation_steps: int, batch_size: int, shards: int | None = None
) -> CheckResult:
    """Check that the processes of scripts/train_ddp.sh (one per GPU, or two) can form a process group.

    Args:
        device: The device of this process.
        accumulation_steps: The micro-batches of a step on each rank.
        batch_size: The samples of a step over all ranks.
        shards: The shards of a step, whose number the processes must divide; None without --shards.
    """
    if device.type == "mps":
        return CheckResult("pass", "skipped: processes cannot share mps")
    processes = count_processes()
    backend = "nccl" if device.type == "cuda" else "gloo"
    name = f"{count_of(processes, 'process')} ({backend})"
    reason = check_process_group(processes, device.type, CONNECT_TIMEOUT)
    if reason:
        if DID_NOT_START in reason:
            hint = "repeat it when the machine is less busy; python must be able to import torch"
        else:
            hint = (
                "check the network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), the firewall and the host name"
            )
        details = f"{name} cannot form a process group: {reason}"
        if torch.cuda.device_count() > 1:
            return CheckResult("fail", details, hint)
        return CheckResult("warning", f"{details}; this affects only scripts/train_ddp.sh", hint)
    if shards is not None:
        if shards % processes:
            details = f"{name} formed a process group, but --shards {shards} cannot be divided by {processes} processes"
            sizes = ", ".join(str(1 << power) for power in range(shards.bit_length()))
            return CheckResult("warning", details, f"set NPROC for scripts/train_ddp.sh to one of these: {sizes}")
    elif batch_size % (processes * accumulation_steps):
        details = (
            f"{name} formed a process group, but --batch-size {batch_size} is not a multiple of {processes} processes "
            f"x --accumulation-steps {accumulation_steps}"
        )
        return CheckResult("warning", details, "use another --batch-size, or set NPROC for scripts/train_ddp.sh")
    return CheckResult("pass", f"{name} formed a process group")


def check_logdir_is_free(logdir: Path, *, resume: bool) -> CheckResult:
    """Check that train.py would accept the run directory."""
    if resume and holds_run(logdir):
        return CheckResult("pass", f"{logdir} holds a run, which will be resumed")
    try:
        check_logdir(logdir)
    except UserError as error:
        return CheckResult("warning" if holds_run(logdir) else "fail", str(error))
    return CheckResult("pass", f"{logdir} is free")

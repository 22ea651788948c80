"""The speed of an epoch, the time spent waiting for data, and a profiler trace of a few steps."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from batteries.core.memory import peak_memory
from batteries.core.ranks import rank, world_size
from batteries.data.loaders import Batch, EpochBatches
from batteries.training.metrics import MeanMetrics

logger = logging.getLogger("batteries")
SHOWN_METRICS = 2  # metrics in the progress bar: the loss and the first one of experiment/task.py

# The schedule of --profile: steps before the profiler starts, steps that only warm it up, and steps in the trace.
WAIT = 2
WARMUP = 3
ACTIVE = 5


class Stopwatch:
    """Iterates over the batches of an epoch and measures the time.

    Attributes:
        batches: The micro-batches of the epoch.
        metrics: The metrics of the epoch, which count the samples of this rank.
    """

    def __init__(self, batches: EpochBatches, metrics: MeanMetrics) -> None:
        self.batches = batches
        self.metrics = metrics
        self._count_at_start = metrics.count
        self._begin = time.perf_counter()
        self._waited = 0.0  # seconds

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        while True:
            requested_at = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - requested_at
            if batch is None:
                return
            yield batch

    def timing(self, steps: int) -> dict[str, float]:
        """Return the timing of the epoch for timings.jsonl; `steps` is the number of steps in this process."""
        seconds = time.perf_counter() - self._begin
        return {
            "seconds": round(seconds, 3),
            "step_seconds": round(seconds / max(steps, 1), 6),
            "data_wait_seconds": round(self._waited, 3),
            "samples_per_second": round(self.samples_per_second(), 1),
        }

    def samples_per_second(self) -> float:
        """Return the samples per second over all ranks since the start of the epoch."""
        samples = (self.metrics.count - self._count_at_start) * world_size()
        return samples / (time.perf_counter() - self._begin)

    def status(self) -> str:
        """Format means so far, samples per second, the fraction of time spent waiting for data, and peak memory.

        It is short, because it has to fit into 80 columns together with the progress bar.
        """
        first = list(self.metrics.compute_local().items())[:SHOWN_METRICS]
        means = " ".join(f"{name} {value:.3f}" for name, value in sorted(first))
        wait = self._waited / (time.perf_counter() - self._begin)
        memory = peak_memory(self.batches.device) / 1e9
        return f"{means} {self.samples_per_second():.0f} samples/s wait {wait:.0%} {memory:.1f} GB"


class StepProfiler(Protocol):
    """A profiler whose `step` is called after each optimizer step, such as torch.profiler.profile."""

    def step(self) -> None:
        """Note the end of a step."""


class NoProfiler:
    """A StepProfiler that does nothing."""

    def step(self) -> None:
        """Do nothing."""


@contextmanager
def profile_steps(directory: Path | None, steps: int) -> Iterator[StepProfiler]:
    """Write a trace of ACTIVE steps, to be opened in https://ui.perfetto.dev.

    Args:
        directory: The directory for the trace; None for no trace.
        steps: The number of steps of the epoch. With too few of them there is a warning, and no trace.
    """
    needed = WAIT + WARMUP + ACTIVE
    if directory is not None and steps < needed:
        logger.warning(
            f"--profile wrote no trace: it needs an epoch of {needed} steps or more, and this one has {steps}."
        )
    if directory is None or steps < needed:
        yield NoProfiler()
        return
    directory.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path = directory / f"trace_rank{rank()}.json"
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler

"""How fast an epoch goes, and how much of that is waiting for data; a trace of a few steps."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from batteries.core.memory import peak_memory
from batteries.core.ranks import rank, world_size
from batteries.data.loaders import Batch, EpochBatches
from batteries.training.metrics import MeanMetrics

logger = logging.getLogger("batteries")


class Stopwatch:
    """Gives the batches of an epoch on, and keeps the time; `metrics` counts the samples of this rank."""

    def __init__(self, batches: EpochBatches, metrics: MeanMetrics) -> None:
        self.batches = batches
        self.metrics = metrics
        self._count = metrics.count
        self._begin = time.perf_counter()
        self._waited = 0.0

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def timing(self, steps: int) -> dict[str, float]:
        """What timings.jsonl keeps of an epoch of which `steps` were done here. Seconds."""
        seconds = time.perf_counter() - self._begin
        return {
            "seconds": round(seconds, 3),
            "step_seconds": round(seconds / max(steps, 1), 6),
            "data_wait_seconds": round(self._waited, 3),
            "samples_per_second": round(self.samples_per_second(), 1),
        }

    def samples_per_second(self) -> float:
        """Over all ranks, since the start of the epoch."""
        return (self.metrics.count - self._count) * world_size() / (time.perf_counter() - self._begin)

    def status(self) -> str:
        """For the progress bar: means so far, samples a second, the share of time spent waiting for data, peak memory.

        Short, so that it fits beside the bar into 80 columns.
        """
        means = " ".join(f"{name} {value:.3f}" for name, value in self.metrics.compute_local().items())
        share = self._waited / (time.perf_counter() - self._begin)
        memory = peak_memory(self.batches.loader.device) / 1e9
        return f"{means} {self.samples_per_second():.0f}/s wait {share:.0%} {memory:.1f} GB"


WAIT, WARMUP, ACTIVE = 2, 3, 5  # steps before the trace, steps that only warm the profiler up, and steps in the trace


@contextmanager
def profile_steps(folder: Path | None, steps: int) -> Iterator[Any]:
    """Write a trace of ACTIVE of `steps` into `folder`, for https://ui.perfetto.dev; `step()` is called after each."""
    least = WAIT + WARMUP + ACTIVE
    if folder is not None and steps < least:
        logger.warning(f"--profile wrote no trace: it wants an epoch of {least} steps or more.")
    if folder is None or steps < least:
        yield _NoProfiler()
        return
    folder.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path = folder / f"trace_rank{rank()}.json"
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler


class _NoProfiler:
    def step(self) -> None:
        """Nothing."""

"""What a run logs: lines on the console, metrics.jsonl and timings.jsonl, and points in the trackers."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from batteries.core.jsonl import read_jsonl
from batteries.core.ranks import is_rank_zero
from batteries.run.config import RunConfig
from batteries.run.console import Console
from batteries.run.directory import RunDirectory
from batteries.tracking.base import TrackedRun
from batteries.tracking.manager import Trackers

logger = logging.getLogger("batteries")


class RunLogger:
    """Writes log lines, .jsonl files and tracker points. Every rank makes the same calls; rank 0 writes.

    Attributes:
        console: The console and train.log.
        trackers: The trackers; none on ranks other than 0.
    """

    def __init__(self, directory: RunDirectory, config: RunConfig) -> None:
        self.console = Console(directory.path / "train.log", config.quiet)
        self.trackers = Trackers(config.tracker if is_rank_zero() else ())
        self._directory = directory
        self._main_metric = config.main_metric

    def start_trackers(self, config: Mapping[str, Any], resumed_at: int | None) -> None:
        """Start the trackers, or continue the same run in each; log the points of metrics.jsonl that one lacks.

        Args:
            config: The options, as JSON values.
            resumed_at: The number of optimizer steps of the run so far if it is resumed; None for a new run.
        """
        if not is_rank_zero():
            return
        record = self._directory.metadata.values
        self.trackers.start(
            TrackedRun(
                id=record["id"],
                logdir=self._directory.path,
                config=config,
                record=record,
                metric=self._main_metric,
                resumed_at=resumed_at,
            )
        )
        steps_before_stage = last_step = 0
        for _, line in read_jsonl(self._directory.path / "metrics.jsonl"):
            if line["epoch"] == 1:
                steps_before_stage += last_step
            last_step = line["step"]
            self._log_point(line, steps_before_stage + last_step)

    def log_lines(self, lines: Iterable[str]) -> None:
        """Log lines from rank 0."""
        for line in lines:
            if is_rank_zero():
                logger.info(line)

    def log_curves(self, stage: str, values: Mapping[str, float], total_step: int) -> None:
        """Log one point for each value within an epoch; `total_step` counts the optimizer steps of the run."""
        self.trackers.log({f"{stage}/steps/{name}": value for name, value in values.items()}, total_step)

    def log_image(self, name: str, make: Callable[[], Any], total_step: int) -> None:
        """Log an image, a uint8 tensor (3, H, W) or None, which `make` returns if a tracker needs it."""
        self.trackers.image(name, make, total_step)

    def log_epoch(self, line: Mapping[str, Any], timing: Mapping[str, float], total_step: int) -> None:
        """Append to metrics.jsonl and timings.jsonl, and log a point for each metric.

        Args:
            line: `stage`, `epoch`, `step`, `lr`, and a mapping of metrics for each split.
            timing: The timing of the epoch.
            total_step: The optimizer steps of the run.
        """
        if not is_rank_zero():
            return
        self._directory.jsonl.add("metrics.jsonl", line)
        self._directory.jsonl.add("timings.jsonl", {"stage": line["stage"], "epoch": line["epoch"], **timing})
        self._log_point(line, total_step)

    def finish_trackers(self, score: float | None = None, best: Path | None = None, *, failed: bool = False) -> None:
        """Finish the trackers; with the best score and its checkpoint if the run has finished."""
        self.trackers.finish(score, best, failed)

    def _log_point(self, line: Mapping[str, Any], total_step: int) -> None:
        """Log a line of metrics.jsonl as a point for each of its numbers."""
        stage = line["stage"]
        values = {f"{stage}/lr": line["lr"]}
        for split, metrics in line.items():
            if isinstance(metrics, Mapping):
                values |= {f"{stage}/{split}/{name}": value for name, value in metrics.items()}
        self.trackers.log(values, total_step)


def finite_or_none(values: Mapping[str, float]) -> dict[str, float | None]:
    """Replace numbers that are not finite by None, because JSON has none."""
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}

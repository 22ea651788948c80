"""Histories of runs: options, metadata, and metrics per epoch. Reading them does not import torch."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from batteries.core.errors import UserError
from batteries.core.files import describe_missing_run, read_json
from batteries.core.jsonl import read_jsonl
from batteries.core.text import find_repeated

MAX_CLASS_METRICS = 8  # metrics of single classes, such as iou/cat, up to which a report shows them


class StageSpan(NamedTuple):
    """The epochs of a stage, counted from 1 over all stages, both ends included."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class RunHistory:
    """One run, finished or not.

    Attributes:
        name: The name of the run in the report.
        directory: The run directory.
        config: The contents of config.json.
        metadata: The contents of run.json; empty if the run was interrupted before it was written.
        epochs: The lines of metrics.jsonl, one per epoch over all stages.
        timings: The lines of timings.jsonl.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    metadata: dict[str, Any]
    epochs: list[dict[str, Any]]
    timings: list[dict[str, Any]]

    @property
    def main_metric(self) -> str:
        """The metric that ranks epochs."""
        return self.config.get("main_metric", "accuracy")

    @property
    def splits(self) -> list[str]:
        """The splits with metrics: train, valid, and valid_ema if weights are averaged."""
        return unique(name for line in self.epochs for name, value in line.items() if isinstance(value, Mapping))

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, the main metric first; those of single classes only if there are few of them."""
        names = unique(name for line in self.epochs for split in self.splits for name in line.get(split, {}))
        if sum("/" in name for name in names) > MAX_CLASS_METRICS:
            names = [name for name in names if "/" not in name or name == self.main_metric]
        return sorted(names, key=lambda name: name != self.main_metric)

    @property
    def ranked_split(self) -> str:
        """The split whose scores rank epochs: valid_ema if weights are averaged."""
        return "valid_ema" if "valid_ema" in self.splits else "valid"

    def has(self, split: str, metric: str) -> bool:
        """Return whether a metric was computed on a split."""
        return any(metric in line.get(split, {}) for line in self.epochs)

    def curve(self, split: str, metric: str) -> list[float]:
        """Return one value per epoch; NaN if it is missing or not finite."""
        return [_to_number(line.get(split, {}).get(metric)) for line in self.epochs]

    def learning_rates(self) -> list[float]:
        """Return the highest learning rate of each epoch; of a run that did not record it, that of the last step."""
        return [_to_number(line.get("max_lr", line.get("lr"))) for line in self.epochs]

    def best_epoch(self, span: StageSpan | None = None) -> int | None:
        """Return the best epoch of the run, or of one stage.

        Returns:
            The epoch, counted from 1 over all stages; the earlier one on a tie; None if no score is finite.
        """
        first = 1 if span is None else span.first
        last = len(self.epochs) if span is None else span.last
        scores = self.curve(self.ranked_split, self.main_metric)[first - 1 : last]
        sign = 1 if self.config.get("minimize_metric") else -1
        finite = [(sign * score, epoch) for epoch, score in enumerate(scores, first) if math.isfinite(score)]
        return min(finite)[1] if finite else None

    def value(self, epoch: int | None, split: str, metric: str) -> float:
        """Return one metric of one epoch; NaN if `epoch` is None."""
        return math.nan if epoch is None else self.curve(split, metric)[epoch - 1]

    def stage_spans(self) -> list[StageSpan]:
        """List the stages that have epochs, in order."""
        stages = [line["stage"] for line in self.epochs]
        return [
            StageSpan(name, stages.index(name) + 1, len(stages) - stages[::-1].index(name)) for name in unique(stages)
        ]

    def describe_epoch(self, epoch: int | None) -> str:
        """Return the stage and its epoch, such as `stage1 epoch 3`; empty for None."""
        if epoch is None:
            return ""
        line = self.epochs[epoch - 1]
        return f"{line['stage']} epoch {line['epoch']}"

    def training_seconds(self) -> float:
        """Return the seconds of training, without validation and checkpoints."""
        return sum(line["seconds"] for line in self.timings)

    def samples_per_second(self) -> float:
        """Return the training throughput over all epochs; NaN without timings."""
        samples = sum(line["samples_per_second"] * line["seconds"] for line in self.timings)
        seconds = self.training_seconds()
        return samples / seconds if seconds else math.nan

    def total_seconds(self) -> float:
        """Return the seconds from the first start to the end, interruptions included; NaN if the run has not ended."""
        start = self.metadata.get("start")
        end = self.metadata.get("end")
        if not (start and end):
            return math.nan
        return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()

    def outcome(self) -> str:
        """Return how the run ended."""
        return self.metadata.get("exit") or "not ended: still running, or killed"

    def summary(self) -> str:
        """Return how the run ended, when it started, and its commit."""
        parts = [self.outcome()]
        if start := self.metadata.get("start"):
            parts.append(f"started {datetime.fromisoformat(start):%Y-%m-%d %H:%M} UTC")
        if commit := self.metadata.get("git_commit"):
            changes = " with uncommitted changes" if self.metadata.get("git_dirty") else ""
            parts.append(f"git {commit[:12]}{changes}")
        return " · ".join(parts)


def unique(values: Iterable[Any]) -> list[Any]:
    """Return each value once, in order."""
    return list(dict.fromkeys(values))


def find_runs(directories: Sequence[Path]) -> list[Path]:
    """List the run directories: each directory is a run, or holds runs, such as folds.

    Raises:
        UserError: If a directory is neither, or a run is given twice.
    """
    runs = []
    for directory in directories:
        found = [directory] if is_run(directory) else [path for path in sorted(directory.glob("*")) if is_run(path)]
        if not found:
            raise UserError(describe_missing_run(directory))
        runs += found
    if repeated := find_repeated(str(run.resolve()) for run in runs):
        raise UserError(f"{repeated[0]} is given twice; give each run once.")
    return runs


def is_run(directory: Path) -> bool:
    """Return whether a run was started in a directory."""
    return (directory / "config.json").is_file()


def common_directory(runs: Sequence[Path]) -> Path:
    """Return the closest directory that contains all runs and is not a run."""
    directory = Path(os.path.commonpath([run.resolve() for run in runs]))
    while is_run(directory):
        directory = directory.parent
    return directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory


def read_histories(runs: Sequence[Path]) -> list[RunHistory]:
    """Read all runs, named by their path in their common directory. Raises UserError for a damaged file."""
    if len(runs) == 1:
        return [read_history(runs[0], runs[0].resolve().name)]
    common = common_directory(runs).resolve()
    return [read_history(run, run.resolve().relative_to(common).as_posix()) for run in runs]


def read_history(directory: Path, name: str) -> RunHistory:
    """Read what exists of a run.

    Raises:
        UserError: If a file is damaged; a last line that is incomplete, because the run was killed, is ignored.
    """
    return RunHistory(
        name=name,
        directory=directory,
        config=read_object(directory / "config.json"),
        metadata=read_object(directory / "run.json"),
        epochs=[line for _, line in read_jsonl(directory / "metrics.jsonl")],
        timings=[line for _, line in read_jsonl(directory / "timings.jsonl")],
    )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file does not exist. Raises UserError if it is damaged."""
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (not a JSON object); restore it.")
    return values


def _to_number(value: Any) -> float:
    """Convert a value of metrics.jsonl, in which null stands for numbers that are not finite."""
    return float(value) if isinstance(value, int | float) else math.nan

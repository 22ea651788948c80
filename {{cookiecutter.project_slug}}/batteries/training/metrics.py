"""Metrics of an epoch. They stay on the device during the steps, because each read waits for a GPU."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.metric_names import HIGHER_IS_BETTER, LOWER_IS_BETTER
from batteries.core.ranks import is_rank_zero, rank, world_size
from batteries.core.text import did_you_mean
from batteries.distributed.collectives import gather_over_ranks, interleave_over_ranks, sum_over_ranks, union_over_ranks

logger = logging.getLogger("batteries")

USUAL_METRICS = ("loss", "accuracy")  # what valid_fn reports in a new project


class MeanMetrics:
    """Means over samples, exact for any number of batches and ranks.

    Values are summed in float64 in the order of the batches, so the result does not depend on when they are read. They
    are read from the device only by `compute`, `compute_local` and `state`.

    Attributes:
        count: The number of samples on this rank so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, float] = {}
        self._unread: dict[str, list[tuple[torch.Tensor, int]]] = {}  # values of shape () and their weights

    def update(self, count: int, **values: torch.Tensor) -> None:
        """Add a batch. Does not wait for the device.

        Args:
            count: The number of samples.
            values: For each metric one value per sample, shape (count,), or their mean, shape ().

        Raises:
            ValueError: If a value has another shape.
        """
        self.count += count
        for name, value in values.items():
            if value.ndim == 0:
                unread = value.detach(), count
            elif value.shape == (count,):
                unread = _sum(value.detach()), 1
            else:
                shape = tuple(value.shape)
                raise ValueError(f"metric {name} has shape {shape} for {count} samples; give () or ({count},)")
            self._unread.setdefault(name, []).append(unread)

    def compute(self, expected_count: int | None = None) -> dict[str, float]:
        """Return the means over all ranks. Every rank must call it. Waits for the device.

        Args:
            expected_count: Assert that the ranks have this number of samples together.
        """
        sums = self._read()
        names = union_over_ranks(sums)  # a rank without a batch has no names
        local = torch.tensor([self.count, *(sums.get(name, 0.0) for name in names)], dtype=torch.float64)
        count, *totals = sum_over_ranks(local).tolist()
        assert expected_count is None or count == expected_count, f"{count} samples instead of {expected_count}"
        return {name: total / count for name, total in zip(names, totals, strict=True)}

    def compute_local(self) -> dict[str, float]:
        """Return the means on this rank so far. Waits for the device."""
        return {name: total / self.count for name, total in self._read().items()}

    def state(self) -> list[dict[str, Any]]:
        """Return the count and the sums of each rank, as plain values. Every rank must call it."""
        return gather_over_ranks({"count": self.count, "sums": dict(self._read())})

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Load the output of `state`; if the number of ranks has changed, rank 0 takes the sums of all."""
        parts: list[Mapping[str, Any]] = []
        if len(state) == world_size():
            parts = [state[rank()]]
        elif is_rank_zero():
            parts = list(state)
        self.count = sum(part["count"] for part in parts)
        names = sorted(set().union(*(part["sums"] for part in parts)))
        self._sums = {name: sum(part["sums"].get(name, 0.0) for part in parts) for name in names}

    def _read(self) -> dict[str, float]:
        """Return the sums, after adding the unread values one by one: so the time of a read changes no bit."""
        for name, unread in self._unread.items():
            values = torch.stack([value for value, _ in unread]).tolist()
            total = self._sums.get(name, 0.0)
            for value, (_, weight) in zip(values, unread, strict=True):
                total += value * weight
            self._sums[name] = total
        self._unread.clear()
        return self._sums


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum in float64, or in float32 on mps, which has no float64."""
    return values.sum(dtype=torch.float32 if values.device.type == "mps" else torch.float64)


ScoreFunction = Callable[[Any, np.ndarray, np.ndarray], float]


class PredictionCollector:
    """Collects the outputs and targets of a complete split, for metrics that are not means over samples."""

    def __init__(self) -> None:
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch of an EvalLoader. Waits for the device.

        Args:
            outputs: The outputs of the model, such as probabilities (N, classes).
            targets: The targets (N, ...).
        """
        self._batches.append((outputs.cpu().numpy(), targets.cpu().numpy()))

    def score(self, functions: Mapping[str, ScoreFunction]) -> dict[str, float]:
        """Compute scores over all ranks. Every rank must call it.

        Args:
            functions: Functions of (sklearn.metrics, targets, outputs), with the name of each score.

        Returns:
            The scores, with the same names; NaN if one is undefined, such as ROC AUC of a class without samples.
        """
        if not functions:
            return {}
        from sklearn import metrics

        outputs, targets = self.gather()
        return {name: _score(name, function, metrics, targets, outputs) for name, function in functions.items()}

    def gather(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all outputs and all targets, in the order of the split, equal on all ranks. Every rank must call it.

        An EvalLoader distributes its batches over the ranks in turn.
        """
        outputs, targets = zip(*interleave_over_ranks(self._batches), strict=True)
        return np.concatenate(outputs), np.concatenate(targets)


def check_metrics(names: Iterable[str], scores: Iterable[str], main_metric: str, *, minimize: bool) -> None:
    """Check the names of additional metrics, and the direction of the main metric.

    Args:
        names: The metrics that are requested with `--scores`.
        scores: The metrics that exist besides those that valid_fn reports.
        main_metric: The main metric; `check_main_metric` checks its name.
        minimize: Whether `--minimize-metric` was given.

    Raises:
        UserError: If a metric is unknown, or the direction of a known main metric is wrong.
    """
    known = (*USUAL_METRICS, *scores)
    for name in names:
        if name not in known:
            raise _unknown_metric("--scores", name, known)
    if main_metric in LOWER_IS_BETTER and not minimize:
        raise UserError(f"--main-metric {main_metric}: lower is better. Add --minimize-metric.")
    if main_metric in HIGHER_IS_BETTER and minimize:
        raise UserError(f"--main-metric {main_metric}: higher is better. Remove --minimize-metric.")


class ValidationConfig(Protocol):
    """The options of validation."""

    @property
    def main_metric(self) -> str:
        """The metric that ranks checkpoints."""
        ...


ConfigT = TypeVar("ConfigT", bound=ValidationConfig)


def check_main_metric(
    config: ConfigT, scores: Iterable[str], validate: Callable[[ConfigT], Mapping[str, float]]
) -> None:
    """Check the name of the main metric before training. A custom name is one that valid_fn must report.

    Args:
        config: The options.
        scores: The metrics that exist besides those that valid_fn reports.
        validate: Calls valid_fn with other options, those for one sample; only called for a custom name. Every rank
            must call it.

    Raises:
        UserError: If valid_fn does not report it.
    """
    known = [*USUAL_METRICS, *scores]
    if config.main_metric in known:
        return
    one_sample: Any = {"scores": (), "valid_batch_size": 1, "limit_batches": 1, "num_workers": 0}
    reported = validate(replace(config, **one_sample))  # type: ignore[type-var]
    if config.main_metric not in reported:
        usual = [name for name in USUAL_METRICS if name in reported]
        raise _unknown_metric("--main-metric", config.main_metric, [*usual, *reported, *scores])


def main_score(metrics: Mapping[str, float], main_metric: str) -> float:
    """Return the main metric of an epoch, which ranks it.

    NaN outputs can still have an accuracy, but their epoch must never be the best one: the score of an epoch whose loss
    is not finite is NaN.

    Raises:
        UserError: If `metrics`, which valid_fn returned, does not have it.
    """
    if main_metric not in metrics:
        raise _unknown_metric("--main-metric", main_metric, metrics)
    return float(metrics[main_metric]) if math.isfinite(metrics.get("loss", 0.0)) else math.nan


def _unknown_metric(flag: str, name: str, known: Iterable[str]) -> UserError:
    known = list(dict.fromkeys(known))
    hint = did_you_mean(name, known) or "."
    return UserError(f"{flag} {name} is not a known metric{hint} Use one of: {', '.join(known)}.")


def _score(name: str, function: ScoreFunction, metrics: Any, targets: np.ndarray, outputs: np.ndarray) -> float:
    try:
        return float(function(metrics, targets, outputs))
    except ValueError as error:
        logger.warning(f"{name} is undefined: {str(error).splitlines()[0]}")
        return math.nan

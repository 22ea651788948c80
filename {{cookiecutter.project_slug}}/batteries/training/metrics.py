"""Metrics of an epoch. They stay on the device during the steps, because each read waits for a GPU."""

import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.exact_sum import ExactSum
from batteries.core.metric_names import (
    ScoreFunction,
    is_higher_better,
    is_lower_better,
    name_values,
    select_scores,
)
from batteries.core.ranks import is_rank_zero
from batteries.core.text import did_you_mean
from batteries.distributed.collectives import gather_over_ranks, interleave_over_ranks

logger = logging.getLogger("batteries")

Means = dict[str, Any]  # floats, and arrays of float64


class MetricNames(Protocol):
    """What experiment/task.py defines of its metrics."""

    @property
    def MAIN_METRIC(self) -> str:  # noqa: N802 (a constant of a module)
        """The default main metric."""
        ...

    @property
    def SCORES(self) -> Mapping[str, ScoreFunction]:  # noqa: N802
        """The scores of the whole validation split."""
        ...


class MeanMetrics:
    """Means over samples, equal for any order of the batches, any number of ranks and any time of a read.

    Sums are exact and rounded once, see `ExactSum`. Values are read from the device only by `compute`, `compute_local`
    and `state`.

    Args:
        summarize: Computes the metrics from the means; by default the metrics are the means.
        classes: The names of the values of a metric that is an array (C,): `iou/` becomes `iou/cat` and `iou/dog`.
            Without them, arrays are left out.

    Attributes:
        count: The number of samples on this rank so far.
    """

    def __init__(self, summarize: Callable[[Means], Mapping[str, Any]] = dict, classes: Sequence[str] = ()) -> None:
        self.count = 0
        self._summarize = summarize
        self._classes = classes
        self._sums: dict[str, ExactSum] = {}
        self._unread: dict[str, list[tuple[torch.Tensor, int]]] = {}  # values, and their weights

    def update(self, count: int, **values: torch.Tensor) -> None:
        """Add a batch. Does not wait for the device.

        Args:
            count: The number of samples.
            values: For each metric one value per sample, shape (count,) or (count, ...), or their mean, shape ().

        Raises:
            ValueError: If a value has another shape.
        """
        self.count += count
        for name, value in values.items():
            if value.ndim == 0:
                unread = value.detach(), count
            elif len(value) == count:
                unread = _sum(value.detach()), 1
            else:
                shape = tuple(value.shape)
                raise ValueError(f"metric {name} has shape {shape} for {count} samples; give () or ({count}, ...)")
            self._unread.setdefault(name, []).append(unread)

    def compute(self, expected_count: int | None = None) -> dict[str, float]:
        """Return the metrics over all ranks. Every rank must call it. Waits for the device.

        Args:
            expected_count: Assert that the ranks have this number of samples together.
        """
        count, sums = _merge(gather_over_ranks(self._read()))
        assert expected_count is None or count == expected_count, f"{count} samples instead of {expected_count}"
        return self._to_metrics(count, sums)

    def compute_local(self) -> dict[str, float]:
        """Return the metrics on this rank so far. Waits for the device."""
        return self._to_metrics(*_merge([self._read()]))

    def _to_metrics(self, count: int, sums: Mapping[str, ExactSum]) -> dict[str, float]:
        means = {name: total.value() / count for name, total in sums.items()}
        values = {name: mean.item() if mean.ndim == 0 else mean for name, mean in means.items()}
        return name_values(self._summarize(values), self._classes)

    def state(self) -> list[dict[str, Any]]:
        """Return the count and the sums over all ranks, as plain values. Every rank must call it."""
        count, sums = _merge(gather_over_ranks(self._read()))
        tensors = {name: [torch.from_numpy(part) for part in total.parts()] for name, total in sums.items()}
        return [{"count": count, "sums": tensors}]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Load the output of `state`: rank 0 takes the sums of all ranks."""
        parts = [_to_parts(entry) for entry in state] if is_rank_zero() else []
        self.count, self._sums = _merge(parts)

    def _read(self) -> "MetricSums":
        """Return the count and the parts of the sums, after adding the values that were not read yet."""
        for name, unread in self._unread.items():
            total = self._sums.setdefault(name, ExactSum())
            values = torch.stack([value for value, _ in unread]).cpu().double().numpy()
            for value, (_, weight) in zip(values, unread, strict=True):
                total.add(value * weight)
        self._unread.clear()
        return MetricSums(self.count, {name: total.parts() for name, total in self._sums.items()})


class MetricSums(NamedTuple):
    """The sums of the metrics of one rank.

    Attributes:
        samples: The number of samples.
        parts: The output of `ExactSum.parts` for each metric.
    """

    samples: int
    parts: Mapping[str, Sequence[Any]]


def _merge(ranks: Sequence[MetricSums]) -> tuple[int, dict[str, ExactSum]]:
    """Return the count and the sums over several ranks. A rank without a batch has no sums."""
    names = sorted(set().union(*(rank.parts for rank in ranks)))
    # Interned, because pickle writes equal strings only once if they are one object: otherwise the bytes of a
    # checkpoint would depend on whether names were received from another process.
    sums = {sys.intern(name): ExactSum(part for rank in ranks for part in rank.parts.get(name, ())) for name in names}
    return sum(rank.samples for rank in ranks), sums


def _to_parts(entry: Mapping[str, Any]) -> MetricSums:
    """Return an entry of `MeanMetrics.state`; in checkpoints of earlier versions a sum is one number or tensor."""
    parts = {name: value if isinstance(value, list) else [value] for name, value in entry["sums"].items()}
    return MetricSums(entry["count"], parts)


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over samples in float64, or in float32 on mps, which has no float64."""
    return values.sum(0, dtype=torch.float32 if values.device.type == "mps" else torch.float64)


class PredictionCollector:
    """Collects the predictions and targets of a complete split, for metrics that are not means over samples.

    Args:
        functions: The scores that exist.
        names: The metrics that are requested, such as `macro_f1` or `roc_auc/cat`; others than scores are ignored.
        classes: The names of the values of a score that is an array.

    Attributes:
        functions: The scores that are requested. If there are none, nothing needs to be added.
    """

    def __init__(
        self, functions: Mapping[str, ScoreFunction], names: Iterable[str], classes: Sequence[str] = ()
    ) -> None:
        self.functions = select_scores(functions, names)
        self._classes = classes
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch of an EvalLoader. Waits for the device.

        Args:
            outputs: The predictions, such as probabilities (N, classes).
            targets: The targets (N, ...).
        """
        self._batches.append((outputs.cpu().numpy(), targets.cpu().numpy()))

    def score(self) -> dict[str, float]:
        """Compute the scores over all ranks. Every rank must call it.

        Returns:
            The scores; NaN if one is undefined, such as ROC AUC of a class without samples.
        """
        if not self.functions:
            return {}
        from sklearn import metrics

        outputs, targets = self.gather()
        scores = {name: _score(name, function, metrics, targets, outputs) for name, function in self.functions.items()}
        return name_values(scores, self._classes)

    def gather(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all outputs and all targets, in the order of the split, equal on all ranks. Every rank must call it.

        An EvalLoader distributes its batches over the ranks in turn.
        """
        outputs, targets = zip(*interleave_over_ranks(self._batches), strict=True)
        return np.concatenate(outputs), np.concatenate(targets)


class ValidationConfig(Protocol):
    """The options of validation."""

    @property
    def main_metric(self) -> str:
        """The metric that ranks checkpoints."""
        ...

    @property
    def minimize_metric(self) -> bool:
        """Whether a lower value is better."""
        ...

    @property
    def scores(self) -> Sequence[str]:
        """Other metrics that are requested."""
        ...


def check_metrics(config: ValidationConfig, task: MetricNames) -> None:
    """Check the names of additional metrics, and the direction of the main metric; its name is checked later.

    Raises:
        UserError: If a metric is unknown, or the direction of a known main metric is wrong.
    """
    known = _known_metrics(task)
    for name in config.scores:
        if name not in known:
            raise _unknown_metric("--scores", name, known)
    name = config.main_metric
    if is_lower_better(name) and not config.minimize_metric:
        raise UserError(f"--main-metric {name}: lower is better. Add --minimize-metric.")
    if is_higher_better(name) and config.minimize_metric:
        raise UserError(f"--main-metric {name}: higher is better. Use --no-minimize-metric.")


def _known_metrics(task: MetricNames) -> list[str]:
    """Return the metrics that are known before validation."""
    return list(dict.fromkeys(["loss", task.MAIN_METRIC, *task.SCORES]))


ConfigT = TypeVar("ConfigT", bound=ValidationConfig)


def check_main_metric(config: ConfigT, task: MetricNames, validate: Callable[[ConfigT], Mapping[str, float]]) -> None:
    """Check the name of the main metric before training. A custom name is one that valid_fn must report.

    Args:
        config: The options.
        task: The metrics of experiment/task.py.
        validate: Calls valid_fn with other options, those for one sample; only called for a custom name. Every rank
            must call it.

    Raises:
        UserError: If valid_fn does not report it.
    """
    known = _known_metrics(task)
    if config.main_metric in known:
        return
    one_sample: Any = {"scores": (), "valid_batch_size": 1, "limit_batches": 1, "num_workers": 0}
    reported = validate(replace(config, **one_sample))  # type: ignore[type-var]
    if config.main_metric not in reported:
        usual = [name for name in known if name in reported]
        raise _unknown_metric("--main-metric", config.main_metric, [*usual, *reported, *task.SCORES])


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


def _score(name: str, function: ScoreFunction, metrics: Any, targets: np.ndarray, outputs: np.ndarray) -> Any:
    try:
        return function(metrics, targets, outputs)
    except ValueError as error:
        logger.warning(f"{name} is undefined: {str(error).splitlines()[0]}")
        return math.nan

"""Metrics, summed on the device and read once: a read waits for the GPU, so no step may do it."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.metric_names import HIGHER_IS_BETTER, LOWER_IS_BETTER
from batteries.core.ranks import is_rank_zero, rank, world_size
from batteries.core.text import did_you_mean
from batteries.distributed.collectives import gather_over_ranks, interleave_over_ranks, sum_over_ranks, union_over_ranks

logger = logging.getLogger("batteries")


class MeanMetrics:
    """Means over samples, exact for any number of batches and ranks: summed in float64, in the order of the batches.

    What a step gives stays on its device until means are asked for, and nothing waits for it before.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, float] = {}
        self._unread: dict[str, list[tuple[torch.Tensor, int]]] = {}  # numbers of shape (), and what they count for

    def update(self, count: int, **values: torch.Tensor) -> None:
        """Add `count` samples; a value is one number per sample, shape (count,), or their mean, shape ()."""
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
        """The means over all ranks. Waits for the device. Every rank has to call it.

        `expected_count` asserts how many samples there must have been, over all ranks.
        """
        sums = self._read()
        names = union_over_ranks(sums)  # a rank without a batch knows none
        ours = torch.tensor([self.count, *(sums.get(name, 0.0) for name in names)], dtype=torch.float64)
        count, *totals = sum_over_ranks(ours).tolist()
        assert expected_count is None or count == expected_count, f"{count} samples instead of {expected_count}"
        return {name: total / count for name, total in zip(names, totals, strict=True)}

    def compute_local(self) -> dict[str, float]:
        """The means on this rank so far, for the progress bar. Waits for the device."""
        return {name: total / self.count for name, total in self._read().items()}

    def state(self) -> list[dict[str, Any]]:
        """The sums of every rank, as plain values. Every rank has to call it."""
        return gather_over_ranks({"count": self.count, "sums": dict(self._read())})

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `state` gave; with another number of ranks the first takes the sums of all."""
        parts = [state[rank()]] if len(state) == world_size() else state if is_rank_zero() else []
        self.count = sum(part["count"] for part in parts)
        names = sorted(set().union(*(part["sums"] for part in parts)))
        self._sums = {name: sum(part["sums"].get(name, 0.0) for part in parts) for name in names}

    def _read(self) -> dict[str, float]:
        """The sums, with all that a device had to give. One after the other: when they are read changes no bit."""
        for name, unread in self._unread.items():
            numbers = torch.stack([number for number, _ in unread]).tolist()
            total = self._sums.get(name, 0.0)
            for number, (_, weight) in zip(numbers, unread, strict=True):
                total += number * weight
            self._sums[name] = total
        self._unread.clear()
        return self._sums


def _sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` in float64, or float32 on mps, which has no float64."""
    return values.sum(dtype=torch.float32 if values.device.type == "mps" else torch.float64)


ScoreFunction = Callable[[Any, np.ndarray, np.ndarray], float]


class PredictionCollector:
    """What a model said of each sample of an EvalLoader, and what was right: for scores that are no means over samples.

    `gather` gives the same arrays on each rank, in the order of the split, for any number of ranks.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, said: torch.Tensor, targets: torch.Tensor) -> None:
        """Keep one batch: (N, ...) and (N, ...). Waits for the device."""
        self._batches.append((said.cpu().numpy(), targets.cpu().numpy()))

    def score(self, functions: Mapping[str, ScoreFunction]) -> dict[str, float]:
        """What each function gives for (sklearn.metrics, targets, said); NaN where a score has no meaning.

        Such as ROC AUC of a class without samples. Every rank has to call it.
        """
        if not functions:
            return {}
        from sklearn import metrics

        said, targets = self.gather()
        return {name: _score(name, function, metrics, targets, said) for name, function in functions.items()}

    def gather(self) -> tuple[np.ndarray, np.ndarray]:
        """All that was said and all targets. Every rank has to call it; an EvalLoader deals its batches out in turn."""
        said, targets = zip(*interleave_over_ranks(self._batches), strict=True)
        return np.concatenate(said), np.concatenate(targets)


def check_metrics(names: Sequence[str], scores: Iterable[str], main_metric: str, *, minimize: bool) -> None:
    """Raise BadInput for a metric that is neither loss nor accuracy nor in `scores`, and for the wrong direction."""
    known = ("loss", "accuracy", *scores)
    for name in names:
        if name not in known:
            flag = "--main-metric" if name == main_metric else "--scores"
            raise UserError(
                f"{flag} {name} is no metric{did_you_mean(name, known) or '.'} Use one of: {', '.join(known)}."
            )
    if main_metric in (HIGHER_IS_BETTER if minimize else LOWER_IS_BETTER):  # of a metric of yours, you know
        which, hint = ("more", "leave out") if minimize else ("less", "give")
        raise UserError(f"--main-metric {main_metric} is better when it is {which}: {hint} --minimize-metric.")


def _score(name: str, function: ScoreFunction, metrics: Any, targets: np.ndarray, said: np.ndarray) -> float:
    try:
        return float(function(metrics, targets, said))
    except ValueError as error:
        logger.warning(f"{name} has no meaning here: {str(error).splitlines()[0]}")
        return math.nan

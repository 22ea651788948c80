"""Comparison of two recipes: intervals over pairs of runs, and over the samples that both predicted.

Statistics come from scipy. Differences are the second recipe minus the first one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from batteries.core.errors import UserError
from batteries.evaluation.mask_table import is_mask_table, read_mask_table
from batteries.evaluation.predictions import read_predictions
from batteries.evaluation.scoring import sample_scores

Method = Literal["t", "bootstrap"]
POWER = 0.8  # probability with which `pairs_needed` shows an effect
MAX_PAIRS = 100_000  # more runs than anyone will train
MIN_BOOTSTRAP_PAIRS = 10  # of fewer, the bootstrap interval is much too narrow
RESAMPLES = 10_000
BATCH = 100  # resamples that are in memory at once


class Interval(NamedTuple):
    """A mean with the bounds of its confidence interval; the bounds are NaN if they are not known."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval shows a difference."""
        return self.low > 0 or self.high < 0


def confidence_interval(
    values: np.ndarray, confidence: float = 0.95, *, method: Method = "t", overlap: float = 0.0
) -> Interval:
    """Compute a confidence interval for the mean of values (n,).

    Args:
        values: Scores, or differences of pairs.
        confidence: The confidence level.
        method: Student's t, or the BCa bootstrap (Efron 1987), which needs about 20 values.
        overlap: The ratio of the sizes of validation and train split if the values are of several folds, whose train
            splits overlap: the variance of the mean is (1 / n + overlap) times that of the values (Nadeau and Bengio
            2003, "Inference for the generalization error"); only for t.
    """
    from scipy import stats

    count = len(values)
    mean = float(values.mean())
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    if method == "bootstrap":
        result = stats.bootstrap(
            (values,), np.mean, confidence_level=confidence, n_resamples=RESAMPLES, batch=BATCH, method="BCa", rng=0
        )
        return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))
    error = float(values.std(ddof=1)) * math.sqrt(1 / count + overlap)
    low, high = stats.t.interval(confidence, count - 1, loc=mean, scale=error)
    return Interval(mean, float(low), float(high))


def pairs_needed(
    differences: np.ndarray, confidence: float = 0.95, power: float = POWER, overlap: float = 0.0
) -> int | None:
    """Return how many pairs would be needed to show a difference of the observed size with probability `power`.

    The power of the paired t test is that of the noncentral t distribution, with the observed mean and deviation.

    Args:
        differences: The differences of pairs (n,).
        confidence: The confidence level.
        power: The probability.
        overlap: As for `confidence_interval`; with it, no number may be enough.

    Returns:
        The number; None without an effect or a deviation, or if it is above MAX_PAIRS.
    """
    from scipy import stats

    deviation = differences.std(ddof=1) if len(differences) > 1 else 0.0
    effect = abs(differences.mean()) / deviation if deviation > 0 else 0.0
    if effect == 0:
        return None

    def power_of(count: int) -> float:
        critical = stats.t.ppf((1 + confidence) / 2, count - 1)
        shift = effect / math.sqrt(1 / count + overlap)
        return float(stats.nct.sf(critical, count - 1, shift) + stats.nct.cdf(-critical, count - 1, shift))

    high = 2
    while power_of(high) < power:
        high *= 2
        if high > MAX_PAIRS:
            return None
    low = high // 2
    while high - low > 1:  # the power increases with the number
        middle = (low + high) // 2
        low, high = (low, middle) if middle >= 2 and power_of(middle) >= power else (middle, high)
    return high


class SampleComparison(NamedTuple):
    """Two recipes compared on the samples that both predicted.

    Attributes:
        metric: The score of a sample, such as accuracy.
        samples: The number of samples.
        interval: The mean difference over the samples.
        only_first: The samples that only the first recipe predicts correctly; None unless each has one run of classes.
        only_second: Those that only the second one predicts correctly.
        p_value: Of McNemar's exact test, if there are these counts.
    """

    metric: str
    samples: int
    interval: Interval
    only_first: int | None = None
    only_second: int | None = None
    p_value: float | None = None


def compare_samples(
    first: Sequence[Path], second: Sequence[Path], *, confidence: float = 0.95
) -> list[SampleComparison]:
    """Compare two recipes on the samples of their prediction files, each sample by the mean score over its runs.

    Args:
        first: The prediction files of the first recipe: one for each pair of runs.
        second: Those of the second one.
        confidence: The confidence level.

    Returns:
        One comparison for each score of single samples; none if targets are not known.

    Raises:
        UserError: If a pair of files has different samples, or a file is not valid.
    """
    tables = [[_read_sample_scores(path) for path in paths] for paths in (first, second)]
    for a, b, path_a, path_b in zip(*tables, first, second, strict=True):
        if (different := sorted(a.keys() ^ b.keys())) or any(a[name].keys() != b[name].keys() for name in a):
            what = f"the score {different[0]}" if different else "the same samples"
            raise UserError(f"{path_a} and {path_b} do not both have {what}; predict the same split with both runs.")
    compared = []
    for name in tables[0][0]:
        a, b = (_mean_by_sample([table[name] for table in side]) for side in tables)
        values = np.array([[a[sample], b[sample]] for sample in a])
        interval = confidence_interval(values[:, 1] - values[:, 0], confidence, method="bootstrap")
        comparison = SampleComparison(name, len(values), interval)
        if name == "accuracy" and len(first) == 1:
            comparison = comparison._replace(**_mcnemar(values[:, 0], values[:, 1]))
        compared.append(comparison)
    return compared


def _read_sample_scores(path: Path) -> dict[str, dict[str, float]]:
    """Return the score of each sample, by metric and id."""
    if is_mask_table(path):
        masks = read_mask_table(path)
        ids, scores = masks.ids, masks.image_scores()
    else:
        predictions = read_predictions(path)
        ids, scores = predictions.ids, sample_scores(predictions)
    return {name: dict(zip(ids, values.tolist(), strict=True)) for name, values in scores.items()}


def _mean_by_sample(runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for run in runs:
        for name, score in run.items():
            values.setdefault(name, []).append(score)
    return {name: sum(scores) / len(scores) for name, scores in values.items()}


def _mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Return the counts and the p value of McNemar's exact test, of 1 (correct) and 0, shape (N,) each."""
    from scipy import stats

    only_first = int(((first == 1) & (second == 0)).sum())
    only_second = int(((first == 0) & (second == 1)).sum())
    total = only_first + only_second
    p_value = float(stats.binomtest(only_second, total).pvalue) if total else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}

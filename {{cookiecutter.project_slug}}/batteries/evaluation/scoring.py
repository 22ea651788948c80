"""Scores."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from batteries.evaluation.predictions import Predictions

SMALLEST = 1e-15  # of a probability in a logarithm: a certain and wrong prediction costs 34.5, not infinity
RESAMPLES = 2000
ScoreFunction = Callable[[Any, np.ndarray, np.ndarray], float]


def sample_scores(predictions: Predictions) -> dict[str, np.ndarray]:
    """One number per sample, each (N,): accuracy, and loss (cross-entropy) where rows sum to one.

    Empty where targets are not known. Add a metric of your own here.
    """
    if predictions.targets is None:
        return {}
    values, targets = predictions.probabilities, predictions.targets
    scores = {"accuracy": (values.argmax(1) == targets).astype(np.float64)}
    if predictions.sums_to_one():
        chosen = values[np.arange(len(targets)), targets]
        scores["loss"] = -np.log(np.maximum(chosen, SMALLEST))
    return scores


def score(predictions: Predictions, functions: Mapping[str, ScoreFunction] | None = None) -> dict[str, float]:
    """The mean of each of `sample_scores`, and what each of `functions` gives for the whole: those of train.SCORES.

    Those take (sklearn.metrics, targets, probabilities); NaN where such a score has no meaning.
    """
    means = {name: float(values.mean()) for name, values in sample_scores(predictions).items()}
    if not functions or predictions.targets is None:
        return means
    from sklearn import metrics

    for name, function in functions.items():
        try:
            means[name] = float(function(metrics, predictions.targets, predictions.probabilities))
        except ValueError:  # such as ROC AUC of a class without samples
            means[name] = math.nan
    return means


class Gap(NamedTuple):
    """The second mean less the first, and the interval that holds 95 % of its bootstrap."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        sure = "sampling alone explains it" if self.low <= 0 <= self.high else "more than sampling explains"
        return f"{self.difference:+.4f} (95 % interval {self.low:+.4f} to {self.high:+.4f}: {sure})"


def bootstrap_gap(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Gap:
    """The mean of `second` (M,) less that of `first` (N,), with a percentile interval (Efron 1979).

    Both are drawn anew with replacement, RESAMPLES times, from a stream of their own that `seed` starts.
    """
    generator = np.random.default_rng(seed)
    differences = [_resampled(second, generator) - _resampled(first, generator) for _ in range(RESAMPLES)]
    low, high = np.quantile(differences, (0.025, 0.975))
    return Gap(float(second.mean() - first.mean()), float(low), float(high))


def _resampled(values: np.ndarray, generator: np.random.Generator) -> float:
    return values[generator.integers(len(values), size=len(values))].mean()

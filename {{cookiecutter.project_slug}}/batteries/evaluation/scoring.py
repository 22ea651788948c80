"""Scores of predictions, and bootstrap intervals for the difference between two splits."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from batteries.core.metric_names import ScoreFunction, name_values
from batteries.evaluation.predictions import Kind, Predictions
from batteries.metrics.labels import f1_score

SMALLEST = 1e-15  # minimum probability in a logarithm: a wrong prediction with probability 1 costs 34.5, not infinity
RESAMPLES = 2000
DEFAULT_THRESHOLD = 0.5  # of labels
MEANS: dict[Kind, tuple[str, ...]] = {  # the metrics of `sample_scores`
    "class": ("accuracy", "log_loss"),
    "labels": ("label_accuracy", "log_loss"),
    "numbers": ("mae",),
}


def sample_scores(predictions: Predictions) -> dict[str, np.ndarray]:
    """Compute the scores that are means over samples. Add a custom metric of this kind here.

    Returns:
        One number per sample, each (N,), float64. For one class per sample: accuracy, and log_loss if rows sum to one.
        For labels: label_accuracy, and log_loss, both means over the labels. For numbers: mae, the mean absolute error
        over the outputs. Empty if targets are not known. The log loss is the cross-entropy of the probabilities, which
        is not the loss of a run with another loss function.
    """
    if predictions.targets is None:
        return {}
    values = predictions.values
    targets = predictions.targets
    if predictions.kind == "numbers":
        return {"mae": np.abs(values - targets).mean(1)}
    if predictions.kind == "labels":
        of_target = np.where(targets == 1, values, 1 - values)
        losses = -np.log(np.maximum(of_target, SMALLEST))
        threshold = DEFAULT_THRESHOLD if predictions.threshold is None else predictions.threshold
        return {"label_accuracy": ((values >= threshold) == targets).mean(1), "log_loss": losses.mean(1)}
    scores = {"accuracy": (values.argmax(1) == targets).astype(np.float64)}
    if predictions.sums_to_one():
        target_probabilities = values[np.arange(len(targets)), targets]
        scores["log_loss"] = -np.log(np.maximum(target_probabilities, SMALLEST))
    return scores


def score(predictions: Predictions, functions: Mapping[str, ScoreFunction] | None = None) -> dict[str, float]:
    """Score predictions.

    Args:
        predictions: A table of predictions.
        functions: More scores, such as SCORES of experiment/task.py: functions of (sklearn.metrics, targets, values).

    Returns:
        The means of `sample_scores`, and one number per function; NaN if that score is undefined. Empty if targets are
        not known. Scores of labels that depend on a threshold use that of the table, which was chosen on validation,
        and not the best one for these samples.
    """
    scores: dict[str, Any] = {name: values.mean() for name, values in sample_scores(predictions).items()}
    if functions and predictions.targets is not None:
        from sklearn import metrics

        for name, function in functions.items():
            try:
                scores[name] = function(metrics, predictions.targets, predictions.values)
            except ValueError:  # such as ROC AUC of a class without samples
                scores[name] = math.nan
        if predictions.threshold is not None:
            scores |= {name: value for name, value in _at_threshold(predictions).items() if name in functions}
    return name_values(scores, predictions.classes)


def _at_threshold(predictions: Predictions) -> dict[str, float]:
    """Return the scores of labels that depend on the threshold, at that of the table."""
    assert predictions.targets is not None
    assert predictions.threshold is not None
    is_present = predictions.values >= predictions.threshold
    return {
        "macro_f1": f1_score(predictions.targets, is_present, "macro"),
        "micro_f1": f1_score(predictions.targets, is_present, "micro"),
        "threshold": predictions.threshold,
    }


class Gap(NamedTuple):
    """The second mean minus the first, with the bounds of its 95 % bootstrap interval."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        verdict = "within sampling noise" if self.low <= 0 <= self.high else "larger than sampling noise"
        return f"{self.difference:+.4f} (95 % interval {self.low:+.4f} to {self.high:+.4f}: {verdict})"


def bootstrap_gap(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Gap:
    """Compute the mean of `second` (M,) minus the mean of `first` (N,), with a percentile interval (Efron 1979).

    Both are resampled with replacement RESAMPLES times, from a separate random stream that starts at `seed`.
    """
    generator = np.random.default_rng(seed)
    differences = [_resampled_mean(second, generator) - _resampled_mean(first, generator) for _ in range(RESAMPLES)]
    low, high = np.quantile(differences, (0.025, 0.975))
    return Gap(float(second.mean() - first.mean()), float(low), float(high))


def _resampled_mean(values: np.ndarray, generator: np.random.Generator) -> float:
    return values[generator.integers(len(values), size=len(values))].mean()

"""Error analysis of predicted numbers: scores per target, errors by the size of the target, worst samples.

An error is the prediction minus the target.
"""

import math
from typing import NamedTuple

import numpy as np

from batteries.evaluation.predictions import Predictions

SIZE_BINS = 10  # bins of errors by size: deciles


class NumberScore(NamedTuple):
    """The scores of one target.

    Attributes:
        name: The target.
        mae: The mean absolute error.
        rmse: The root of the mean squared error.
        r2: The fraction of the variance that is explained; NaN if all samples have the same target.
        median_absolute_error: The median of the absolute errors.
        bias: The mean error.
    """

    name: str
    mae: float
    rmse: float
    r2: float
    median_absolute_error: float
    bias: float


def score_numbers(predictions: Predictions) -> list[NumberScore]:
    """Compute the scores of each target, the lowest R2 first."""
    assert predictions.targets is not None
    scores = []
    for name, values, targets in zip(predictions.classes, predictions.values.T, predictions.targets.T, strict=True):
        errors = values - targets
        variance = targets.var()
        scores.append(
            NumberScore(
                name=name,
                mae=float(np.abs(errors).mean()),
                rmse=math.sqrt(np.square(errors).mean()),
                r2=float(1 - np.square(errors).mean() / variance) if variance > 0 else math.nan,
                median_absolute_error=float(np.median(np.abs(errors))),
                bias=float(errors.mean()),
            )
        )
    return sorted(scores, key=lambda score: math.inf if math.isnan(score.r2) else score.r2)


class SizeBin(NamedTuple):
    """The samples with targets from `low` to `high`: their number and mean absolute error."""

    low: float
    high: float
    samples: int
    mae: float


def bin_by_size(values: np.ndarray, targets: np.ndarray) -> list[SizeBin]:
    """Group samples by the decile of their target, in ascending order; equal targets are in one bin.

    Args:
        values: The predictions, shape (N,).
        targets: The targets, shape (N,).
    """
    edges = np.unique(np.quantile(targets, np.arange(1, SIZE_BINS) / SIZE_BINS))
    bin_of = np.searchsorted(edges, targets, side="right")
    errors = np.abs(values - targets)
    bins = []
    for number in np.unique(bin_of):
        chosen = bin_of == number
        low = float(targets[chosen].min())
        high = float(targets[chosen].max())
        bins.append(SizeBin(low, high, int(chosen.sum()), float(errors[chosen].mean())))
    return bins


def standardized_errors(predictions: Predictions) -> np.ndarray:
    """Return the errors (N, C) divided by the standard deviation of their target, or by 1 if it is 0."""
    targets = predictions.targets
    assert targets is not None
    deviation = targets.std(0)
    return (predictions.values - targets) / np.where(deviation > 0, deviation, 1)


def worst_predicted_samples(predictions: Predictions, most: int) -> np.ndarray:
    """Return the rows of the `most` samples with the largest standardised absolute error of a target, largest first."""
    largest = np.abs(standardized_errors(predictions)).max(1)
    return np.argsort(-largest, kind="stable")[:most]

"""Metrics of several labels per sample: targets (N, C), 0 and 1, and probabilities (N, C), as numpy arrays."""

from typing import Any, Literal

import numpy as np

Average = Literal["macro", "micro"]
THRESHOLDS = np.arange(1, 100) / 100  # that `best_threshold` compares


def average_precisions(sk: Any, targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the average precision of each label, shape (C,); NaN if no sample has it.

    Args:
        sk: The module sklearn.metrics.
        targets: The labels.
        probabilities: Their probabilities.
    """
    pairs = zip(targets.T, probabilities.T, strict=True)
    return np.array([sk.average_precision_score(*pair) if pair[0].any() else np.nan for pair in pairs])


def mean_average_precision(sk: Any, targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean of `average_precisions` over the labels that some sample has; ValueError if there are none."""
    if not targets.any():
        raise ValueError("no sample has a label.")
    return float(np.nanmean(average_precisions(sk, targets, probabilities)))


def roc_aucs(sk: Any, targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each label, shape (C,); NaN if all samples have it, or none."""
    pairs = zip(targets.T, probabilities.T, strict=True)
    return np.array([sk.roc_auc_score(*pair) if 0 < pair[0].sum() < len(pair[0]) else np.nan for pair in pairs])


def mean_roc_auc(sk: Any, targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean of `roc_aucs` over the labels for which it is defined; ValueError if there are none."""
    scores = roc_aucs(sk, targets, probabilities)
    if np.isnan(scores).all():
        raise ValueError("each label is present in all samples, or in none.")
    return float(np.nanmean(scores))


def best_threshold(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the probability from which on a label counts as present, so that the macro F1 is highest.

    One threshold for all labels, of 0.01, 0.02, …, 0.99; of several equal ones, the middle one.
    """
    scores = np.array([f1_score(targets, probabilities >= threshold) for threshold in THRESHOLDS])
    best = np.flatnonzero(scores == scores.max())
    return float(THRESHOLDS[best[len(best) // 2]])


def f1_score(targets: np.ndarray, predicted: np.ndarray, average: Average = "macro") -> float:
    """Return the F1 score: of each label and their mean (macro), or of all decisions together (micro); 0 for 0 / 0."""
    targets = targets.astype(bool)
    axis = 0 if average == "macro" else None
    correct = (targets & predicted).sum(axis)
    total = targets.sum(axis) + predicted.sum(axis)
    return float((2 * correct / np.maximum(total, 1)).mean())


def best_f1_score(targets: np.ndarray, probabilities: np.ndarray, average: Average = "macro") -> float:
    """Return the F1 score at `best_threshold`."""
    return f1_score(targets, probabilities >= best_threshold(targets, probabilities), average)
